"""Compare circuits: shared edges and nodes, agreement with a reference, and a consensus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import combinations
from operator import and_, or_
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.evaluation.table import Table
from edgeprune.graph import Edge

MAX_PAIRS = 15
"""Tables show at most this many pairs of circuits; `compare` returns all."""


@dataclass(frozen=True)
class Overlap:
    """What two circuits have in common.

    Attributes:
        shared_edges, shared_nodes: number of edges and nodes in both.
        edge_iou, node_iou: intersection over union, in [0, 1]; 1 if both are empty.
        edge_iou_by_chance: expected for as many edges drawn at random from the whole graph.
    """

    shared_edges: int
    edge_iou: float
    edge_iou_by_chance: float
    shared_nodes: int
    node_iou: float

    @classmethod
    def of(cls, a: Circuit, b: Circuit) -> Overlap:
        """Raises ValueError if the circuits belong to different graphs."""
        nodes_a, nodes_b = set(a.nodes), set(b.nodes)
        return cls(
            shared_edges=len(a & b),
            edge_iou=iou(a.edge_set, b.edge_set),
            edge_iou_by_chance=iou_by_chance(len(a), len(b), a.graph.num_edges),
            shared_nodes=len(nodes_a & nodes_b),
            node_iou=iou(nodes_a, nodes_b),
        )


@dataclass(frozen=True)
class Agreement:
    """How well a set matches a reference set; None where the denominator is 0.

    Attributes:
        precision: fraction of the found elements that are in the reference.
        recall: fraction of the reference that was found.
        f1: harmonic mean of the two, 2 |both| / (|found| + |reference|).
    """

    precision: float | None
    recall: float | None
    f1: float | None

    @classmethod
    def of(cls, found: Set, reference: Set) -> Agreement:
        both = len(found & reference)
        ratios = (
            (both, len(found)),
            (both, len(reference)),
            (2 * both, len(found) + len(reference)),
        )
        return cls(*(part / whole if whole else None for part, whole in ratios))


def iou(a: Set, b: Set) -> float:
    """Intersection over union; 1 for two empty sets."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def iou_by_chance(a: int, b: int, of: int) -> float:
    """e / (a + b - e): IoU of random subsets of sizes a and b that share e = a * b / `of`."""
    if not a + b:
        return 1.0
    shared = a * b / of
    return shared / (a + b - shared)


def intersection(circuits: Iterable[Circuit]) -> Circuit:
    """The edges that all circuits have."""
    return reduce(and_, circuits)


def union(circuits: Iterable[Circuit]) -> Circuit:
    """The edges that at least one circuit has."""
    return reduce(or_, circuits)


def only_in(name: str, circuits: Mapping[str, Circuit]) -> Circuit:
    """The edges of one circuit that no other has."""
    return reduce(lambda a, b: a - b, (c for n, c in circuits.items() if n != name), circuits[name])


def times_kept(circuits: Sequence[Circuit]) -> Counter[Edge]:
    """The number of circuits that have each edge; sorted by number, then in the graph's order."""
    counts = Counter(edge for circuit in circuits for edge in circuit.edge_set)
    return Counter(
        {edge: counts[edge] for edge in sorted(union(circuits).edges, key=lambda e: -counts[e])}
    )


def consensus(circuits: Sequence[Circuit]) -> Circuit:
    """The edges that more than half of the circuits have."""
    kept = {edge for edge, count in times_kept(circuits).items() if 2 * count > len(circuits)}
    return Circuit(circuits[0].graph, frozenset(kept))


def compare(circuits: Mapping[str, Circuit], reference: str | None = None) -> dict[str, Any]:
    """Sizes, overlap of each pair of circuits, and agreement with a reference, as JSON values.

    The entries `connected` compare the circuits without their dangling edges. An edge can dangle in
    one circuit and not in another, so they cannot be derived from the other entries.

    Args:
        circuits: at least one, by name, all of one graph.
        reference: name of the circuit to which the others are compared.

    Raises:
        ValueError: there are no circuits, they belong to different graphs, or none has the
            reference's name.
    """
    if not circuits:
        raise ValueError("got no circuits, expected at least one")
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
        result["reference"] = reference
        result["agreement"] = {
            name: _agreement(circuit, circuits[reference])
            for name, circuit in circuits.items()
            if name != reference
        }
    return result


def _agreement(circuit: Circuit, reference: Circuit) -> dict[str, Any]:
    return {
        "edges": asdict(Agreement.of(circuit.edge_set, reference.edge_set)),
        "nodes": asdict(Agreement.of(set(circuit.nodes), set(reference.nodes))),
    }


# ---------------------------------------------------------------------------------- for the reader


def comparison_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of what `compare` returned."""
    pairs = result["pairs"]
    tables = [
        _sizes_table(result),
        _overlaps_table("overlap of all edges", pairs),
        _overlaps_table(
            "overlap of connected edges", [{**pair, **pair["connected"]} for pair in pairs]
        ),
    ]
    if "reference" in result:
        tables.append(_agreement_table(result))
    return tables


def _sizes_table(result: Mapping[str, Any]) -> Table:
    connected, rows = result["connected"], []
    for name, size in result["circuits"].items():
        own = size["without_dangling"]
        rows.append([
            name, f"{size['num_edges']:,}", f"{size['sparsity']:.4f}", f"{size['num_nodes']:,}",
            f"{size['only_here']:,}", f"{own['num_edges']:,}", f"{own['num_nodes']:,}",
            f"{connected['only_here'][name]:,}",
        ])  # fmt: skip
    for key in ("intersection", "union"):
        size = result[key]
        rows.append([
            key, f"{size['num_edges']:,}", f"{size['sparsity']:.4f}", "", "",
            f"{connected[key]:,}", "", "",
        ])  # fmt: skip
    return Table(
        ["", "edges", "sparsity", "nodes", "only\nhere", "connected\nedges", "nodes", "only\nhere"],
        rows,
        f"circuits, of {result['union']['all_edges']:,} edges; connected edges lie on a path from "
        "the input to the output",
    )


def _overlaps_table(title: str, pairs: Sequence[Mapping[str, Any]]) -> Table:
    if len(pairs) > MAX_PAIRS:
        ious = [pair["edge_iou"] for pair in pairs]
        title += (
            f"; the first {MAX_PAIRS} of {len(pairs)} pairs; edge IoU {min(ious):.3f} to "
            f"{max(ious):.3f}, mean {sum(ious) / len(ious):.3f}"
        )
    rows = [
        [pair["a"], pair["b"], f"{pair['shared_edges']:,}", f"{pair['edge_iou']:.3f}",
         f"{pair['edge_iou_by_chance']:.3f}", f"{pair['shared_nodes']:,}",
         f"{pair['node_iou']:.3f}"]
        for pair in pairs[:MAX_PAIRS]
    ]  # fmt: skip
    columns = ["", "", "shared\nedges", "edge IoU", "by\nchance", "shared\nnodes", "node IoU"]
    return Table(columns, rows, title)


def _agreement_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, agreement in result["agreement"].items():
        values = [*agreement["edges"].values(), *agreement["nodes"].values()]
        rows.append([name, *("–" if value is None else f"{value:.3f}" for value in values)])
    columns = ["", "edges:\nprecision", "recall", "F1", "nodes:\nprecision", "recall", "F1"]
    return Table(columns, rows, f"agreement with {result['reference']}")
