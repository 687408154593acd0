"""CircuitMasks: the log alphas of a graph's edges (and nodes), and the gates they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from edgeprune.circuit import Circuit
from edgeprune.config import TrainerConfig, check_num_edges
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete


@dataclass(frozen=True)
class Gates:
    """Gates of one forward pass.

    Attributes:
        edge: [edge] in [0, 1], in the graph's order.
        node: [writer] in [0, 1], or None without node gates.
    """

    edge: Tensor
    node: Tensor | None = None


@dataclass(frozen=True)
class Thresholds:
    """Gates above are kept; `node` is None without node gates."""

    edge: float
    node: float | None


class CircuitMasks(nn.Module):
    """One log alpha an edge and, if asked, one a writer.

    Args:
        graph: names and counts the gates.
        node_gates: whether writers have gates of their own.
        init_mean, init_std: log alphas start at N(init_mean, init_std).
        seed: of the start and of every step's noise.
    """

    def __init__(
        self,
        graph: CircuitGraph,
        *,
        node_gates: bool = False,
        init_mean: float = TrainerConfig.init_mean,
        init_std: float = TrainerConfig.init_std,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.seed = seed
        noise = torch.Generator().manual_seed(seed)

        def start(count: int) -> nn.Parameter:
            return nn.Parameter(init_mean + init_std * torch.randn(count, generator=noise))

        self.edge_log_alpha = start(graph.num_edges)
        self.node_log_alpha = start(graph.num_writers) if node_gates else None
        self._noise: tuple[int, list[Tensor]] | None = None  # the latest step's
        self.register_buffer(
            "edge_writers", torch.tensor(graph.edge_writers(), dtype=torch.long), persistent=False
        )

    def sample(self, step: int) -> Gates:
        """Training gates of one step: the same on every process and on every repetition.

        The noise comes from a CPU generator seeded by (seed, step), so it does not depend on the
        device, on the number of processes or on what ran before.
        """
        return Gates(*(hard_concrete.sample(*kind) for kind in self._with_noise(step)))

    @torch.no_grad()
    def shift(self, step: int, edge: float | None, node: float | None) -> None:
        """Shift all log alphas of a kind by one number, so that a step's gates are so sparse.

        Args:
            step: see `sample`.
            edge, node: sparsity of the kind, in [0, 1]; None: it stays as it is.
        """
        for kind, target in zip(self._with_noise(step), (edge, node), strict=False):
            if target is not None:
                kind[0].add_(hard_concrete.shift_to_sparsity(*kind, target))

    @torch.no_grad()
    def project_gradients(self, gates: Gates, edge: float | None, node: float | None) -> None:
        """Make the gradients of log alpha those of shifted gates, see `gates.project`.

        Args:
            gates: as sampled, with gradients.
            edge, node: see `shift`; None: the gradients stay as they are.
        """
        for name, target in (("edge", edge), ("node", node)):
            if target is not None:
                log_alpha = getattr(self, f"{name}_log_alpha")
                log_alpha.grad = hard_concrete.project(getattr(gates, name).grad, log_alpha)

    def _with_noise(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Log alphas of the edges and, with node gates, of the nodes, each with its noise."""
        if self._noise is None or self._noise[0] != step:  # asked for twice: to hold and to sample
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            low, high = hard_concrete.EPSILON, 1 - hard_concrete.EPSILON
            shapes = [log_alpha.shape for log_alpha in self.parameters()]
            drawn = [torch.rand(s, generator=generator) * (high - low) + low for s in shapes]
            self._noise = step, drawn
        pairs = zip(self.parameters(), self._noise[1], strict=True)
        return [(log_alpha, u.to(log_alpha.device, non_blocking=True)) for log_alpha, u in pairs]

    @torch.no_grad()
    def deterministic(self) -> Gates:
        """Noise-free gates for evaluation (see `gates.deterministic`)."""
        edge = hard_concrete.deterministic(self.edge_log_alpha, self.graph.gate_groups())
        node = None
        if self.node_log_alpha is not None:
            node = hard_concrete.deterministic(self.node_log_alpha, self.graph.node_groups())
        return Gates(edge, node)

    def thresholds(self) -> Thresholds:
        """By binary search: binary gates as sparse as the deterministic ones."""
        gates = self.deterministic()
        node = None if gates.node is None else hard_concrete.search_threshold(gates.node)
        return Thresholds(hard_concrete.search_threshold(gates.edge), node)

    @torch.no_grad()
    def circuit_above(self, thresholds: Thresholds) -> Circuit:
        """The edges whose gate and, with node gates, writer's gate are above the thresholds."""
        gates = self.deterministic()
        kept = gates.edge > thresholds.edge
        if gates.node is not None:
            kept &= (gates.node > thresholds.node)[self.edge_writers]
        return Circuit.from_mask(self.graph, kept.tolist())

    @torch.no_grad()
    def circuit_of_size(self, num_edges: int) -> Circuit:
        """The circuit of exactly `num_edges` edges, the first of the `ranking`.

        Raises:
            ConfigError: `num_edges` is negative or more than the graph has.
        """
        check_num_edges(num_edges, self.graph.num_edges)
        kept = torch.zeros(self.graph.num_edges, dtype=torch.bool)
        kept[self.ranking()[:num_edges]] = True
        return Circuit.from_mask(self.graph, kept.tolist())

    @torch.no_grad()
    def ranking(self) -> list[int]:
        """The numbers of all edges by score, the largest first; ties go to the earlier edge."""
        return torch.argsort(self._log_scores(), descending=True, stable=True).tolist()

    @torch.no_grad()
    def scores(self) -> list[float]:
        """[edge] in (0, 1], higher for what matters more: the logistic function of log alpha.

        With node gates, times that of the writer's.
        """
        return self._log_scores().exp().tolist()

    def _log_scores(self) -> Tensor:
        """Logarithms, since numbers near 1 can be told apart in these."""
        edge = logsigmoid(self.edge_log_alpha.cpu().double())
        if self.node_log_alpha is None:
            return edge
        return edge + logsigmoid(self.node_log_alpha.cpu().double())[self.edge_writers.cpu()]


def combined_gates(gates: Gates, edge_writers: Tensor) -> Tensor:
    """[edge], edge gate times the gate of its writer.

    A gated writer carries n x + (1 - n) c in place of x; what an edge then carries differs from the
    corrupted value c by g n (x - c), so the two gates multiply.
    """
    return gates.edge if gates.node is None else gates.edge * gates.node[edge_writers]
