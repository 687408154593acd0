"""Edge Pruning as published (Bhaskar et al. 2024, arXiv:2406.16778).

Learned Lagrange multipliers drive the gates to a target sparsity. Nodes may have gates as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete
from edgeprune.methods.hard_concrete import HardConcrete, log_alphas
from edgeprune.methods.method import read_finite


@dataclass(kw_only=True, eq=False)
class Lagrangian(HardConcrete):
    """loss = objective + lambda_1 (s - t) + lambda_2 (s - t)^2, the lambdas being maximised.

    s is the sparsity of the step's sampled gates, t its target. Both multipliers start at 0;
    lambda_1 may become negative. Node gates have a target and multipliers of their own.

    Attributes:
        lambda_learning_rate: peak learning rate of the multipliers.
        start_sparsity, target_sparsity: target at the start and after the warm-up; it may exceed 1.
        sparsity_warmup_steps, warmup: length and shape of its rise, see `rising_target`.
        node_gates: whether writers have gates too.
        start_node_sparsity, target_node_sparsity: the same for the node gates.
    """

    lambda_learning_rate: float
    start_sparsity: float
    target_sparsity: float
    sparsity_warmup_steps: int
    warmup: str
    node_gates: bool
    start_node_sparsity: float
    target_node_sparsity: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._edge_writers = torch.tensor(self.graph.edge_writers(), device=self.device)
        self._log_alpha = {"edge": self.log_alpha}
        self._ends = {"edge": (self.start_sparsity, self.target_sparsity)}
        if self.node_gates:
            self._log_alpha["node"] = self.new_log_alpha(self.graph.num_writers)
            self._ends["node"] = (self.start_node_sparsity, self.target_node_sparsity)
            self.optimizer.add_param_group({"params": [self._log_alpha["node"]]})
        names = [f"{kind}.lambda_{i}" for kind in self._log_alpha for i in (1, 2)]
        self._lambdas = {x: self.log_alpha.new_zeros((), requires_grad=True) for x in names}
        group = {"params": list(self._lambdas.values()), "lr": self.lambda_learning_rate}
        self.optimizer.add_param_group({**group, "maximize": True})
        self.parameters = {f"{kind}_log_alpha": x for kind, x in self._log_alpha.items()}
        self.parameters |= self._lambdas

    def gates(self, step: int) -> Tensor:
        """See `Method.gates`; with node gates, each edge's gate times that of its writer.

        A gated writer carries n x + (1 - n) c instead of x; what an edge then carries differs from
        the corrupted value c by g n (x - c), so the two gates multiply.
        """
        counts = tuple(map(len, self._log_alpha.values()))
        noise = hard_concrete.uniform_noise(self.seed, step, counts, self.log_alpha.device)
        pairs = zip(self._log_alpha.items(), noise, strict=True)
        self._sampled = {kind: hard_concrete.sample(x, u) for (kind, x), u in pairs}
        self._product = self._sampled["edge"]
        if self.node_gates:
            self._product = self._product * self._sampled["node"][self._edge_writers]
        return self._product.detach()

    def update(self, step: int, objective: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        sparsity = {kind: hard_concrete.sparsity(g) for kind, g in self._sampled.items()}
        rise = self.sparsity_warmup_steps, self.warmup
        targets = {kind: rising_target(step, *ends, *rise) for kind, ends in self._ends.items()}
        loss = objective
        for kind in sparsity:
            lambdas = (self._lambdas[f"{kind}.lambda_{i}"] for i in (1, 2))
            loss = loss + penalty(*lambdas, sparsity[kind], targets[kind])
        read = read_finite(grad_gates, loss=loss, objective=objective, **sparsity, **self._lambdas)
        self._product.backward(grad_gates, retain_graph=True)
        loss.backward()
        return {
            "objective": read["objective"],
            "sparsity": read["edge"],
            "target": targets["edge"],
            "node_sparsity": read.get("node"),
            "node_target": targets.get("node"),
            "lambda_1": read["edge.lambda_1"],
            "lambda_2": read["edge.lambda_2"],
            "loss": read["loss"],
            "learning_rate": self.apply_gradients(step, self.lr_warmup_steps),
        }


def rising_target(step: int, start: float, end: float, warmup_steps: int, shape: str) -> float:
    """The target sparsity of a step: rises over `warmup_steps`, then stays; steps count from 0.

    `shape` is "linear", or "logarithmic": 1 - target falls by the same factor in each step (at once
    if `end` is 1).
    """
    progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if shape == "linear":
        return start + (end - start) * progress
    return 1 - (1 - start) ** (1 - progress) * (1 - end) ** progress


def penalty(lambda_1: Tensor, lambda_2: Tensor, sparsity: Tensor, target: float) -> Tensor:
    """lambda_1 (s - t) + lambda_2 (s - t)^2, the Lagrangian relaxation of s = t."""
    excess = sparsity - target
    return lambda_1 * excess + lambda_2 * excess**2


def circuit_by_threshold(
    graph: CircuitGraph, state: Mapping[str, Tensor]
) -> tuple[Circuit, dict[str, float]]:
    """The circuit of a saved state whose size is not given, as published, and its thresholds.

    The thresholds make the binary gates as sparse as the deterministic ones.
    """
    gates = deterministic_gates(graph, state)
    thresholds = {kind: hard_concrete.search_threshold(x) for kind, x in gates.items()}
    return circuit_above(graph, gates, thresholds), thresholds


def deterministic_gates(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; see `hard_concrete.deterministic`."""
    groups = {"edge": graph.gate_groups(), "node": graph.node_groups()}
    log_alpha = log_alphas(graph, state)
    return {kind: hard_concrete.deterministic(x, groups[kind]) for kind, x in log_alpha.items()}


def circuit_above(
    graph: CircuitGraph, gates: Mapping[str, Tensor], thresholds: Mapping[str, float]
) -> Circuit:
    """The edges whose gate and, with node gates, whose writer's gate are above the thresholds."""
    kept = gates["edge"] > thresholds["edge"]
    if "node" in gates:
        kept &= (gates["node"] > thresholds["node"])[torch.tensor(graph.edge_writers())]
    return Circuit.from_mask(graph, kept.tolist())
