"""From learned masks to a circuit of the size asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.config import check_size, edges_left
from edgeprune.methods.masks import CircuitMasks, Thresholds


@dataclass(frozen=True)
class Export:
    """A circuit and how it was chosen.

    Attributes:
        circuit: the kept edges, dangling ones among them.
        thresholds: of the binary search; None when the size was asked for.
        ranking: the numbers of all edges, the most important first.
    """

    circuit: Circuit
    thresholds: Thresholds | None
    ranking: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for circuit.json."""
        return {
            "chosen_by": "size" if self.thresholds is None else "threshold",
            "edge_threshold": None if self.thresholds is None else self.thresholds.edge,
            "node_threshold": None if self.thresholds is None else self.thresholds.node,
            **self.circuit.sizes(),
        }


def export_circuit(
    masks: CircuitMasks, *, sparsity: float | None = None, num_edges: int | None = None
) -> Export:
    """Choose the edges to keep.

    Args:
        masks: learned.
        sparsity: keep exactly this fraction less of the edges, to the nearest whole edge.
        num_edges: or keep exactly so many. Neither: binary search for the threshold at which the
            binary gates are as sparse as the deterministic ones.

    Raises:
        ConfigError: both are given, or one is out of range.
    """
    check_size(sparsity, num_edges)
    if sparsity is not None:
        num_edges = edges_left(sparsity, masks.graph.num_edges)
    if num_edges is not None:
        return Export(masks.circuit_of_size(num_edges), None, masks.ranking())
    thresholds = masks.thresholds()
    return Export(masks.circuit_above(thresholds), thresholds, masks.ranking())
