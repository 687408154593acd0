"""Cutting a circuit's nodes and edges one at a time: what is cut, and which predictions change."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.metrics import SAME_NUMBER, ExampleMetrics


class Cut(NamedTuple):
    """Edges that are cut together."""

    kind: str  # "node" or "edge"
    name: str  # the node's; or writer and reader, separated by a space
    edges: list[int]  # their numbers; a node's edges are those that leave it


def cuts_of(circuit: Circuit, ranking: Sequence[int]) -> list[Cut]:
    """The nodes and then the edges of a circuit, each in the order of a ranking of all edges.

    A node is cut by cutting all edges that leave it. Dangling edges are left out.
    """
    graph = circuit.graph
    connected = {graph.edge_index(edge): edge for edge in circuit.without_dangling().edge_set}
    ranked = [index for index in ranking if index in connected]
    from_node: dict[str, list[int]] = {}
    for index in ranked:
        from_node.setdefault(connected[index][0], []).append(index)
    nodes = [Cut("node", writer, edges) for writer, edges in from_node.items()]
    return [*nodes, *(Cut("edge", " ".join(connected[index]), [index]) for index in ranked)]


def without(circuit: Circuit, edges: Iterable[int]) -> Circuit:
    """The circuit without some edges, which are given by number."""
    graph = circuit.graph
    return Circuit(graph, circuit.edge_set - {graph.edges[edge] for edge in edges})


def without_nodes(circuit: Circuit, nodes: Iterable[str]) -> Circuit:
    """The circuit without what these nodes write."""
    cut = {*nodes}
    return Circuit(circuit.graph, frozenset(e for e in circuit.edge_set if e[0] not in cut))


def flips(before: ExampleMetrics, after: ExampleMetrics) -> list[Tensor]:
    """Per example, [predicted], whether a cut changes the prediction."""
    both = zip(before.predicted, after.predicted, strict=True)
    return [(a - b).abs() > SAME_NUMBER for a, b in both]


def num_flips(before: ExampleMetrics, after: ExampleMetrics) -> int:
    """Number of examples of which a cut changes any prediction."""
    return sum(bool(changed.any()) for changed in flips(before, after))
