"""The final clean-up: edges which a circuit can do without are removed, and what it lacks is added.

Gates are learned together and cut at one threshold, so some edges end up on the wrong side of it.
Here each is really cut, and what the circuit then does decides. Edges are tried cheapest first,
many at once where that goes well (twice as many after each success) and ever fewer where it does
not, down to one by one in a small circuit and to a 256th of a large one at a time: so a sweep costs
some hundreds of passes over the data at the most, however many edges there are. A pass stops as
soon as it is known to fail. Sweeps of a small circuit are repeated until one removes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.config import AblationKind, check_cleanup
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import MAX_KEPT, KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.graph import Edge
from edgeprune.metrics import Output, error_per_token, kl_per_token, mean_by_example
from edgeprune.prompts import Batch, Pair, iterate_batches

SMALL = 256
"""Edges of a circuit up to which each is tried by itself; of a larger one, so many parts are."""


@dataclass(frozen=True)
class CleanUp:
    """A circuit before and after the clean-up.

    Attributes:
        circuit: what is left.
        num_edges_before, num_edges_after: its edges.
        distance_before, distance_after: from the full model, see `clean_up`.
        passes: circuits that were run over the data.
    """

    circuit: Circuit
    num_edges_before: int
    num_edges_after: int
    distance_before: float
    distance_after: float
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for circuit.json, without the circuit."""
        return {name: value for name, value in vars(self).items() if name != "circuit"}


@torch.no_grad()
def clean_up(
    model: CircuitModel,
    circuit: Circuit,
    pairs: Sequence[Pair],
    *,
    tolerance: float,
    ranking: Sequence[int],
    ablation: Ablation | str = "interchange",
    batch_size: int = 64,
) -> CleanUp:
    """Remove dangling edges, and then every edge whose removal keeps the distance within a limit.

    The distance from the full model is the mean KL divergence over examples, in nats per predicted
    token, and the limit is the circuit's own at the start plus `tolerance`. Where outputs are
    values, the distance is the largest absolute error of any output, and the limit is `tolerance`:
    such a model computes something exactly, and so has its circuit to; one that does not is first
    given the next edges of the ranking until it does.

    Args:
        model: the model.
        circuit: to begin with.
        pairs: what the distance is measured on.
        tolerance: see above; 0 or more.
        ranking: every edge's number, the most important first; the last are tried first.
        ablation: what ablated edges carry, such as `Pruned.ablation`; or `interchange`, `zero` or
            `mean` (over `pairs`, one a position).
        batch_size: pairs a forward pass.

    Returns:
        A circuit of which, if it has up to `SMALL` edges, no single one can be removed. It is a
        subset of the one given, unless that one had to be completed.

    Raises:
        ConfigError: the tolerance is negative.
        ValueError: the circuit is of another graph than the model's, the ranking has not every edge
            once, there are no prompts, one is too long for the model, or `batch_size` is below 1.
    """
    check_cleanup(tolerance)
    CircuitModel.check(model)
    Circuit.check(circuit, model.graph)
    num_edges = model.graph.num_edges
    if sorted(ranking) != list(range(num_edges)):
        raise ValueError(
            f"the ranking, of {len(ranking):,} numbers, is no order of the model's {num_edges:,} "
            f"edges; expected each of 0 to {num_edges - 1:,} once, such as `pruned.masks.ranking()`"
        )
    model.check_prompts(pairs)
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    return _CleaningUp(model, circuit, pairs, ranking, ablation, batch_size).run(tolerance)


class _CleaningUp:
    def __init__(
        self,
        model: CircuitModel,
        circuit: Circuit,
        pairs: Sequence[Pair],
        ranking: Sequence[int],
        ablation: Ablation,
        batch_size: int,
    ) -> None:
        self.model = model
        self.circuit = circuit
        names = model.graph.edges
        self.ranked = [names[number] for number in ranking]
        self.ablation = ablation
        self.passes = 0
        self.num_examples = len(pairs)
        self._batches = list(iterate_batches(pairs, batch_size))
        self._kept: list[tuple[Batch, Tensor, Activations | None]] | None = None
        if KeptPasses.size(model, pairs, corrupted=ablation.needs_corrupted) <= MAX_KEPT:
            self._kept = list(self._run_batches())

    def run(self, tolerance: float) -> CleanUp:
        given = self.circuit
        before = self.distance(given)
        self.limit = tolerance
        if self.model.output is Output.logits:
            if not math.isfinite(before):
                raise ValueError(
                    "the circuit's distance from the full model is not a finite number, so nothing "
                    "can be compared with it; use model.dtype=float32"
                )
            self.limit += before
        elif before > self.limit:
            self._complete()
        self._try(self.circuit.without_dangling())
        while True:
            removed = self._sweep()
            removed = self._try(self.circuit.without_dangling()) or removed
            if not removed or len(self.circuit) > SMALL:
                break
        return CleanUp(
            circuit=self.circuit,
            num_edges_before=len(given),
            num_edges_after=len(self.circuit),
            distance_before=before,
            distance_after=self.distance(self.circuit),
            passes=self.passes,
        )

    # -------------------------------------------------------------------------------- the distance

    def distance(self, circuit: Circuit, limit: float = float("inf")) -> float:
        """Of a circuit from the full model; infinite, and cut short, where it exceeds the limit."""
        self.passes += 1
        model = self.model
        gates = torch.zeros(model.graph.num_edges, device=model.device)
        gates[[model.graph.edge_index(edge) for edge in circuit.edge_set]] = 1
        total = 0.0
        for batch, reference, closed in self._kept or self._run_batches():
            outputs = model.run_circuit(batch, gates, closed)
            if model.output is Output.logits:
                kl = mean_by_example(kl_per_token(reference, outputs), batch)
                total += kl.cpu().double().sum().item() / self.num_examples
            else:
                total = max(total, error_per_token(reference, outputs).max().item())
            if not total <= limit:
                return float("inf")
        return total

    def _run_batches(self) -> Iterator[tuple[Batch, Tensor, Activations | None]]:
        for batch in self._batches:
            batch = batch.to(self.model.device)
            needed = self.ablation.needs_corrupted
            reference, corrupted = self.model.run_pair(batch, corrupted=needed)
            yield batch, reference, self.ablation.values(batch, corrupted)

    # ------------------------------------------------------------------------------- what is tried

    def _try(self, candidate: Circuit) -> bool:
        """Take the candidate if it is near enough."""
        if len(candidate) == len(self.circuit):
            return False
        if not self.distance(candidate, self.limit) <= self.limit:
            return False
        self.circuit = candidate
        return True

    def _complete(self) -> None:
        """Add the edges next in the ranking, ever more at once, until the distance is in the limit.

        With all edges it is the full model.
        """
        graph = self.circuit.graph
        kept = self.circuit.edge_set
        missing = [edge for edge in self.ranked if edge not in kept]
        count = 1
        while not self.distance(self.circuit, self.limit) <= self.limit and missing:
            self.circuit = Circuit(graph, self.circuit.edge_set | set(missing[:count]))
            missing = missing[count:]
            count *= 2

    def _sweep(self) -> bool:
        """Try every edge once, cheapest first; whether any went."""
        edges = [edge for edge in reversed(self.ranked) if edge in self.circuit.edge_set]
        before = len(edges)
        fewest = max(1, before // SMALL)
        count = max(1, before // 4)
        while edges:
            if self._remove(edges[:count]):
                edges = [edge for edge in edges[count:] if edge in self.circuit.edge_set]
                count *= 2
            elif min(count, len(edges)) <= fewest:
                edges = edges[fewest:]
            else:
                count = max(fewest, min(count, len(edges)) // 2)
        return len(self.circuit) < before

    def _remove(self, edges: list[Edge]) -> bool:
        candidate = Circuit(self.circuit.graph, self.circuit.edge_set - set(edges))
        if self.ablation.kind is AblationKind.interchange:
            candidate = candidate.without_dangling()  # changes no output
        return self._try(candidate)
