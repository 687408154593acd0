"""Clean-up: remove the edges that a circuit does not need, and add what it lacks.

Gates are learned together and cut at one threshold, so some edges end up on the wrong side of it.
The clean-up actually cuts them and measures the resulting circuit. It tries the least important
edges first, several at once: twice as many after a success, half as many after a failure. It goes
down to single edges in a small circuit and to 1/256 of the edges of a large one, so a sweep takes a
few hundred passes over the data at most. A pass stops as soon as it is known to fail. Sweeps of a
small circuit are repeated until one removes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import MAX_KEPT, KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.graph import Edge
from edgeprune.metrics import Output, error_per_token, kl_per_token, mean_by_example
from edgeprune.prompts import Batch, Pair, iterate_batches
from edgeprune.scores import EdgeScores

SMALL = 256
"""A circuit of at most this many edges is tried edge by edge, a larger one in this many parts."""


@dataclass(frozen=True)
class CleanUp:
    """The result of a clean-up.

    Attributes:
        circuit: the cleaned-up circuit.
        num_edges_before, num_edges_after: number of edges.
        distance_before, distance_after: distance from the full model, see `clean_up`.
        passes: number of circuits that were run over the data.
    """

    circuit: Circuit
    num_edges_before: int
    num_edges_after: int
    distance_before: float
    distance_after: float
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values for circuit.json, without the circuit."""
        return {name: value for name, value in vars(self).items() if name != "circuit"}


@torch.no_grad()
def clean_up(
    model: CircuitModel,
    circuit: Circuit,
    pairs: Sequence[Pair],
    *,
    tolerance: float,
    scores: EdgeScores,
    ablation: Ablation | str = "interchange",
    batch_size: int = 64,
) -> CleanUp:
    """Remove dangling edges, then every edge whose removal keeps the distance within a limit.

    For logits, the distance from the full model is the mean KL divergence over examples, in nats
    per predicted token, and the limit is the given circuit's distance plus `tolerance`. For values,
    the distance is the largest absolute error of any output, and the limit is `tolerance`, because
    such a model computes something exactly and its circuit has to as well; a circuit beyond the
    limit first gets the highest-ranked missing edges until it is within.

    Args:
        model: the model.
        circuit: the circuit to clean up.
        pairs: prompts on which the distance is measured.
        tolerance: at least 0, see above.
        scores: the edges with the lowest scores are tried first.
        ablation: what ablated edges carry, such as `Pruned.ablation`; or `interchange`, `zero` or
            `mean` (over `pairs`, per position).
        batch_size: pairs per forward pass.

    Returns:
        A circuit from which, if it has at most `SMALL` edges, no single edge can be removed. It is
        a subset of the given one, unless edges had to be added.

    Raises:
        ConfigError: the tolerance is negative.
        ValueError: the circuit or the scores belong to another graph than the model's, there are no
            prompts, one is too long for the model, or the distance is not finite.
    """
    if not tolerance >= 0:
        raise ConfigError(f"cleanup={tolerance} is out of range: it is a distance, at least 0")
    Circuit.check(circuit, model.graph)
    if scores.graph != model.graph:
        raise ValueError(f"the scores are of {scores.graph}, but the model has {model.graph}")
    model.check_prompts(pairs)
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    search = _Search(model, circuit, pairs, scores, ablation, batch_size)
    before = search.distance(circuit)
    search.run(before, tolerance)
    return CleanUp(
        circuit=search.circuit,
        num_edges_before=len(circuit),
        num_edges_after=len(search.circuit),
        distance_before=before,
        distance_after=search.distance(search.circuit),
        passes=search.passes,
    )


class _Search:
    """The best circuit so far and the limit that it has to meet.

    Attributes:
        circuit: the smallest circuit found.
        ranked: all edges, most important first.
        limit: largest distance that is accepted.
        passes: number of circuits measured.
    """

    def __init__(
        self,
        model: CircuitModel,
        circuit: Circuit,
        pairs: Sequence[Pair],
        scores: EdgeScores,
        ablation: Ablation,
        batch_size: int,
    ) -> None:
        self.model = model
        self.circuit = circuit
        self.ranked = [model.graph.edges[index] for index in scores.ranking().tolist()]
        self.ablation = ablation
        self.passes = 0
        self.num_examples = len(pairs)
        self._batches = list(iterate_batches(pairs, batch_size))
        self._kept: list[tuple[Batch, Tensor, Activations | None]] | None = None
        if KeptPasses.size(model, pairs, corrupted=ablation.needs_corrupted) <= MAX_KEPT:
            self._kept = list(self._run_batches())

    def run(self, distance: float, tolerance: float) -> None:
        """Improve the circuit, whose distance is given, as far as the tolerance allows."""
        self.limit = tolerance
        if self.model.output is Output.logits:
            if not math.isfinite(distance):
                raise ValueError(
                    f"the circuit's distance from the full model is {distance}, which is not a "
                    "finite number; use model.dtype=float32"
                )
            self.limit += distance
        elif distance > self.limit:
            self._add_missing_edges()
        self._try(self.circuit.without_dangling())
        improved = True
        while improved:
            improved = self._sweep()
            improved = self._try(self.circuit.without_dangling()) or improved
            improved = improved and len(self.circuit) <= SMALL

    def distance(self, circuit: Circuit, limit: float = math.inf) -> float:
        """Distance of a circuit from the full model; infinity as soon as it exceeds the limit."""
        self.passes += 1
        model = self.model
        gates = torch.zeros(model.graph.num_edges, device=model.device)
        gates[[model.graph.edge_index(edge) for edge in circuit.edge_set]] = 1
        total = 0.0
        for batch, reference, ablation_values in self._kept or self._run_batches():
            outputs = model.run_circuit(batch, gates, ablation_values)
            if model.output is Output.logits:
                kl = mean_by_example(kl_per_token(reference, outputs), batch)
                total += kl.cpu().double().sum().item() / self.num_examples
            else:
                total = max(total, error_per_token(reference, outputs).max().item())
            if not total <= limit:
                return math.inf
        return total

    def _run_batches(self) -> Iterator[tuple[Batch, Tensor, Activations | None]]:
        """Yield each batch, its reference and its ablation values."""
        for batch in self._batches:
            batch = batch.to(self.model.device)
            needed = self.ablation.needs_corrupted
            reference, corrupted = self.model.run_pair(batch, corrupted=needed)
            yield batch, reference, self.ablation.values(batch, corrupted)

    def _try(self, candidate: Circuit) -> bool:
        """Accept a smaller circuit if it is within the limit; whether it was accepted."""
        if len(candidate) == len(self.circuit):
            return False
        if not self.distance(candidate, self.limit) <= self.limit:
            return False
        self.circuit = candidate
        return True

    def _add_missing_edges(self) -> None:
        """Add 1, 2, 4, ... edges by rank until the circuit is within the limit, or complete."""
        missing = [edge for edge in self.ranked if edge not in self.circuit.edge_set]
        count = 1
        while not self.distance(self.circuit, self.limit) <= self.limit and missing:
            edges = self.circuit.edge_set | set(missing[:count])
            self.circuit = Circuit(self.circuit.graph, edges)
            missing = missing[count:]
            count *= 2

    def _sweep(self) -> bool:
        """Try to remove every edge once, the least important first; whether any was removed."""
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
        if self.ablation.kind == "interchange":
            candidate = candidate.without_dangling()  # which changes no output
        return self._try(candidate)
