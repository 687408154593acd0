"""Scores and circuits from the saved state of a method that learns log alphas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgeprune.circuit import Circuit
from edgeprune.errors import CheckpointError
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete
from edgeprune.scores import EdgeScores


def scores_from_state(
    graph: CircuitGraph, state: Mapping[str, Tensor], origin: Mapping[str, Any]
) -> EdgeScores:
    """The log odds of p = sigmoid(edge log alpha): without node gates, log alpha itself.

    With node gates p is multiplied by sigmoid(log alpha of the writer).

    Raises:
        CheckpointError: the state does not fit the graph.
    """
    log_alpha = _log_alphas(graph, state)
    if "node" not in log_alpha:
        return EdgeScores(graph, log_alpha["edge"], origin=origin)
    edge, node = (logsigmoid(x.double()) for x in log_alpha.values())
    log_p = edge + node[torch.tensor(graph.edge_writers())]
    return EdgeScores(graph, log_p - torch.log(-torch.expm1(log_p)), origin=origin)


def circuit_by_threshold(
    graph: CircuitGraph, state: Mapping[str, Tensor]
) -> tuple[Circuit, dict[str, float]]:
    """The circuit of a saved state whose size is not given, as published, and its thresholds.

    The thresholds, `edge` and with node gates `node`, are chosen such that the binary gates are as
    sparse as the deterministic ones.
    """
    gates = deterministic_gates(graph, state)
    thresholds = {kind: hard_concrete.search_threshold(x) for kind, x in gates.items()}
    return circuit_above(graph, gates, thresholds), thresholds


def deterministic_gates(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; see `hard_concrete.deterministic`."""
    groups = {"edge": graph.gate_groups(), "node": graph.node_groups()}
    log_alpha = _log_alphas(graph, state)
    return {kind: hard_concrete.deterministic(x, groups[kind]) for kind, x in log_alpha.items()}


def circuit_above(
    graph: CircuitGraph, gates: Mapping[str, Tensor], thresholds: Mapping[str, float]
) -> Circuit:
    """The edges whose gate and, with node gates, whose writer's gate are above the thresholds."""
    kept = gates["edge"] > thresholds["edge"]
    if "node" in gates:
        kept &= (gates["node"] > thresholds["node"])[torch.tensor(graph.edge_writers())]
    return Circuit.from_mask(graph, kept.tolist())


def _log_alphas(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; float32 on the CPU."""
    counts = {"edge": graph.num_edges}
    if "node_log_alpha" in state:
        counts["node"] = graph.num_writers
    check_shapes(state, {f"{kind}_log_alpha": (count,) for kind, count in counts.items()})
    return {kind: state[f"{kind}_log_alpha"].detach().cpu() for kind in counts}


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the state has tensors of these names and shapes."""
    for name, shape in shapes.items():
        found = list(state[name].shape) if name in state else "missing"
        if found != list(shape):
            raise CheckpointError(
                f"the checkpoint does not fit: {name} is {found}, expected shape {list(shape)}; it "
                "belongs to another graph or another method"
            )
