"""Cutting a circuit's nodes and edges one at a time: what is cut, and which predictions change."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.metrics import SAME_NUMBER, ExampleMetrics


class Cut(NamedTuple):
    """Edges that are cut together."""

    kind: str  # "node" or "edge"
    name: str  # of the node; or writer and reader with a space between
    edges: list[int]  # by number; a node's are those that leave it


def cuts_of(circuit: Circuit, ranking: Sequence[int]) -> list[Cut]:
    """The nodes and then the edges of a circuit, each in the order of a ranking of all edges.

    A node is cut by cutting its edges to others. Edges that dangle are left out.
    """
    graph = circuit.graph
    connected = {graph.edge_index(edge): edge for edge in circuit.without_dangling().edge_set}
    ranked = [index for index in ranking if index in connected]
    from_node: dict[str, list[int]] = {}
    for index in ranked:
        from_node.setdefault(connected[index][0], []).append(index)
    nodes = [Cut("node", writer, edges) for writer, edges in from_node.items()]
    return [*nodes, *(Cut("edge", " ".join(connected[index]), [index]) for index in ranked)]


def flips(before: ExampleMetrics, after: ExampleMetrics) -> list[Tensor]:
    """Per example, [predicted], whether a prediction is another one after a cut."""
    both = zip(before.predicted, after.predicted, strict=True)
    return [(a - b).abs() > SAME_NUMBER for a, b in both]


def num_flips(before: ExampleMetrics, after: ExampleMetrics) -> int:
    """Number of examples of which a prediction is another one after a cut."""
    return sum(bool(changed.any()) for changed in flips(before, after))
