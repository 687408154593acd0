"""Cutting edges for real: the exact effect of each edge, and ACDC.

Both run the circuit once per edge, from the edge's layer on. A score is by how much the objective
rises when the edge is cut.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor

from edgeprune.engine.cache import KeptPasses
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

    @torch.no_grad()
    def measure(self, batch: Batch, circuits: Sequence[Tensor]) -> Tensor:
        """The objective of circuits, [circuit]. A circuit is [edge], whether an edge is kept."""
        reference, corrupted = self._full_model(batch)
        values = self.ablation.values(batch, corrupted)
        gates = (kept.float().to(self.model.device) for kept in circuits)
        outputs = self.model.run_circuits(batch, gates, values)
        return torch.stack([self.objective(batch, reference, out).float() for out in outputs])

    def expected_seconds(self) -> float:
        """An upper bound: the time of a pass over the largest batch, for every edge and batch."""
        num_tokens = [len(pairs) * len(pairs[-1].clean_ids) for pairs in self.batches]  # padded
        (part, _), graph = self.my_part(num_tokens.index(max(num_tokens))), self.model.graph
        self.measure(part, [self._kept])  # libraries load what they need
        start = time.perf_counter()
        self.measure(part, [self._kept])
        seconds = time.perf_counter() - start
        shares = (
            int(self._kept[site.place].sum()) * (1 - site.layer / graph.num_layers)
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
    threshold. Each step decides the edges into one reader, the latest writer first. If no kept edge
    leaves a node that the reader feeds, its edges score 0 without being tried.
    """

    @property
    def num_steps(self) -> int:
        return len(self.model.graph.readers)

    def step(self, index: int, scores: Tensor) -> float | None:
        graph = self.model.graph
        reader = graph.readers[-1 - index]
        edges = graph.edges_into[reader]
        kept, later = self._kept.clone(), slice(edges.stop, None)
        kept[later] &= scores[later] >= self.threshold
        sending = {writer for writer, _ in compress(graph.edges[later], kept[later].tolist())}
        if reader != "resid_post" and sending.isdisjoint(graph.nodes_fed_by(reader)):
            return None
        remaining = [edge for edge in reversed(edges) if kept[edge]]
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
