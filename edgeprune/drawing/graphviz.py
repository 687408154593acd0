"""Draw a circuit by Graphviz: embeddings at the bottom, the output at the top.

A head is one box with its Q, K and V inputs below its output; an MLP, an embedding and the output
are one box each. Edges have the colour of the reader they end in. Small circuits are laid out by
Graphviz; large ones, for which that takes minutes and comes out 50 screens wide, on a grid with a
row a layer and a column a head.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import graphviz

from edgeprune.circuit import Circuit
from edgeprune.errors import GraphvizMissing
from edgeprune.files import write_atomically, write_text
from edgeprune.graph import Edge

SUFFIXES = ("pdf", "svg", "png", "dot")

FILL = {
    "tok_embeds": "#8FD0C5", "pos_embeds": "#C9E3B4", "embeds": "#8FD0C5", "mlp": "#F6D58A",
    "head": "#D9DCE3", "q": "#A9C9F0", "k": "#F3B5AE", "v": "#CDB5E6", "output": "#4A4E57",
}  # fmt: skip
"""Box colours by kind of node; light ones, which colour-blind readers can tell apart."""
LINE = {"q": "#2F6FB7", "k": "#C0473B", "v": "#7A4BAA", "mlp": "#B07A0C", "output": "#4A4E57"}
"""Edge colours by kind of reader."""
NAMES = {
    "tok_embeds": "Token embedding", "pos_embeds": "Position embedding", "embeds": "Embedding",
    "resid_post": "Output",
}  # fmt: skip
MANY = 120
"""From so many edges on, nodes lie on a grid and lines are straight, and thinner the more."""
DPI = 110
"""Of .png files."""
COLUMN, ROW = 100, 95
"""Distances of the grid, in points."""
ZIGZAG = (-1.25, 1.25, -0.25, 1.25, -1.25, 0)
"""Columns by which MLPs are shifted, layer by layer and over again: so that a line between two of
them, up to five layers apart, passes beside those in between (found by trying)."""


SHARED, PARTLY = "#4A4E57", "#A0A6B2"
ONLY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9")
"""Colours of a comparison: what all circuits have, what some have, what one has."""
OUTLINE = "#6B6F78"


@dataclass(frozen=True)
class EdgeGroup:
    """Edges drawn in one colour.

    Attributes:
        name: what the legend calls them.
        color: such as "#0072B2".
        edges: (writer, reader) names.
    """

    name: str
    color: str
    edges: Collection[Edge]


def comparison_groups(circuits: Mapping[str, Set[Edge]]) -> list[EdgeGroup]:
    """The edges that all circuits have, that several have, and that only one has.

    Args:
        circuits: edges by the circuit's name. Of more than six, what only one has is one group.
    """
    all_edges = set().union(*circuits.values())
    holders = {edge: [n for n, edges in circuits.items() if edge in edges] for edge in all_edges}
    groups = [
        EdgeGroup(
            "shared", SHARED, {e for e, names in holders.items() if len(names) == len(circuits)}
        )
    ]
    some = {e for e, names in holders.items() if 1 < len(names) < len(circuits)}
    if len(circuits) > 2:
        groups.append(EdgeGroup("in several", PARTLY, some))
    only = {e: names[0] for e, names in holders.items() if len(names) == 1 < len(circuits)}
    if len(circuits) > len(ONLY):
        return [*groups, EdgeGroup("in one only", ONLY[1], set(only))]
    for name, color in zip(circuits, ONLY, strict=False):
        groups.append(EdgeGroup(f"only {name}", color, {e for e, n in only.items() if n == name}))
    return groups


def draw_circuit(
    circuit: Circuit,
    path: Path | str,
    *,
    title: str | None = None,
    groups: Sequence[EdgeGroup] = (),
) -> None:
    """Draw a circuit into a file, in the format of its suffix.

    Args:
        circuit: all of its edges are drawn; see `Circuit.without_dangling`.
        path: ends in .pdf, .svg, .png or .dot; only .dot needs no Graphviz on the machine.
        title: a line of text above.
        groups: colours for the edges, and a legend; none: the colour of the reader's kind.

    Raises:
        ValueError: another suffix, or a name which is none of a node.
        GraphvizMissing: no `dot` on the machine; the DOT source is left beside `path`.
    """
    path = Path(path)
    suffix = path.suffix.removeprefix(".")
    if suffix not in SUFFIXES:
        known = ", .".join(SUFFIXES)
        raise ValueError(f"cannot draw {path.name}: its suffix must be one of .{known}")
    source = circuit_dot(circuit, title=title, groups=groups)
    if suffix == "dot":
        write_text(path, source)
        return
    try:
        rendered = graphviz.pipe("dot", suffix, _at_dpi(source, suffix).encode(), quiet=True)
    except graphviz.ExecutableNotFound:
        fallback = path.with_suffix(".dot")
        write_text(fallback, source)
        raise GraphvizMissing(
            f"cannot draw {path}: the program `dot` is not on this machine; install Graphviz "
            "(Debian: apt-get install graphviz, macOS: brew install graphviz). Its source is in "
            f"{fallback}"
        ) from None
    write_atomically(path, lambda temporary: temporary.write_bytes(rendered))


def _at_dpi(source: str, suffix: str) -> str:
    """Pixels are asked for in pictures of pixels alone: with them Graphviz writes cropped SVGs."""
    return source.replace("{", f"{{ graph [dpi={DPI}]", 1) if suffix == "png" else source


# ------------------------------------------------------------------------------------- the source


def circuit_dot(
    circuit: Circuit, *, title: str | None = None, groups: Sequence[EdgeGroup] = ()
) -> str:
    """The DOT source of a circuit's drawing, always the same for the same circuit.

    Arguments and errors as `draw_circuit`.
    """
    Circuit.check(circuit)
    edges = sorted(circuit.edge_set, key=lambda edge: (_order(edge[1]), _order(edge[0])))
    many = len(edges) >= MANY
    boxes = {w for w, _ in edges} | {n for _, r in edges for n in _boxes_of(r, circuit)}
    nodes = sorted(boxes | {"resid_post"}, key=_order)
    counts = _counts(len(edges), len(nodes) - 1, sum(len(_boxes_of(r, circuit)) for _, r in edges))
    dot = graphviz.Digraph(
        graph_attr={
            "layout": "neato" if many else "dot", "splines": "line" if many else "true",
            "rankdir": "BT", "ranksep": "0.55", "nodesep": "0.18",
            "fontname": "Helvetica", "fontsize": "18", "labelloc": "t", "pad": "0.3",
            "label": _title(title, counts, _legend(edges, groups)),
            "outputorder": "edgesfirst",
        },
        node_attr={"shape": "plain", "fontname": "Helvetica", "fontsize": "12"},
        edge_attr={"arrowsize": "0.45"},
    )  # fmt: skip
    inputs = _inputs(edges, circuit)
    colors = {edge: group.color for group in groups for edge in group.edges}
    outlines = _outlines(edges, colors, circuit)
    labels = {
        node: _label(node, inputs.get(node, ()), outlines.get(node, OUTLINE)) for node in nodes
    }
    if many:
        for node, (x, y) in _grid(nodes).items():
            dot.node(_id(node), label=labels[node], pos=f"{x:g},{y:g}!")
    else:
        _add_ranks(dot, nodes, labels)
    width, opacity = _stroke(len(edges))
    for edge in edges:
        writer, reader = edge
        kind = _kind(reader)
        color = colors.get(edge, LINE[kind])
        if colors.get(edge) in (SHARED, *ONLY):  # what a comparison is made for stands out
            style = {"color": f"{color}D0", "penwidth": f"{width + 0.3:.2f}"}
        else:
            style = {"color": f"{color}{opacity:02X}", "penwidth": f"{width:.2f}"}
        for node in _boxes_of(reader, circuit):
            head = _id(node) if kind in ("mlp", "output") else f"{_id(node)}:{kind}:s"
            tail = _id(writer) if _kind(writer) != "head" else f"{_id(writer)}:out:n"
            dot.edge(tail, head, **style)
    return dot.source


def _stroke(num_edges: int) -> tuple[float, int]:
    """Width in points and opacity (of 255) of a line, both the lower the more there are."""
    if num_edges < MANY:
        return 1.1, 0xC0
    share = min(max(math.log10(num_edges / 300), 0), 1)  # 0 up to 300 edges, 1 from 3,000 on
    return 0.9 - 0.4 * share, round(0xA0 - 0x40 * share)


def _add_ranks(dot: graphviz.Digraph, nodes: list[str], labels: dict[str, str]) -> None:
    """Nodes for Graphviz to lay out, one rank a layer's heads or MLP, the ranks in layer order."""
    ranks = sorted({_rank(node) for node in nodes})
    members = {rank: [node for node in nodes if _rank(node) == rank] for rank in ranks}
    for rank in ranks:
        with dot.subgraph(graph_attr={"rank": "same"}) as row:
            for node in members[rank]:
                row.node(_id(node), label=labels[node])
    for lower, upper in zip(ranks, ranks[1:], strict=False):
        first, second = members[lower][0], members[upper][0]
        dot.edge(_id(first), _id(second), style="invis", weight="0")


def _grid(nodes: list[str]) -> dict[str, tuple[float, float]]:
    """Positions in inches: rows from the bottom up, a head always in its own column.

    Every second row is shifted by half a column, so that straight lines pass between boxes.
    """
    ranks = sorted({_rank(node) for node in nodes})
    columns = 1 + max([_parse(node)[2] for node in nodes])
    places = {}
    for node in nodes:
        kind, layer, head = _parse(node)
        row = ranks.index(_rank(node))
        if kind == "head":
            column = head + (0.0 if layer % 2 else 0.4)
        elif kind == "pos_embeds":
            column = columns * 2 / 3
        else:
            column = columns / 3 if kind == "tok_embeds" else columns / 2 - 0.25
            if kind == "mlp":
                column += ZIGZAG[layer % len(ZIGZAG)]
        places[node] = (column * COLUMN / 72, row * ROW / 72)
    return places


def _inputs(edges: list[Edge], circuit: Circuit) -> dict[str, set[str]]:
    """For each head, which of q, k and v have an edge."""
    inputs: dict[str, set[str]] = {}
    for _, reader in edges:
        if _kind(reader) in ("q", "k", "v"):
            for node in _boxes_of(reader, circuit):
                inputs.setdefault(node, set()).add(_kind(reader))
    return inputs


def _outlines(edges: list[Edge], colors: dict[Edge, str], circuit: Circuit) -> dict[str, str]:
    """A box all of whose edges have one colour has that colour too."""
    seen: dict[str, set[str]] = {}
    for writer, reader in edges:
        for node in (writer, *_boxes_of(reader, circuit)):
            seen.setdefault(node, set()).add(colors.get((writer, reader), OUTLINE))
    return {node: found.pop() for node, found in seen.items() if len(found) == 1}


def _legend(edges: list[Edge], groups: Sequence[EdgeGroup]) -> str:
    """What the colours mean, as an HTML-like label."""
    kinds = (("q", "query"), ("k", "key"), ("v", "value"), ("mlp", "MLP"), ("output", "output"))
    entries = [(LINE[kind], text) for kind, text in kinds]
    if groups:
        drawn = set(edges)
        counts = [(group, len(drawn & set(group.edges))) for group in groups]
        entries = [(group.color, f"{group.name} ({count:,})") for group, count in counts if count]
    marks = " ".join(
        f'<FONT COLOR="{color}">&#9654;&#160;{html.escape(text)}&#160;&#160;</FONT>'
        for color, text in entries
    )
    return marks if groups else f"edges into {marks}"


def _counts(num_edges: int, num_nodes: int, num_arrows: int) -> list[str]:
    """Lines that say how much there is to see."""
    edges = f"{num_edges:,} edge{'' if num_edges == 1 else 's'}" if num_edges else "no edges"
    lines = [f"{edges}, {num_nodes:,} node{'' if num_nodes == 1 else 's'} and the output"]
    if num_arrows != num_edges:
        lines.append(
            f"{num_arrows:,} arrows: an edge into a key or value that heads share is drawn into "
            "each of them"
        )
    return lines


def _title(title: str | None, counts: Sequence[str], legend: str) -> str:
    gap = '<FONT POINT-SIZE="6"><BR/>&#160;<BR/></FONT>'
    title = "".join(c if c.isprintable() else " " for c in title or "").strip()
    first = f"<B>{html.escape(title).replace(chr(92), chr(92) * 2)}</B>{gap}" if title else ""
    small = '<FONT POINT-SIZE="13">'
    lines = gap.join(f"{small}{line}</FONT>" for line in (*counts, legend))
    return f"<{first}{lines}{gap}&#160;>"


def _label(node: str, inputs: Iterable[str], outline: str) -> str:
    """A box; a head's has a cell for each of its inputs under its name."""
    kind = _kind(node)
    name = NAMES.get(node) or ("MLP " if kind == "mlp" else "Head ") + _number(node)
    font = ' COLOR="white"' if kind == "output" else ""
    width = 1 if outline == OUTLINE else 2
    start = (
        f'<<TABLE BORDER="0" CELLBORDER="{width}" CELLSPACING="0" CELLPADDING="5" '
        f'COLOR="{outline}">'
    )
    columns = [k for k in "qkv" if k in inputs]
    span = f' COLSPAN="{len(columns)}"' if len(columns) > 1 else ""
    cells = f'<TR><TD PORT="out"{span} BGCOLOR="{FILL[kind]}"><FONT{font}>{name}</FONT></TD></TR>'
    if columns:
        ports = "".join(
            f'<TD PORT="{k}" BGCOLOR="{FILL[k]}" TITLE="{name}.{k.upper()}">{k.upper()}</TD>'
            for k in columns
        )
        cells += f"<TR>{ports}</TR>"
    return f"{start}{cells}</TABLE>>"


# ------------------------------------------------------------------------------------------ names


def _parse(name: str) -> tuple[str, int, int]:
    """(kind, layer, head) of a node or a reader: 'a3.h1.q' -> ('q', 3, 1)."""
    found = re.fullmatch(r"a(\d+)\.h(\d+)(?:\.([qkv]))?", name)
    if found:
        return found[3] or "head", int(found[1]), int(found[2])
    found = re.fullmatch(r"m(\d+)", name)
    if found:
        return "mlp", int(found[1]), 0
    if name == "resid_post":
        return "output", 10**9, 0
    if name in NAMES:
        return name, -1, 0
    raise ValueError(
        f"{name!r} is not the name of a node; expected tok_embeds, pos_embeds, embeds, a0.h0, m0, "
        "a0.h0.q, a0.h0.k, a0.h0.v or resid_post, with any numbers"
    )


def _kind(name: str) -> str:
    return _parse(name)[0]


def _number(node: str) -> str:
    kind, layer, head = _parse(node)
    return str(layer) if kind == "mlp" else f"{layer}.{head}"


def _rank(node: str) -> tuple[int, bool]:
    """Embeddings, then layer by layer the heads and the MLP, then the output."""
    kind, layer, _ = _parse(node)
    return layer, kind == "mlp"


def _order(name: str) -> tuple:
    kind, layer, head = _parse(name)
    return layer, kind == "mlp", head, kind != "tok_embeds", kind


def _boxes_of(reader: str, circuit: Circuit) -> list[str]:
    """The boxes that a reader belongs to: a key or value head's are its group's query heads."""
    return circuit.nodes_fed_by(reader) or [reader]


def _id(node: str) -> str:
    """A DOT name; a dot or colon in it would need care with ports."""
    return node.replace(".", "_")
