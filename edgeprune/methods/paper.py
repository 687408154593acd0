"""Edge Pruning as published (Bhaskar et al. 2024, arXiv:2406.16778).

Learned Lagrange multipliers drive the gates to a target sparsity. Nodes may have gates as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgeprune.circuit import Circuit
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete
from edgeprune.methods.learning import (
    TargetSchedule,
    check_shapes,
    initial_log_alpha,
    learning_rate_factor,
    load_state,
    read_finite,
    state_of,
)
from edgeprune.scores import EdgeScores

log = logging.getLogger("edgeprune")

MAX_OPEN_RATIO = 2.0
"""After a successful run at most this many gates are open per edge of the circuit."""


class Lagrangian:
    """loss = distance + lambda_1 (s - t) + lambda_2 (s - t)^2, the lambdas being maximised.

    s is the sparsity of the step's sampled gates, t its target. Both multipliers start at 0;
    lambda_1 may become negative. Node gates have a target and multipliers of their own.

    Args:
        graph: the graph whose edges are scored.
        seed: seed of the initial values and of the noise of every step.
        device: where the parameters are.
        steps: number of optimisation steps of the whole run.
        learning_rate: peak learning rate of log alpha.
        weight_decay: AdamW's, of log alpha and the multipliers.
        adam_epsilon: AdamW's epsilon.
        lambda_learning_rate: peak learning rate of the multipliers.
        lr_warmup_steps: steps of linear warm-up of both learning rates.
        start_sparsity, target_sparsity: target at the start and after the warm-up; it may exceed 1.
        sparsity_warmup_steps: steps over which the targets rise.
        warmup: shape of that rise, "linear" or "logarithmic".
        node_gates: whether writers have gates too.
        start_node_sparsity, target_node_sparsity: the same for the node gates.
        init_mean, init_std: log alphas start at N(init_mean, init_std).
    """

    def __init__(
        self,
        graph: CircuitGraph,
        *,
        seed: int,
        device: torch.device | str,
        steps: int,
        learning_rate: float,
        weight_decay: float,
        adam_epsilon: float,
        lambda_learning_rate: float,
        lr_warmup_steps: int,
        start_sparsity: float,
        target_sparsity: float,
        sparsity_warmup_steps: int,
        warmup: str,
        node_gates: bool,
        start_node_sparsity: float,
        target_node_sparsity: float,
        init_mean: float,
        init_std: float,
    ) -> None:
        self.graph, self.seed = graph, seed
        self._steps, self._lr_warmup_steps = steps, lr_warmup_steps
        self._learning_rates = (learning_rate, lambda_learning_rate)
        self._edge_writers = torch.tensor(graph.edge_writers(), dtype=torch.long, device=device)
        counts = {"edge": graph.num_edges}
        ends = {"edge": (start_sparsity, target_sparsity)}
        if node_gates:
            counts["node"] = graph.num_writers
            ends["node"] = (start_node_sparsity, target_node_sparsity)
        generator = torch.Generator().manual_seed(seed)
        self._log_alpha = {
            kind: initial_log_alpha(count, init_mean, init_std, generator, device)
            for kind, count in counts.items()
        }
        self._targets = {
            kind: TargetSchedule(*end, sparsity_warmup_steps, warmup) for kind, end in ends.items()
        }
        self._lambdas = {
            f"{kind}.{name}": torch.zeros((), device=device, requires_grad=True)
            for kind in counts
            for name in ("lambda_1", "lambda_2")
        }
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(self._log_alpha.values())},
                {"params": list(self._lambdas.values()), "maximize": True},
            ],
            lr=learning_rate,
            eps=adam_epsilon,
            weight_decay=weight_decay,
        )

    def gates(self, step: int) -> Tensor:
        """See `Method.gates`. With node gates, each edge's gate times that of its writer.

        A gated writer carries n x + (1 - n) c instead of x; what an edge then carries differs from
        the corrupted value c by g n (x - c), so the two gates multiply.
        """
        counts = tuple(len(log_alpha) for log_alpha in self._log_alpha.values())
        noise = hard_concrete.uniform_noise(self.seed, step, counts)
        self._sampled = {
            kind: hard_concrete.sample(log_alpha, u.to(log_alpha.device, non_blocking=True))
            for (kind, log_alpha), u in zip(self._log_alpha.items(), noise, strict=True)
        }
        self._product = self._sampled["edge"]
        if "node" in self._sampled:
            self._product = self._product * self._sampled["node"][self._edge_writers]
        return self._product.detach()

    def update(self, step: int, distance: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        """See `Method.update`."""
        sparsity = {kind: hard_concrete.sparsity(g) for kind, g in self._sampled.items()}
        targets = {kind: schedule.at(step) for kind, schedule in self._targets.items()}
        loss = distance
        for kind in sparsity:
            lambdas = (self._lambdas[f"{kind}.lambda_{i}"] for i in (1, 2))
            loss = loss + penalty(*lambdas, sparsity[kind], targets[kind])
        read = read_finite(grad_gates, loss=loss, distance=distance, **sparsity, **self._lambdas)
        learning_rate = self._set_learning_rates(step)
        self._optimizer.zero_grad(set_to_none=True)
        self._product.backward(grad_gates, retain_graph=True)
        loss.backward()
        self._optimizer.step()
        return {
            "loss": read["loss"],
            "distance": read["distance"],
            "sparsity": read["edge"],
            "target": targets["edge"],
            "node_sparsity": read.get("node"),
            "node_target": targets.get("node"),
            "lambda_1": read["edge.lambda_1"],
            "lambda_2": read["edge.lambda_2"],
            "learning_rate": learning_rate,
        }

    def _set_learning_rates(self, step: int) -> float:
        factor = learning_rate_factor(step, self._steps, self._lr_warmup_steps)
        for group, peak in zip(self._optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = peak * factor
        return self._learning_rates[0] * factor

    def scores(self) -> EdgeScores:
        """See `scores_from_state`."""
        return scores_from_state(self.graph, self.state_dict())

    def _parameters(self) -> dict[str, Tensor]:
        return {f"{k}_log_alpha": v for k, v in self._log_alpha.items()} | self._lambdas

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method.state_dict`; also contains what `scores_from_state` needs."""
        return state_of(self._parameters(), self._optimizer)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Method.load_state_dict`."""
        load_state(self._parameters(), self._optimizer, state)


def penalty(lambda_1: Tensor, lambda_2: Tensor, sparsity: Tensor, target: float) -> Tensor:
    """lambda_1 (s - t) + lambda_2 (s - t)^2, the Lagrangian relaxation of s = t."""
    excess = sparsity - target
    return lambda_1 * excess + lambda_2 * excess**2


# ---------------------------------------------------------------------------------- saved states


class Thresholds(NamedTuple):
    """Gates above these are kept; `node` is None without node gates."""

    edge: float
    node: float | None = None


def scores_from_state(
    graph: CircuitGraph, state: Mapping[str, Tensor], origin: Mapping[str, Any] | None = None
) -> EdgeScores:
    """Scores from a saved state of a method that learns log alphas.

    A score is the log odds of p = sigmoid(edge log alpha), times sigmoid(log alpha of its writer)
    with node gates; without, that is log alpha itself.

    Raises:
        CheckpointError: the state does not fit the graph.
    """
    log_alpha = _log_alphas(graph, state)
    origin = origin or {"method": "paper"}
    if "node" not in log_alpha:
        return EdgeScores(graph, log_alpha["edge"], origin=origin)
    edge, node = (logsigmoid(x.double()) for x in log_alpha.values())
    log_p = edge + node[torch.tensor(graph.edge_writers())]
    return EdgeScores(graph, log_p - torch.log(-torch.expm1(log_p)), origin=origin)


def circuit_by_threshold(
    graph: CircuitGraph, state: Mapping[str, Tensor]
) -> tuple[Circuit, Thresholds]:
    """The circuit of a saved state whose size is not given, as published.

    Thresholds are chosen such that the binary gates are as sparse as the deterministic ones.

    Raises:
        CheckpointError: the state does not fit the graph.
    """
    gates = deterministic_gates(graph, state)
    thresholds = Thresholds(*map(hard_concrete.search_threshold, gates.values()))
    return circuit_above(graph, gates, thresholds), thresholds


def deterministic_gates(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; see `hard_concrete.deterministic`."""
    groups = {"edge": graph.gate_groups(), "node": graph.node_groups()}
    log_alpha = _log_alphas(graph, state)
    return {kind: hard_concrete.deterministic(x, groups[kind]) for kind, x in log_alpha.items()}


def circuit_above(
    graph: CircuitGraph, gates: Mapping[str, Tensor], thresholds: Thresholds
) -> Circuit:
    """The edges whose gate and, with node gates, whose writer's gate are above the thresholds."""
    kept = gates["edge"] > thresholds.edge
    if "node" in gates:
        kept &= (gates["node"] > thresholds.node)[torch.tensor(graph.edge_writers())]
    return Circuit.from_mask(graph, kept.tolist())


def _log_alphas(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; float32 on the CPU."""
    shapes = {"edge": (graph.num_edges,)}
    if "node_log_alpha" in state:
        shapes["node"] = (graph.num_writers,)
    check_shapes(state, {f"{kind}_log_alpha": shape for kind, shape in shapes.items()})
    return {kind: state[f"{kind}_log_alpha"].detach().cpu() for kind in shapes}


def warn_if_unfinished(sparsity: float, requested: float) -> None:
    """Warn if the gates are not yet about as sparse as the circuit that is cut from them.

    Args:
        sparsity: sparsity of the last step's gates.
        requested: sparsity of the circuit.
    """
    if 1 - sparsity > MAX_OPEN_RATIO * (1 - requested):
        log.warning(
            f"the gates have only become {sparsity:.1%} sparse, so a circuit that is "
            f"{requested:.1%} sparse leaves out edges they rely on; take more steps, or use the "
            "settings of trainer=fast"
        )
