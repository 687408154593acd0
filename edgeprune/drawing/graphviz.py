"""Drawings of circuits with Graphviz: embeddings at the bottom, the output at the top.

A head is one box, with its Q, K and V inputs below its output. An edge has the colour of the reader
in which it ends. Graphviz lays out small circuits. For large ones it would take minutes, and the
result would be 50 screens wide, so they lie on a grid: a row per layer and a column per head.
"""

import html
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import graphviz

from edgeprune.circuit import Circuit
from edgeprune.config import DRAWINGS
from edgeprune.errors import GraphvizMissing
from edgeprune.files import write_atomically, write_text
from edgeprune.graph import Edge

FILL = {
    "tok_embeds": "#8FD0C5", "pos_embeds": "#C9E3B4", "embeds": "#8FD0C5", "mlp": "#F6D58A",
    "head": "#D9DCE3", "q": "#A9C9F0", "k": "#F3B5AE", "v": "#CDB5E6", "output": "#4A4E57",
}  # fmt: skip
"""Box colour per kind of node: light, and distinguishable for colour-blind readers."""
LINE = {"q": "#2F6FB7", "k": "#C0473B", "v": "#7A4BAA", "mlp": "#B07A0C", "output": "#4A4E57"}
"""Edge colour per kind of reader."""
READER_KINDS = {"q": "query", "k": "key", "v": "value", "mlp": "MLP", "output": "output"}
"""Kinds of readers, as named in the legend."""
NAMES = {
    "tok_embeds": "Token embedding", "pos_embeds": "Position embedding", "embeds": "Embedding",
    "resid_post": "Output",
}  # fmt: skip
"""Names shown for nodes other than heads and MLPs."""
COMMON_KINDS = ("first token", "copying")
"""Kinds that many heads are in addition to one that says more: listed last, and not drawn."""
MAX_LAID_OUT = 119
"""Circuits with more edges than this are drawn on a grid, with straight and thinner lines."""
DPI = 110
"""Resolution of .png files."""
COLUMN, ROW = 100, 95
"""Distances on the grid, in points."""
ZIGZAG = (-1.25, 1.25, -0.25, 1.25, -1.25, 0)
"""Shifts of the MLPs on the grid, in columns, repeated every six layers. A line between two MLPs up
to five layers apart then passes the MLPs in between (found by trying)."""
OUTLINE, SHARED, PARTLY = "#6B6F78", "#4A4E57", "#A0A6B2"
"""Colours of outlines, of edges that all compared circuits have, and that several have."""
ONLY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9")
"""Colours of edges that only one of the compared circuits has, per circuit."""


class EdgeGroup(NamedTuple):
    """Edges drawn in one colour, such as "#0072B2"; the legend shows the name."""

    name: str
    color: str
    edges: Collection[Edge]


def comparison_groups(circuits: Mapping[str, Set[Edge]]) -> list[EdgeGroup]:
    """Groups of the edges that all circuits have, that several have, and that only one has.

    `circuits` are edges by name. Of more than six, the edges that only one has are a single group.
    """
    count, kept = len(circuits), Counter(edge for edges in circuits.values() for edge in edges)
    single = {edge for edge, times in kept.items() if times == 1 < count}
    several = {edge for edge, times in kept.items() if 1 < times < count}
    groups = [EdgeGroup("shared", SHARED, kept.keys() - single - several)]
    if count > 2:
        groups.append(EdgeGroup("in several", PARTLY, several))
    if count > len(ONLY):
        return [*groups, EdgeGroup("in one only", ONLY[1], single)]
    own = zip(circuits.items(), ONLY, strict=False)
    return groups + [EdgeGroup(f"only {name}", color, single & e) for (name, e), color in own]


def draw_circuit(
    circuit: Circuit, path: Path | str, *, title: str | None = None,
    groups: Sequence[EdgeGroup] = (), kinds: Mapping[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """Draw a circuit into a file, in the format of its suffix.

    Args:
        circuit: all of its edges are drawn; see `Circuit.without_dangling`.
        path: ends in .pdf, .svg, .png or .dot; only .dot does not need Graphviz.
        groups: colours of the edges; without groups, edges have the colour of their kind of reader.
        kinds: kinds of heads, shown below their names, such as {"a5.h1": ["induction"]}.

    Raises ValueError for another suffix; GraphvizMissing if `dot` is not installed, leaving the DOT
    source next to `path`.
    """
    path = Path(path)
    suffix = path.suffix.removeprefix(".")
    if suffix not in DRAWINGS:
        raise ValueError(f"cannot draw {path.name}; its suffix must be in {', '.join(DRAWINGS)}")
    source = circuit_dot(circuit, title=title, groups=groups, kinds=kinds)
    if suffix == "dot":
        write_text(path, source)
        return
    # Only for .png: with a resolution, Graphviz writes cropped SVGs.
    with_dpi = source.replace("{", f"{{ graph [dpi={DPI}]", 1) if suffix == "png" else source
    try:
        rendered = graphviz.pipe("dot", suffix, with_dpi.encode(), quiet=True)
    except graphviz.ExecutableNotFound:
        fallback = path.with_suffix(".dot")
        write_text(fallback, source)
        raise GraphvizMissing(
            f"cannot draw {path}: `dot` is not installed; install Graphviz (Debian: apt-get "
            f"install graphviz, macOS: brew install graphviz). The source is in {fallback}"
        ) from None
    write_atomically(path, lambda temporary: temporary.write_bytes(rendered))


def circuit_dot(
    circuit: Circuit, *, title: str | None = None, groups: Sequence[EdgeGroup] = (),
    kinds: Mapping[str, Sequence[str]] | None = None,
) -> str:  # fmt: skip
    """The DOT source of a circuit's drawing, always the same for the same circuit.

    An edge into a key or value that heads share is drawn as one arrow into each of its heads.
    """
    Circuit.check(circuit)
    edges = sorted(circuit.edge_set, key=lambda edge: (_order(edge[1]), _order(edge[0])))
    arrows = [(edge, n) for edge in edges for n in circuit.nodes_fed_by(edge[1]) or [edge[1]]]
    colors = {edge: group.color for group in groups for edge in group.edges}
    labels = _labels(arrows, colors, kinds or {})
    on_grid = len(edges) > MAX_LAID_OUT
    dot = graphviz.Digraph(
        graph_attr={
            "layout": "neato" if on_grid else "dot", "splines": "line" if on_grid else "true",
            "rankdir": "BT", "ranksep": "0.55", "nodesep": "0.18",
            "fontname": "Helvetica", "fontsize": "18", "labelloc": "t", "pad": "0.3",
            "label": _caption(title or "", edges, len(labels) - 1, len(arrows), groups),
            "outputorder": "edgesfirst",
        },
        node_attr={"shape": "plain", "fontname": "Helvetica", "fontsize": "12"},
        edge_attr={"arrowsize": "0.45"},
    )  # fmt: skip
    rows = [list(row) for _, row in groupby(labels, key=lambda node: _order(node)[:2])]
    (_add_grid if on_grid else _add_ranks)(dot, rows, labels)
    width, opacity = 1.1, 0xC0
    if on_grid:  # less of both, the more edges there are from 300 to 3,000
        share = min(max(math.log10(len(edges) / 300), 0), 1)
        width, opacity = 0.9 - 0.4 * share, round(0xA0 - 0x40 * share)
    for edge, node in arrows:
        kind, color = _parse(edge[1])[0], colors.get(edge)
        head = f"{_id(node)}:{kind}:s" if kind in ("q", "k", "v") else _id(node)
        tail = f"{_id(edge[0])}:out:n" if _parse(edge[0])[0] == "head" else _id(edge[0])
        stands_out = color in (SHARED, *ONLY)  # the edges that a comparison is about
        style = (width + 0.3, 0xD0) if stands_out else (width, opacity)
        color = f"{color or LINE[kind]}{style[1]:02X}"
        dot.edge(tail, head, color=color, penwidth=f"{style[0]:.2f}")
    return dot.source


def _add_ranks(dot: graphviz.Digraph, rows: list[list[str]], labels: dict[str, str]) -> None:
    """Add nodes for Graphviz to lay out, from bottom to top."""
    for row in rows:
        with dot.subgraph(graph_attr={"rank": "same"}) as rank:
            for node in row:
                rank.node(_id(node), label=labels[node])
    for lower, upper in pairwise(rows):
        dot.edge(_id(lower[0]), _id(upper[0]), style="invis", weight="0")


def _add_grid(dot: graphviz.Digraph, rows: list[list[str]], labels: dict[str, str]) -> None:
    """Add nodes in rows. Every second row is shifted, so that straight lines pass between boxes."""
    columns = 1 + max(_parse(node)[2] for node in labels)
    for y, row in enumerate(rows):
        for node in row:
            kind, layer, head = _parse(node)
            x = {
                "head": head + (0 if layer % 2 else 0.4),
                "tok_embeds": columns / 3,
                "pos_embeds": columns * 2 / 3,
                "mlp": columns / 2 - 0.25 + ZIGZAG[layer % len(ZIGZAG)],
            }.get(kind, columns / 2 - 0.25)
            inches = f"{x * COLUMN / 72:g},{y * ROW / 72:g}!"
            dot.node(_id(node), label=labels[node], pos=inches)


def _labels(
    arrows: list[tuple[Edge, str]], colors: dict[Edge, str], kinds: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """The box of each node, in order. A box whose edges all have one colour is outlined in it."""
    inputs, outlines = defaultdict(set), defaultdict(set, resid_post=set())
    for edge, node in arrows:
        inputs[node].add(_parse(edge[1])[0])
        for end in (edge[0], node):
            outlines[end].add(colors.get(edge, OUTLINE))
    return {
        node: _label(
            node, inputs[node], min(found) if len(found) == 1 else OUTLINE, kinds.get(node, ())
        )
        for node, found in sorted(outlines.items(), key=lambda item: _order(item[0]))
    }


def _label(node: str, inputs: set[str], outline: str, kinds: Sequence[str]) -> str:
    """A box; a head's has a cell for each of its inputs below its name and kinds."""
    kind, layer, head = _parse(node)
    name = NAMES.get(node) or (f"Head {layer}.{head}" if kind == "head" else f"MLP {layer}")
    font = ' COLOR="white"' if kind == "output" else ""
    columns = [k for k in "qkv" if k in inputs]
    span = f' COLSPAN="{len(columns)}"' if len(columns) > 1 else ""
    ports = "".join(
        f'<TD PORT="{k}" BGCOLOR="{FILL[k]}" TITLE="{name}.{k.upper()}">{k.upper()}</TD>'
        for k in columns
    )
    below = "".join(
        f'<BR/><FONT POINT-SIZE="9">{html.escape(kind)}</FONT>'
        for kind in kinds if kind not in COMMON_KINDS
    )  # fmt: skip
    return (
        f'<<TABLE BORDER="0" CELLBORDER="{1 if outline == OUTLINE else 2}" CELLSPACING="0" '
        f'CELLPADDING="5" COLOR="{outline}"><TR><TD PORT="out"{span} BGCOLOR="{FILL[kind]}">'
        f"<FONT{font}>{name}</FONT>{below}</TD></TR>{f'<TR>{ports}</TR>' if ports else ''}</TABLE>>"
    )


def _caption(
    title: str, edges: list[Edge], num_nodes: int, num_arrows: int, groups: Sequence[EdgeGroup]
) -> str:
    """Title, numbers of edges and nodes, and the meaning of the colours, as an HTML-like label."""
    entries = [(LINE[kind], text) for kind, text in READER_KINDS.items()]
    if groups:
        counts = [(group, len(set(edges) & set(group.edges))) for group in groups]
        entries = [(group.color, f"{group.name} ({count:,})") for group, count in counts if count]
    legend = " ".join(
        f'<FONT COLOR="{color}">&#9654;&#160;{html.escape(text)}&#160;&#160;</FONT>'
        for color, text in entries
    )
    size = f"{len(edges):,} edge{'s' * (len(edges) != 1)}" if edges else "no edges"
    lines = [f"{size}, {num_nodes:,} node{'s' * (num_nodes != 1)} and the output"]
    if num_arrows != len(edges):
        reason = "an edge into a key or value that heads share is drawn into each of them"
        lines.append(f"{num_arrows:,} arrows: {reason}")
    lines.append(legend if groups else f"edges into {legend}")
    gap = '<FONT POINT-SIZE="6"><BR/>&#160;<BR/></FONT>'
    parts = [f'<FONT POINT-SIZE="13">{line}</FONT>' for line in lines]
    if title := "".join(c if c.isprintable() else " " for c in title).strip():
        escaped = html.escape(title).replace("\\", "\\\\").replace("]", "&#93;")  # no ] after a tag
        parts.insert(0, f"<B>{escaped}</B>")
    return f"<{gap.join(parts)}{gap}&#160;>"


@cache
def _parse(name: str) -> tuple[str, int, int]:
    """(kind, layer, head) of a node or a reader: 'a3.h1.q' -> ('q', 3, 1)."""
    if name == "resid_post":
        return "output", 10**9, 0
    if name in NAMES:
        return name, -1, 0
    layer, head, kind = re.fullmatch(r"[am](\d+)(?:\.h(\d+))?(?:\.([qkv]))?", name).groups()
    return kind or ("mlp" if head is None else "head"), int(layer), int(head or 0)


def _order(name: str) -> tuple:
    """Sorts the embeddings first, then per layer the heads and the MLP, then the output."""
    kind, layer, head = _parse(name)
    return layer, kind == "mlp", head, kind != "tok_embeds", kind


def _id(node: str) -> str:
    """A DOT identifier; a dot or a colon would have to be quoted in ports."""
    return node.replace(".", "_")
