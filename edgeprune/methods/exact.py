"""Cutting edges for real: the exact effect of each edge, and ACDC.

Both run the circuit once per edge, from the edge's layer on. A score is by how much the objective
rises when the edge is cut.
"""

import time
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from edgeprune.engine.cache import KeptPasses
from edgeprune.graph import Site
from edgeprune.methods.attribution import Attribution
from edgeprune.prompts import Batch

CHUNK = 8
"""Edges that ACDC tries to cut, one after another, before it looks at the results."""


class _Cutting(Attribution):
    """Measures circuits with and without some edges, from the edges' layer on."""

    @cached_property
    def _kept(self) -> Tensor:
        """[edge], whether an edge belongs to the circuit in which edges are cut."""
        return torch.tensor(self.circuit.mask())

    @cached_property
    def _full_model(self):
        """See `CircuitModel.run_pair`; passes are kept if they fit."""
        return KeptPasses.where_they_fit(
            self.model, self.pairs, self.batch_size, corrupted=self.ablation.needs_corrupted
        )

    def layer_of(self, site: Site) -> int:
        """The first layer that an edge into a site changes."""
        return min(self.model.graph.sites.index(site) // 2, self.model.graph.num_layers - 1)

    @torch.no_grad()
    def measure(self, batch: Batch, circuits: Sequence[Tensor]) -> Tensor:
        """The objective of circuits, [circuit]. A circuit is [edge], whether an edge is kept."""
        reference, corrupted = self._full_model(batch)
        values = self.ablation.values(batch, corrupted)
        gates = (kept.float().to(self.model.device) for kept in circuits)
        outputs = self.model.run_circuits(batch, gates, values)
        return torch.stack([self.objective(batch, reference, out).float() for out in outputs])

    def expected_seconds(self) -> float:
        """At most: the seconds of a pass over the first batch, for every edge and batch."""
        (part, _), graph = self.my_part(0), self.model.graph
        self.measure(part, [self._kept])  # libraries load what they need
        start = time.perf_counter()
        self.measure(part, [self._kept])
        seconds = time.perf_counter() - start
        shares = (
            int(self._kept[site.place].sum()) * (1 - self.layer_of(site) / graph.num_layers)
            for site in graph.sites
        )
        return seconds * sum(shares) * len(self.batches)


class Exact(_Cutting):
    """Cuts one edge at a time; the others stay. Each step takes a site's edges on one batch."""

    @property
    def num_steps(self) -> int:
        return len(self.model.graph.sites) * len(self.batches)

    def step(self, index: int, scores: Tensor) -> None:
        site_index, batch_index = divmod(index, len(self.batches))
        site = self.model.graph.sites[site_index]
        edges = [site.offset + i for i in self._kept[site.place].nonzero()[:, 0].tolist()]
        if not edges:
            return
        batch, count = self.my_part(batch_index)
        circuits = [self._kept, *(_without(self._kept, [edge]) for edge in edges)]
        measured = self.measure(batch, circuits)
        rises = count / len(self.pairs) * (measured[1:] - measured[0])
        self.world.sum([rises])
        if not rises.isfinite().all():
            raise FloatingPointError("the objective is not finite")
        scores[edges] += rises.cpu().double()


class ACDC(_Cutting):
    """From the output backwards, cuts each edge for which the objective rises by too little.

    Conmy et al. 2023 (arXiv:2304.14997). An edge stays cut if the rise is below `threshold`. Its
    score is the rise at its turn, so the circuit has the edges whose score is at least the
    threshold. Each step decides the edges into one reader, the latest writer first; those into a
    reader that reaches the output no more score 0, without being tried.
    """

    @property
    def num_steps(self) -> int:
        return len(self.model.graph.readers)

    def step(self, index: int, scores: Tensor) -> float | None:
        graph = self.model.graph
        reader = graph.readers[-1 - index]
        site = next(site for site in graph.sites if reader in site.readers)
        first = site.offset + site.readers.index(reader) * site.num_writers
        kept = self._kept.clone()
        kept[first + site.num_writers :] &= scores[first + site.num_writers :] >= self.threshold
        if not self._reaches_output(reader, kept, first + site.num_writers):
            return None
        remaining = [e for e in range(first + site.num_writers - 1, first - 1, -1) if kept[e]]
        value = None
        while remaining:
            # Cut the next edges one after another, as if none had to stay.
            tried = remaining[:CHUNK]
            cuts = [_without(kept, tried[:count]) for count in range(len(tried) + 1)]
            measured = self._measure_all(cuts)
            rises = (measured[1:] - measured[:-1]).tolist()
            count = next((i for i, rise in enumerate(rises) if rise >= self.threshold), len(rises))
            kept, value = cuts[count], measured[count].item()
            decided = tried[: count + 1]  # with the edge that stays, if one does
            scores[decided] = torch.tensor(rises[: count + 1], dtype=torch.float64)
            remaining = remaining[len(decided) :]
        return value

    def _reaches_output(self, reader: str, kept: Tensor, decided: int) -> bool:
        """Whether a kept edge leaves a node that the reader feeds; edges from `decided` on count.

        Those into readers that do not reach the output have been cut.
        """
        graph = self.model.graph
        if reader == "resid_post":
            return True
        fed = {graph.writers.index(node) for node in graph.nodes_fed_by(reader)}
        writers = graph.edge_writers()
        return any(writers[edge] in fed for edge in decided + kept[decided:].nonzero()[:, 0])

    def _measure_all(self, circuits: Sequence[Tensor]) -> Tensor:
        """`measure` on all prompts, [circuit], the same on all processes."""
        total = torch.zeros(len(circuits), device=self.model.device)
        for index in range(len(self.batches)):
            batch, count = self.my_part(index)
            total += count / len(self.pairs) * self.measure(batch, circuits)
        self.world.sum([total])
        if not total.isfinite().all():
            raise FloatingPointError("the objective is not finite")
        return total


def _without(kept: Tensor, edges: Sequence[int]) -> Tensor:
    kept = kept.clone()
    kept[list(edges)] = False
    return kept
