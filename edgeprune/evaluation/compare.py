"""How alike circuits are: shared edges and nodes, agreement with a reference, a consensus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import combinations
from operator import and_, or_
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.graph import Edge


@dataclass(frozen=True)
class Overlap:
    """What two circuits have in common.

    Attributes:
        shared_edges, shared_nodes: counts.
        edge_iou, node_iou: intersection over union, 0 to 1; 1 where both are empty.
        edge_iou_by_chance: what as many edges drawn at random from the whole graph would have.
    """

    shared_edges: int
    edge_iou: float
    edge_iou_by_chance: float
    shared_nodes: int
    node_iou: float

    @classmethod
    def of(cls, a: Circuit, b: Circuit) -> Overlap:
        shared = a & b  # of one graph, or refused
        nodes_a, nodes_b = set(a.nodes), set(b.nodes)
        return cls(
            shared_edges=len(shared),
            edge_iou=iou(a.edge_set, b.edge_set),
            edge_iou_by_chance=iou_by_chance(len(a), len(b), a.graph.num_edges),
            shared_nodes=len(nodes_a & nodes_b),
            node_iou=iou(nodes_a, nodes_b),
        )


@dataclass(frozen=True)
class Agreement:
    """How well a set stands for a reference set; None where there is nothing to divide by.

    Attributes:
        precision: share of what was found that is in the reference.
        recall: share of the reference that was found.
        f1: their harmonic mean, 2 |both| / (|found| + |reference|).
    """

    precision: float | None
    recall: float | None
    f1: float | None

    @classmethod
    def of(cls, found: Set, reference: Set) -> Agreement:
        both = len(found & reference)

        def share(part: float, whole: int) -> float | None:
            return part / whole if whole else None

        return cls(
            share(both, len(found)),
            share(both, len(reference)),
            share(2 * both, len(found) + len(reference)),
        )


def iou(a: Set, b: Set) -> float:
    """Intersection over union; 1 for two empty sets."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def iou_by_chance(a: int, b: int, of: int) -> float:
    """e / (a + b - e): the IoU of sets of a and b of so many, which share e = ab / of by chance."""
    if not a + b:
        return 1.0
    shared = a * b / of
    return shared / (a + b - shared)


def intersection(circuits: Iterable[Circuit]) -> Circuit:
    """The edges that all of at least one circuit have."""
    return reduce(and_, _checked(circuits))


def union(circuits: Iterable[Circuit]) -> Circuit:
    """The edges that any of at least one circuit has."""
    return reduce(or_, _checked(circuits))


def _checked(circuits: Iterable[Circuit]) -> list[Circuit]:
    """As a list. Raises ValueError where there are none, TypeError where one is something else."""
    circuits = list(circuits)
    if not circuits:
        raise ValueError("got no circuits, expected at least one")
    for circuit in circuits:
        Circuit.check(circuit)
    return circuits


def only_in(name: str, circuits: Mapping[str, Circuit]) -> Circuit:
    """The edges of one circuit that no other has."""
    return reduce(lambda a, b: a - b, (c for n, c in circuits.items() if n != name), circuits[name])


def times_kept(circuits: Sequence[Circuit]) -> Counter[Edge]:
    """For every edge that any circuit has, how many have it; by count, then in the graph's order.

    Raises:
        ValueError: there are no circuits, or of different graphs.
    """
    circuits = _checked(circuits)
    counts = Counter(edge for circuit in circuits for edge in circuit.edge_set)
    order = {edge: index for index, edge in enumerate(union(circuits).edges)}
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], order[item[0]]))))


def consensus(circuits: Sequence[Circuit]) -> Circuit:
    """The edges that more than half of at least one circuit have."""
    circuits = _checked(circuits)
    kept = {edge for edge, count in times_kept(circuits).items() if 2 * count > len(circuits)}
    return Circuit(circuits[0].graph, frozenset(kept))


def compare(circuits: Mapping[str, Circuit], reference: str | None = None) -> dict[str, Any]:
    """Sizes, overlaps of every two circuits, and agreement with a reference, as plain values.

    Under `connected` each circuit counts with the edges that do not dangle in it; what these share
    may be more than what does not dangle in the intersection.

    Args:
        circuits: at least one, by name, of one graph.
        reference: the name of the circuit by which the others are measured.

    Raises:
        ValueError: there are no circuits, or of different graphs, or none has the reference's name.
    """
    if not isinstance(circuits, Mapping):
        raise TypeError(
            f"got a {type(circuits).__name__}, expected circuits by name, such as "
            "{'one': a, 'other': b}"
        )
    _checked(circuits.values())
    if reference is not None and reference not in circuits:
        raise ValueError(f"unknown reference {reference!r}; choose {', '.join(circuits)}")
    connected = {name: circuit.without_dangling() for name, circuit in circuits.items()}
    result: dict[str, Any] = {
        "circuits": {
            name: {**circuit.sizes(), "num_nodes": len(circuit.nodes),
                   "only_here": len(only_in(name, circuits))}
            for name, circuit in circuits.items()
        },
        "intersection": intersection(circuits.values()).sizes(),
        "union": union(circuits.values()).sizes(),
        "connected": {
            "intersection": len(intersection(connected.values())),
            "union": len(union(connected.values())),
            "only_here": {name: len(only_in(name, connected)) for name in connected},
        },
        "pairs": [
            {"a": a, "b": b, **asdict(Overlap.of(circuits[a], circuits[b])),
             "connected": asdict(Overlap.of(connected[a], connected[b]))}
            for a, b in combinations(circuits, 2)
        ],
    }  # fmt: skip
    if reference is not None:
        true = circuits[reference]
        result["reference"] = reference
        result["agreement"] = {
            name: {
                "edges": asdict(Agreement.of(circuit.edge_set, true.edge_set)),
                "nodes": asdict(Agreement.of(set(circuit.nodes), set(true.nodes))),
            }
            for name, circuit in circuits.items()
            if name != reference
        }
    return result
