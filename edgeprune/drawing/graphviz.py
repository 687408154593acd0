"""Drawings of circuits with Graphviz: embeddings at the bottom, the output at the top.

A head is one box, with its Q, K and V inputs below its output; an MLP, an embedding and the output
are one box each. An edge has the colour of the reader in which it ends. Graphviz lays out small
circuits. For large ones it would take minutes, and the result would be 50 screens wide, so they lie
on a grid with one row per layer and one column per head.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import graphviz

from edgeprune.circuit import Circuit
from edgeprune.errors import GraphvizMissing
from edgeprune.files import write_atomically, write_text
from edgeprune.graph import Edge

SUFFIXES = ("pdf", "svg", "png", "dot")
"""File formats of drawings."""

FILL = {
    "tok_embeds": "#8FD0C5", "pos_embeds": "#C9E3B4", "embeds": "#8FD0C5", "mlp": "#F6D58A",
    "head": "#D9DCE3", "q": "#A9C9F0", "k": "#F3B5AE", "v": "#CDB5E6", "output": "#4A4E57",
}  # fmt: skip
"""Box colour per kind of node: light, and distinguishable for colour-blind readers."""
LINE = {"q": "#2F6FB7", "k": "#C0473B", "v": "#7A4BAA", "mlp": "#B07A0C", "output": "#4A4E57"}
"""Edge colour per kind of reader."""
NAMES = {
    "tok_embeds": "Token embedding", "pos_embeds": "Position embedding", "embeds": "Embedding",
    "resid_post": "Output",
}  # fmt: skip
"""Names shown for nodes other than heads and MLPs."""
MAX_LAID_OUT = 119
"""Circuits with more edges than this are drawn on a grid, with straight and thinner lines."""
DPI = 110
"""Resolution of .png files."""
COLUMN, ROW = 100, 95
"""Distances on the grid, in points."""
ZIGZAG = (-1.25, 1.25, -0.25, 1.25, -1.25, 0)
"""Shifts of the MLPs on the grid, in columns, repeated every six layers. A line between two MLPs up
to five layers apart then passes the MLPs in between (found by trying)."""

SHARED, PARTLY = "#4A4E57", "#A0A6B2"
"""Colours of edges that all compared circuits have, and that several have."""
ONLY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9")
"""Colours of edges that only one of the compared circuits has, per circuit."""
OUTLINE = "#6B6F78"
"""Colour of a box's outline."""


@dataclass(frozen=True)
class EdgeGroup:
    """Edges drawn in one colour.

    Attributes:
        name: shown in the legend.
        color: such as "#0072B2".
        edges: (writer, reader) names.
    """

    name: str
    color: str
    edges: Collection[Edge]


def comparison_groups(circuits: Mapping[str, Set[Edge]]) -> list[EdgeGroup]:
    """Groups of the edges that all circuits have, that several have, and that only one has.

    Args:
        circuits: edges per name of a circuit. For more than six circuits, the edges that only one
            has are a single group.
    """
    holders: dict[Edge, list[str]] = {}
    for name, edges in circuits.items():
        for edge in edges:
            holders.setdefault(edge, []).append(name)
    count = len(circuits)
    shared = {edge for edge, names in holders.items() if len(names) == count}
    several = {edge for edge, names in holders.items() if 1 < len(names) < count}
    only = {edge: names[0] for edge, names in holders.items() if len(names) == 1 < count}
    groups = [EdgeGroup("shared", SHARED, shared)]
    if count > 2:
        groups.append(EdgeGroup("in several", PARTLY, several))
    if count > len(ONLY):
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
        path: ends in .pdf, .svg, .png or .dot; only .dot does not need Graphviz.
        title: a line of text at the top.
        groups: colours of the edges, with a legend; without groups, edges have the colour of their
            kind of reader.

    Raises:
        ValueError: another suffix, or an edge with an unknown name.
        GraphvizMissing: `dot` is not installed; the DOT source is left next to `path`.
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
            f"cannot draw {path}: the program `dot` is not installed; install Graphviz (Debian: "
            f"apt-get install graphviz, macOS: brew install graphviz). The source is in {fallback}"
        ) from None
    write_atomically(path, lambda temporary: temporary.write_bytes(rendered))


def _at_dpi(source: str, suffix: str) -> str:
    """Set the resolution of .png files only: with it, Graphviz writes cropped SVGs."""
    return source.replace("{", f"{{ graph [dpi={DPI}]", 1) if suffix == "png" else source


# ------------------------------------------------------------------------------------- the source


def circuit_dot(
    circuit: Circuit, *, title: str | None = None, groups: Sequence[EdgeGroup] = ()
) -> str:
    """The DOT source of a circuit's drawing, always the same for the same circuit.

    Arguments and errors are those of `draw_circuit`.
    """
    Circuit.check(circuit)
    edges = sorted(circuit.edge_set, key=lambda edge: (_order(edge[1]), _order(edge[0])))
    on_grid = len(edges) > MAX_LAID_OUT
    arrows = [(edge, node) for edge in edges for node in _boxes(edge[1], circuit)]
    nodes = sorted({w for w, _ in edges} | {n for _, n in arrows} | {"resid_post"}, key=_order)
    colors = {edge: group.color for group in groups for edge in group.edges}
    counts = _counts(len(edges), len(nodes) - 1, len(arrows))
    dot = graphviz.Digraph(
        graph_attr={
            "layout": "neato" if on_grid else "dot", "splines": "line" if on_grid else "true",
            "rankdir": "BT", "ranksep": "0.55", "nodesep": "0.18",
            "fontname": "Helvetica", "fontsize": "18", "labelloc": "t", "pad": "0.3",
            "label": _title(title, counts, _legend(edges, groups)),
            "outputorder": "edgesfirst",
        },
        node_attr={"shape": "plain", "fontname": "Helvetica", "fontsize": "12"},
        edge_attr={"arrowsize": "0.45"},
    )  # fmt: skip
    labels = _labels(nodes, arrows, colors)
    if on_grid:
        for node, (x, y) in _grid(nodes).items():
            dot.node(_id(node), label=labels[node], pos=f"{x:g},{y:g}!")
    else:
        _add_ranks(dot, nodes, labels)
    width, opacity = _stroke(len(edges))
    for edge, node in arrows:
        kind, color = _kind(edge[1]), colors.get(edge)
        head = _id(node) if kind in ("mlp", "output") else f"{_id(node)}:{kind}:s"
        tail = f"{_id(edge[0])}:out:n" if _kind(edge[0]) == "head" else _id(edge[0])
        stands_out = color in (SHARED, *ONLY)  # the edges that a comparison is about
        style = f"{width + 0.3:.2f}" if stands_out else f"{width:.2f}"
        alpha = "D0" if stands_out else f"{opacity:02X}"
        dot.edge(tail, head, color=f"{color or LINE[kind]}{alpha}", penwidth=style)
    return dot.source


def _stroke(num_edges: int) -> tuple[float, int]:
    """Line width in points and opacity (0 to 255), which decrease with the number of edges."""
    if num_edges <= MAX_LAID_OUT:
        return 1.1, 0xC0
    share = min(max(math.log10(num_edges / 300), 0), 1)  # 0 up to 300 edges, 1 from 3,000 on
    return 0.9 - 0.4 * share, round(0xA0 - 0x40 * share)


def _add_ranks(dot: graphviz.Digraph, nodes: list[str], labels: dict[str, str]) -> None:
    """Add nodes for Graphviz to lay out: a layer's heads, or its MLP, are one rank."""
    ranks: dict[tuple[int, bool], list[str]] = {}
    for node in nodes:  # in the order of the ranks
        ranks.setdefault(_rank(node), []).append(node)
    for members in ranks.values():
        with dot.subgraph(graph_attr={"rank": "same"}) as row:
            for node in members:
                row.node(_id(node), label=labels[node])
    firsts = [_id(members[0]) for members in ranks.values()]
    for lower, upper in zip(firsts, firsts[1:], strict=False):
        dot.edge(lower, upper, style="invis", weight="0")


def _grid(nodes: list[str]) -> dict[str, tuple[float, float]]:
    """Positions in inches: rows from bottom to top, and each head always in the same column.

    Every second row is shifted by half a column, so that straight lines pass between boxes.
    """
    ranks = sorted({_rank(node) for node in nodes})
    columns = 1 + max(_parse(node)[2] for node in nodes)
    places = {}
    for node in nodes:
        kind, layer, head = _parse(node)
        if kind == "head":
            column = head + (0.0 if layer % 2 else 0.4)
        elif kind == "pos_embeds":
            column = columns * 2 / 3
        elif kind == "tok_embeds":
            column = columns / 3
        else:
            column = columns / 2 - 0.25 + (ZIGZAG[layer % len(ZIGZAG)] if kind == "mlp" else 0)
        places[node] = (column * COLUMN / 72, ranks.index(_rank(node)) * ROW / 72)
    return places


def _labels(
    nodes: list[str], arrows: list[tuple[Edge, str]], colors: dict[Edge, str]
) -> dict[str, str]:
    """Boxes. A box whose edges all have one colour is outlined in it."""
    inputs: dict[str, set[str]] = {node: set() for node in nodes}
    seen: dict[str, set[str]] = {node: set() for node in nodes}
    for edge, node in arrows:
        inputs[node].add(_kind(edge[1]))
        for end in (edge[0], node):
            seen[end].add(colors.get(edge, OUTLINE))
    outlines = {node: min(found) if len(found) == 1 else OUTLINE for node, found in seen.items()}
    return {node: _label(node, inputs[node], outlines[node]) for node in nodes}


def _legend(edges: list[Edge], groups: Sequence[EdgeGroup]) -> str:
    """The meaning of the colours, as an HTML-like label."""
    kinds = (("q", "query"), ("k", "key"), ("v", "value"), ("mlp", "MLP"), ("output", "output"))
    entries = [(LINE[kind], text) for kind, text in kinds]
    if groups:
        counts = [(group, len(set(edges) & set(group.edges))) for group in groups]
        entries = [(group.color, f"{group.name} ({count:,})") for group, count in counts if count]
    marks = " ".join(
        f'<FONT COLOR="{color}">&#9654;&#160;{html.escape(text)}&#160;&#160;</FONT>'
        for color, text in entries
    )
    return marks if groups else f"edges into {marks}"


def _counts(num_edges: int, num_nodes: int, num_arrows: int) -> list[str]:
    """Lines that give the numbers of edges and nodes."""
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
    lines = gap.join(f'<FONT POINT-SIZE="13">{line}</FONT>' for line in (*counts, legend))
    return f"<{first}{lines}{gap}&#160;>"


def _label(node: str, inputs: Iterable[str], outline: str) -> str:
    """A box; a head's has a cell for each of its inputs below its name."""
    kind, layer, head = _parse(node)
    number = f"Head {layer}.{head}" if kind == "head" else f"MLP {layer}"
    name = NAMES.get(node, number)
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


@cache
def _parse(name: str) -> tuple[str, int, int]:
    """(kind, layer, head) of a node or a reader: 'a3.h1.q' -> ('q', 3, 1)."""
    if found := re.fullmatch(r"a(\d+)\.h(\d+)(?:\.([qkv]))?", name):
        return found[3] or "head", int(found[1]), int(found[2])
    if found := re.fullmatch(r"m(\d+)", name):
        return "mlp", int(found[1]), 0
    if name in NAMES:
        return ("output", 10**9, 0) if name == "resid_post" else (name, -1, 0)
    raise ValueError(
        f"{name!r} is not the name of a node; expected tok_embeds, pos_embeds, embeds, a0.h0, m0, "
        "a0.h0.q, a0.h0.k, a0.h0.v or resid_post, with any numbers"
    )


def _kind(name: str) -> str:
    return _parse(name)[0]


def _rank(node: str) -> tuple[int, bool]:
    """Sorts the embeddings first, then per layer the heads and the MLP, then the output."""
    kind, layer, _ = _parse(node)
    return layer, kind == "mlp"


def _order(name: str) -> tuple:
    kind, layer, head = _parse(name)
    return layer, kind == "mlp", head, kind != "tok_embeds", kind


def _boxes(reader: str, circuit: Circuit) -> list[str]:
    """The boxes of a reader; a shared key or value is drawn in each of its query heads."""
    return circuit.nodes_fed_by(reader) or [reader]


def _id(node: str) -> str:
    """A DOT identifier; a dot or a colon would have to be quoted in ports."""
    return node.replace(".", "_")
