"""Clean-up: remove the edges that a circuit does not need, and add what it lacks.

Gates are learned together and cut at one threshold, so some edges end up on the wrong side of it.
A sweep tries to remove the least important edges first, several at once: twice as many after a
success, half as many after a failure, down to single edges in a small circuit and to 1/256 of the
edges in a large one. That takes a few hundred passes over the data at most, and a pass stops as
soon as it is known to fail. Sweeps of a small circuit are repeated until one removes nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.graph import Edge
from edgeprune.metrics import Output, distance_by_example
from edgeprune.prompts import Batch, Pair, iterate_batches
from edgeprune.scores import EdgeScores

SMALL = 256
"""A circuit of at most this many edges is tried edge by edge, a larger one in this many parts."""


@dataclass(frozen=True)
class CleanUp:
    """A cleaned-up circuit, and its size and distance (see `clean_up`) before and after.

    `passes` is the number of circuits that were run over the data.
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
    model: CircuitModel, circuit: Circuit, pairs: Sequence[Pair], *, tolerance: float,
    scores: EdgeScores, ablation: Ablation | str = "interchange", batch_size: int = 64,
) -> CleanUp:  # fmt: skip
    """Remove dangling edges, then every edge whose removal keeps the distance within a limit.

    For logits, the distance from the full model is the mean KL divergence over examples, in nats
    per predicted token, and the limit is the given circuit's distance plus `tolerance`. For values,
    the distance is the largest absolute error of any output, and the limit is `tolerance`, because
    such a model computes something exactly; a circuit beyond the limit first gets the
    highest-ranked missing edges until it is within.

    Args:
        pairs: prompts on which the distance is measured.
        tolerance: at least 0, see above.
        scores: the edges with the lowest scores are tried first.
        ablation: what ablated edges carry, such as `Pruned.ablation`; or `interchange`, `zero` or
            `mean` (over `pairs`, per position).

    Returns:
        A circuit from which, if it has at most `SMALL` edges, no single edge can be removed.

    Raises ValueError if circuit or scores belong to another graph than the model's, there are no
    prompts, one is too long, the tolerance is negative, or the distance is not finite.
    """
    Circuit.check(circuit, model.graph)
    if scores.graph != model.graph:
        raise ValueError(f"the scores are of {scores.graph}, but the model has {model.graph}")
    model.check_prompts(pairs)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0")
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    ranked = [model.graph.edges[index] for index in scores.ranking().tolist()]
    batches = [batch.to(model.device) for batch in iterate_batches(pairs, batch_size)]
    run = KeptPasses.where_they_fit(model, pairs, batch_size, corrupted=ablation.needs_corrupted)
    search = _Search(model, circuit, ranked, ablation, batches, run_pair=run)
    before = search.distance(circuit)
    found = search.run(before, tolerance)
    after = search.distance(found)
    return CleanUp(found, len(circuit), len(found), before, after, search.passes)


@dataclass
class _Search:
    """The smallest circuit found so far, how to measure it, and how many passes that has taken."""

    model: CircuitModel
    circuit: Circuit
    ranked: Sequence[Edge]
    ablation: Ablation
    batches: Sequence[Batch]
    run_pair: Callable[[Batch], tuple[Tensor, Activations | None]]
    limit: float = math.inf
    passes: int = 0

    def run(self, distance: float, tolerance: float) -> Circuit:
        """Improve the circuit, whose distance is given, as far as the tolerance allows."""
        self.limit = tolerance
        if self.model.output is Output.logits:
            if not math.isfinite(distance):
                raise ValueError(f"distance {distance} is not finite; use model.dtype=float32")
            self.limit += distance
        elif distance > self.limit:
            self._add_missing_edges()
        self._try(self.circuit.without_dangling())
        while True:
            before = len(self.circuit)
            self._sweep()
            self._try(self.circuit.without_dangling())
            if len(self.circuit) == before or len(self.circuit) > SMALL:
                return self.circuit

    def distance(self, circuit: Circuit, limit: float = math.inf) -> float:
        """Distance of a circuit from the full model; infinity as soon as it exceeds the limit."""
        self.passes += 1
        model, total = self.model, 0.0
        num_examples = sum(len(batch.pairs) for batch in self.batches)
        gates = torch.zeros(model.graph.num_edges, device=model.device)
        gates[[model.graph.edge_index(edge) for edge in circuit.edge_set]] = 1
        for batch in self.batches:
            reference, corrupted = self.run_pair(batch)
            outputs = model.run_circuit(batch, gates, self.ablation.values(batch, corrupted))
            distances = distance_by_example(batch, reference, outputs, model.output)
            if model.output is Output.logits:
                total += distances.cpu().double().sum().item() / num_examples
            else:
                total = max(distances.max().item(), total)
            if not total <= limit:
                return math.inf
        return total

    def _try(self, candidate: Circuit) -> bool:
        """Accept a smaller circuit if it is within the limit; whether it was accepted."""
        if candidate != self.circuit and self.distance(candidate, self.limit) <= self.limit:
            self.circuit = candidate
            return True
        return False

    def _add_missing_edges(self) -> None:
        """Add 1, 2, 4, ... edges by rank until the circuit is within the limit, or complete."""
        missing = [edge for edge in self.ranked if edge not in self.circuit.edge_set]
        count = 1
        while not self.distance(self.circuit, self.limit) <= self.limit and missing:
            self.circuit |= Circuit(self.circuit.graph, frozenset(missing[:count]))
            missing, count = missing[count:], 2 * count

    def _sweep(self) -> None:
        """Try to remove every edge once, the least important first."""
        edges = [edge for edge in reversed(self.ranked) if edge in self.circuit.edge_set]
        fewest, count = max(1, len(edges) // SMALL), max(1, len(edges) // 4)
        while edges:
            candidate = self.circuit - Circuit(self.circuit.graph, frozenset(edges[:count]))
            if self.ablation.kind == "interchange":
                candidate = candidate.without_dangling()  # which changes no output
            if self._try(candidate):
                edges = [edge for edge in edges[count:] if edge in self.circuit.edge_set]
                count *= 2
            elif min(count, len(edges)) <= fewest:
                edges = edges[fewest:]
            else:
                count = max(fewest, min(count, len(edges)) // 2)
