"""Compare circuits: shared edges and nodes, agreement with a reference, and a consensus."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from functools import reduce
from itertools import combinations
from operator import and_, or_, sub
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.evaluation.table import Table
from edgeprune.graph import Edge


def overlap(a: Circuit, b: Circuit) -> dict[str, float]:
    """What two circuits have in common, by edges and by nodes.

    The intersection over union (IoU) is in [0, 1], and 1 if both are empty. `edge_iou_by_chance` is
    about what is expected of as many edges drawn at random: of A and B edges out of N,
    e = A * B / N are shared on average, so it is e / (A + B - e).

    Raises ValueError if the circuits belong to different graphs.
    """
    nodes_a, nodes_b = set(a.nodes), set(b.nodes)
    by_chance = len(a) * len(b) / a.graph.num_edges
    return {
        "shared_edges": len(a & b),
        "edge_iou": _ratio(len(a & b), len(a | b), 1.0),
        "edge_iou_by_chance": _ratio(by_chance, len(a) + len(b) - by_chance, 1.0),
        "shared_nodes": len(nodes_a & nodes_b),
        "node_iou": _ratio(len(nodes_a & nodes_b), len(nodes_a | nodes_b), 1.0),
    }


def agreement(found: Set, reference: Set) -> dict[str, float | None]:
    """How well a set matches a reference set: precision, recall, and f1, their harmonic mean.

    Each is in [0, 1], or None where its denominator is 0.
    """
    both = len(found & reference)
    return {
        "precision": _ratio(both, len(found)),
        "recall": _ratio(both, len(reference)),
        "f1": _ratio(2 * both, len(found) + len(reference)),
    }


def _ratio(part: float, whole: float, undefined: float | None = None) -> float | None:
    return part / whole if whole else undefined


def parts(circuits: Mapping[str, Circuit]) -> dict[str, Circuit]:
    """The `intersection` and `union` of circuits, and as `only-NAME` the edges of one alone."""
    every = circuits.values()
    found = {"intersection": reduce(and_, every), "union": reduce(or_, every)}
    for name, circuit in circuits.items():
        others = (other for key, other in circuits.items() if key != name)
        found[f"only-{name}"] = reduce(sub, others, circuit)
    return found


def times_kept(circuits: Sequence[Circuit]) -> dict[Edge, int]:
    """The number of circuits that have each edge; sorted by number, then in the graph's order."""
    counts = Counter(edge for circuit in circuits for edge in circuit.edge_set)
    edges = sorted(reduce(or_, circuits).edges, key=lambda edge: -counts[edge])
    return {edge: counts[edge] for edge in edges}


def consensus(circuits: Sequence[Circuit]) -> Circuit:
    """The edges that more than half of the circuits have; errors as for `compare`."""
    _check(circuits)
    kept = {edge for edge, count in times_kept(circuits).items() if 2 * count > len(circuits)}
    return Circuit(circuits[0].graph, frozenset(kept))


def compare(circuits: Mapping[str, Circuit], reference: str | None = None) -> dict[str, Any]:
    """Sizes, overlap of each pair, agreement with the circuit named `reference`; as JSON values.

    The entries `connected` compare the circuits without their dangling edges. An edge can dangle in
    one circuit and not in another, so they cannot be derived from the other entries.

    Raises KeyError if no circuit has the reference's name, ValueError if `circuits` is empty or the
    graphs differ, and TypeError if it does not map names to circuits.
    """
    if not isinstance(circuits, Mapping):
        raise TypeError(f"got a {type(circuits).__name__}, expected circuits by name: {{'a': ...}}")
    _check(circuits.values())
    connected = {name: circuit.without_dangling() for name, circuit in circuits.items()}
    whole, alive = parts(circuits), parts(connected)
    result: dict[str, Any] = {
        "circuits": {
            name: circuit.sizes()
            | {"num_nodes": len(circuit.nodes), "only_here": len(whole[f"only-{name}"])}
            for name, circuit in circuits.items()
        },
        "intersection": whole["intersection"].sizes(),
        "union": whole["union"].sizes(),
        "connected": {
            "intersection": len(alive["intersection"]),
            "union": len(alive["union"]),
            "only_here": {name: len(alive[f"only-{name}"]) for name in circuits},
        },
        "pairs": [
            {"a": a, "b": b}
            | overlap(circuits[a], circuits[b])
            | {"connected": overlap(connected[a], connected[b])}
            for a, b in combinations(circuits, 2)
        ],
    }
    if reference is not None:
        known, others = circuits[reference], [name for name in circuits if name != reference]
        edges = {name: agreement(circuits[name].edge_set, known.edge_set) for name in others}
        nodes = {name: agreement(set(circuits[name].nodes), set(known.nodes)) for name in others}
        result["reference"] = reference
        result["agreement"] = {n: {"edges": edges[n], "nodes": nodes[n]} for n in others}
    return result


def _check(circuits: Collection[Circuit]) -> None:
    """Raise ValueError if there are none, and TypeError if one of them is not a circuit."""
    if not circuits:
        raise ValueError("got no circuits; give at least one")
    for circuit in circuits:
        Circuit.check(circuit)


def kinds_of_heads(
    labels: Mapping[str, Sequence[str]], circuits: Mapping[str, Circuit]
) -> dict[str, dict[str, Any]]:
    """Per kind of head, how many the `model`, each of `circuits`, and `all` of them at once have.

    `labels` are the kinds of each head, such as {"a5.h1": ["induction"]}.
    """
    nodes = {name: set(circuit.nodes) for name, circuit in circuits.items()}
    shared = reduce(and_, nodes.values())
    heads_of: dict[str, set[str]] = {}
    for head, kinds in labels.items():
        for kind in kinds:
            heads_of.setdefault(kind, set()).add(head)
    return {
        kind: {
            "model": len(heads), "all": len(heads & shared),
            "circuits": {name: len(heads & some) for name, some in nodes.items()},
        }
        for kind, heads in heads_of.items()
    }  # fmt: skip


def comparison_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of what `compare` returned."""
    connected, rows = result["connected"], []
    for name, size in result["circuits"].items():
        own = size["without_dangling"]
        numbers = [size[key] for key in ("num_edges", "num_nodes", "only_here")]
        numbers += [own["num_edges"], own["num_nodes"], connected["only_here"][name]]
        rows.append([name, f"{size['sparsity']:.4f}", *numbers])
    for name in ("intersection", "union"):
        numbers = [result[name]["num_edges"], "", "", connected[name], "", ""]
        rows.append([name, f"{result[name]['sparsity']:.4f}", *numbers])
    columns = "|sparsity|edges|nodes|only\nhere|connected\nedges|nodes|only\nhere"
    whole = result["union"]["all_edges"]
    title = f"circuits, of {whole:,} edges; connected edges lie on a path from input to output"
    tables, pairs = [_table(columns, rows, title)], result["pairs"]
    keys = ("shared_edges", "edge_iou", "edge_iou_by_chance", "shared_nodes", "node_iou")
    columns = "||shared\nedges|edge IoU|by\nchance|shared\nnodes|node IoU"
    for kind, overlaps in (("all", pairs), ("connected", [pair["connected"] for pair in pairs])):
        found = zip(pairs, overlaps, strict=True)
        rows = [[pair["a"], pair["b"], *(shared[key] for key in keys)] for pair, shared in found]
        tables.append(_table(columns, rows, f"overlap of {kind} edges"))
    if "reference" in result:
        columns = "|edges:\nprecision|recall|F1|nodes:\nprecision|recall|F1"
        found = result["agreement"].items()
        rows = [[name, *both["edges"].values(), *both["nodes"].values()] for name, both in found]
        tables.append(_table(columns, rows, f"agreement with {result['reference']}"))
    if "kinds_of_heads" in result:
        found = result["kinds_of_heads"]
        columns = "|".join(["", "in the\nmodel", *result["circuits"], "in all"])
        rows = [[kind, n["model"], *n["circuits"].values(), n["all"]] for kind, n in found.items()]
        tables.append(_table(columns, rows, "kinds of heads (edgeprune heads)"))
    return tables


def _table(columns: str, rows: Sequence[Sequence[Any]], title: str) -> Table:
    def text(value: str | float | None) -> str:
        if isinstance(value, float):
            return f"{value:.3f}"
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else value

    return Table(columns.split("|"), [list(map(text, row)) for row in rows], title)
