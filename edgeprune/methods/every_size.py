"""Scores that rank the edges for circuits of every size, learned in one run (trainer=every_size).

Each step trains a circuit of another size k, drawn at random. Its gates are a smooth version of
"the k edges of the highest scores", which is also how circuits are cut in the end:

    g_e = sigmoid((s_e - tau) / T),  with tau such that  sum_e g_e = k

The score of an edge u -> v is a sum, so that edges of one node learn from each other's gradients:

    s_e = edge_e + writer_u + reader_v

Training at random sizes is the idea of Matryoshka attribution (arXiv:2609.25518).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from edgeprune.graph import CircuitGraph
from edgeprune.methods.method import Method, check_shapes, read_finite

INITIAL_STD = 0.01
"""Standard deviation of the scores at the start, which only breaks ties."""
START_SCALE = 0.5
"""Size of the scores at the start where they follow other scores' ranks, as a multiple of log odds:
small enough for what is learned to move them."""
COOLING = 4.0
"""The temperature at the start, as a multiple of that at the end: gates become nearly binary, like
those of the circuits that are cut in the end."""
NODE_RATE = 0.3
"""Learning rate of the terms of writers and readers, as a multiple of that of the edges' own."""
NUM_BISECTIONS = 40
"""Number of bisection steps in the search for tau, which leave a float32's precision."""
MAX_LOGIT = 30.0
"""Sigmoids of larger numbers are 1 in float32."""
MIN_TOTAL_GRADIENT = 0.1
"""Gradients whose absolute values sum to less than this are not scaled up to a mean size of 1: a
large circuit's gradient is mostly noise, and should not move the scores as far as a small one's."""
TINY = 1e-12
"""Smallest number that is divided by."""


@dataclass(kw_only=True, eq=False)
class EverySize(Method):
    """Minimises the objective at a random size in each step.

    Attributes:
        smallest: smallest size that is drawn, as a share of the edges, in (0, 1].
        temperature: T at the end; see `temperature_at`.
        ranking: [edge], the edges in the order of other scores, best first, from which learning
            starts; None: from scratch.
    """

    smallest: float
    temperature: float
    ranking: Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        scores = INITIAL_STD * torch.randn(self.graph.num_edges, generator=generator)
        if self.ranking is not None:
            scores += START_SCALE * log_odds_of_ranks(self.ranking)
        self._cells = edge_cells(self.graph).to(self.device)
        terms = {
            "edge": scores,
            "writer": torch.zeros(self.graph.num_writers),
            "reader": torch.zeros(len(self.graph.readers)),
        }
        self.parameters = {kind: x.to(self.device).requires_grad_() for kind, x in terms.items()}
        edge, *nodes = self.parameters.values()
        groups = [{"params": [edge]}, {"params": nodes, "lr": NODE_RATE * self.learning_rate}]
        self.optimizer = torch.optim.Adam(groups, self.learning_rate)

    def size(self, step: int) -> float:
        """The size of a step's circuit, in edges: log-uniform from the smallest to all edges."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        total = self.graph.num_edges
        smallest = max(self.smallest, 1 / total)
        return total * smallest ** torch.rand((), generator=generator).item()

    def temperature_at(self, step: int) -> float:
        """T of a step: falls geometrically from `COOLING` times its final value."""
        return self.temperature * COOLING ** (1 - step / self.steps)

    @torch.no_grad()
    def gates(self, step: int) -> Tensor:
        self._gates = self.gates_of(sum_scores(self._cells, **self.parameters), step)
        return self._gates

    def gates_of(self, scores: Tensor, step: int) -> Tensor:
        """The gates of a step, [edge], if these were the scores."""
        return soft_top_k(scores, self.size(step), self.temperature_at(step))

    def update(self, step: int, objective: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        read = read_finite(grad_gates, objective=objective)
        gradient = grad_scores(grad_gates, self._gates)
        smallest_mean = MIN_TOTAL_GRADIENT / len(gradient)
        gradient /= gradient.abs().mean().clamp(min=smallest_mean)
        edge, writer, reader = self.parameters.values()
        matrix = gradient.new_zeros(len(reader), len(writer))
        matrix.view(-1)[self._cells] = gradient
        edge.grad, writer.grad, reader.grad = gradient, matrix.sum(0), matrix.sum(1)
        rate = self.apply_gradients(step)
        return {**read, "num_edges": self.size(step), "learning_rate": rate}

    @staticmethod
    def scores(graph: CircuitGraph, state: Mapping[str, Tensor]) -> Tensor:
        sizes = {"edge": graph.num_edges, "writer": graph.num_writers, "reader": len(graph.readers)}
        check_shapes(state, {kind: (size,) for kind, size in sizes.items()})
        return sum_scores(edge_cells(graph), *(state[kind] for kind in sizes))


@lru_cache(maxsize=1)
def edge_cells(graph: CircuitGraph) -> Tensor:
    """[edge], where an edge lies in a flattened [reader, writer] matrix. Do not change it."""
    writers, readers = map(torch.tensor, (graph.edge_writers(), graph.edge_readers()))
    return readers * graph.num_writers + writers


def sum_scores(cells: Tensor, edge: Tensor, writer: Tensor, reader: Tensor) -> Tensor:
    """The scores, [edge]: an edge's own term, its writer's and its reader's.

    Args:
        cells: from `edge_cells`.
        edge, writer, reader: [edge], [writer] and [reader], the terms.
    """
    return edge + (reader[:, None] + writer).flatten()[cells]


def log_odds_of_ranks(ranking: Tensor) -> Tensor:
    """log(q / (1 - q)), [edge], where q is the fraction of the edges that rank lower.

    Args:
        ranking: [edge], the edges from best to worst.
    """
    quantiles = (torch.arange(len(ranking), 0, -1) - 0.5) / len(ranking)
    return torch.empty(len(ranking)).index_copy(0, ranking, torch.logit(quantiles))


def soft_top_k(scores: Tensor, k: float, temperature: float) -> Tensor:
    """Gates g_e = sigmoid((s_e - tau) / T), [edge], whose sum is k.

    tau is found by bisection, hence without waiting for the device.

    Args:
        scores: [edge].
        k: 0 < k <= number of edges.
        temperature: T > 0; as it approaches 0, the k highest scores have gate 1 and the others 0.
    """
    low, high = scores.min() - MAX_LOGIT * temperature, scores.max() + MAX_LOGIT * temperature
    for _ in range(NUM_BISECTIONS):
        tau = (low + high) / 2
        is_low = torch.sigmoid((scores - tau) / temperature).sum() > k
        low, high = torch.where(is_low, tau, low), torch.where(is_low, high, tau)
    return torch.sigmoid((scores - high) / temperature)


def grad_scores(grad_gates: Tensor, gates: Tensor) -> Tensor:
    """The gradient for the scores of `soft_top_k`, [edge], times the temperature; it sums to 0.

    tau moves with the scores so that the size stays k. With w_e = g_e (1 - g_e):

        T dL/ds_e = w_e (dL/dg_e - sum_f w_f dL/dg_f / sum_f w_f)

    The subtracted mean is what one more open gate is worth on average.
    """
    slopes = gates * (1 - gates)
    mean = (slopes * grad_gates).sum() / slopes.sum().clamp(min=TINY)
    return slopes * (grad_gates - mean)
