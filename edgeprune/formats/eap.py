"""Circuit files: `edges.json`, and the graphs of EAP-IG and MIB as JSON or `.pt`.

`edges.json`, the published format of Edge Pruning, is a list of [writer, reader] pairs.

The graph files (github.com/hannamw/EAP-IG, `Graph.to_json` and `Graph.to_pt`; the circuit track of
MIB reads the same) give every edge a score and a flag `in_graph`. Their graph is coarser and finer
than ours:

- All embeddings together are one node, `input`. An edge from it is in the graph if any of our
  embedding writers' is; read back, it stands for all of them. Where a model's embeddings are no
  writers, its `input` edges are all in the graph, and are passed over when read.
- Keys and values exist once per query head. A key/value head's edge is written for every query
  head of its group; read back, it is kept if any of them is.
- Only edges count. Flags and scores of nodes are written but not read: EAP-IG too works them out
  from the edges. Graphs of single neurons are refused.

What `input` cannot say, how heads are grouped, and every edge's own score are kept under a key of
our own, `edgeprune`, which others pass over; so a circuit that we wrote is read back exactly, and
one cut from it by score is the one that the scores would have given. In a file that someone else
wrote, or wrote anew, circuits that differ only in which of two embeddings a node reads are the
same.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edgeprune.config import CircuitFormat
from edgeprune.errors import CircuitError
from edgeprune.files import write_atomically, write_text
from edgeprune.graph import CircuitGraph, Edge

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = tuple(format.name for format in CircuitFormat)
INPUT, LOGITS = "input", "logits"
OURS = "edgeprune"
"""Key of what the graph formats have no room for."""


@dataclass(frozen=True)
class CircuitFile:
    """What a circuit file says.

    Attributes:
        edges: kept, by our names; unchecked where the file is an `edges.json`.
        graph: the one the edges belong to; None for an `edges.json`, which does not say, unless it
            was given.
        sure: False if `graph` is unknown, or its embeddings and the grouping of heads are a guess.
        notes: what was lost or decided in reading, for people.
        scores: [edge], in the graph's order, of a graph file that has one for every edge.
        d_model: width of the model, where the file names it.
    """

    edges: list[Edge]
    graph: CircuitGraph | None
    sure: bool = True
    notes: tuple[str, ...] = ()
    scores: list[float] | None = None
    d_model: int | None = None

    def largest(self, num_edges: int) -> list[Edge]:
        """So many edges of the largest scores by magnitude; ties by the graph's order."""
        edges = self.graph.edges
        ranking = sorted(range(len(edges)), key=lambda index: -abs(self.scores[index]))
        return [edges[index] for index in ranking[:num_edges]]


def read_circuit_file(path: Path | str, graph: CircuitGraph | None = None) -> CircuitFile:
    """Read a circuit in any of the formats, which is told by the content.

    Args:
        path: the file.
        graph: that of the model, if known. Graph files are translated to it; without one, to the
            graph they were written from, or else to one with a single embedding writer, `embeds`,
            and as many key/value heads as heads.

    Raises:
        CircuitError: no such file, damaged, of no known format, or of another graph.
    """
    path = Path(path)
    try:
        start = path.open("rb").read(4)
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from None
    if start == b"PK\x03\x04" or path.suffix == ".pt":
        return _read_pt(path, graph)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict) and {"cfg", "edges"} <= content.keys():
        return _read_eap_json(path, content, graph)
    if isinstance(content, dict) and isinstance(content.get("edges"), list):
        content = content["edges"]  # as Tracr folders' ground_truth_edges.json have them
    if not isinstance(content, list) or not all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(n, str) for n in p) for p in content
    ):
        raise CircuitError(
            f"{path} is not a list of [writer, reader] pairs of names, nor a graph of EAP-IG or "
            "MIB with keys 'cfg' and 'edges'"
        )
    edges = [(writer, reader) for writer, reader in content]
    return CircuitFile(edges, graph, sure=graph is not None)


def write_circuit_file(
    graph: CircuitGraph,
    edges: Collection[Edge],
    path: Path | str,
    format: str = "edges",
    *,
    scores: Sequence[float] | None = None,
    d_model: int | None = None,
) -> None:
    """Write a circuit.

    Args:
        graph: the circuit's.
        edges: kept, in the graph's order.
        path: the file.
        format: one of `FORMATS`.
        scores: [edge], in the graph's order, of larger magnitude for what matters more; None: 1 for
            kept edges, 0 for others. Graph files alone hold them.
        d_model: width of the model, which graph files name; None: unknown, written as 0.

    Raises:
        CircuitError: a .pt file is asked for in a format that is JSON.
    """
    path = Path(path)
    if path.suffix == ".pt" and format in ("edges", "eap_json"):
        raise CircuitError(
            f"{path}: a .pt file holds tensors, but format {format!r} is JSON; give "
            "format='eap_pt', or a name that ends in .json"
        )
    if format == "edges":
        lines = ",\n".join(json.dumps(list(edge)) for edge in edges)
        write_text(path, f"[\n{lines}\n]\n")
        return
    exported = _Exported.of(graph, frozenset(edges), scores, d_model)
    if format == "eap_json":

        def write(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8") as file:
                _write_eap_json(exported, file)

        write_atomically(path, write)
    elif format == "eap_pt":
        import torch

        buffer = io.BytesIO()  # torch reports a failed write without saying why
        torch.save(_as_tensors(exported), buffer)
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    else:
        raise ValueError(f"unknown format {format!r}; choose {', '.join(FORMATS)}")


# ----------------------------------------------------------------------------------- edges.json


def infer_graph(edges: list[Edge], where: str) -> CircuitGraph:
    """The smallest graph without grouped-query attention that has these edges.

    For an `edges.json` of which nothing else is known.

    Raises:
        CircuitError: a name that is none of a node, or numbers beyond any model's.
    """
    layer, head = 0, 0
    embeddings = set()
    for name in {name for edge in edges for name in edge}:
        found = re.fullmatch(r"a(\d+)\.h(\d+)(?:\.[qkv])?|m(\d+)", name)
        if found:
            layer = max(layer, int(found[1] or found[3]))
            head = max(head, int(found[2] or 0))
        elif name in ("embeds", "tok_embeds", "pos_embeds"):
            embeddings.add(name)
        elif name != "resid_post":
            raise CircuitError(f"{where}: {name!r} is not the name of a node")
    order = ("embeds",) if "embeds" in embeddings else ("tok_embeds", "pos_embeds")
    try:
        return CircuitGraph(layer + 1, head + 1, head + 1, order if embeddings else ())
    except ValueError as error:
        raise CircuitError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------- names and graphs


def _their_graph(graph: CircuitGraph) -> CircuitGraph:
    """The graph as those formats have it, in our terms."""
    return replace(graph, num_kv_heads=graph.num_heads, embedding_writers=(INPUT,))


def _their_reader(reader: str) -> str:
    """'a0.h1.q' -> 'a0.h1<q>', 'resid_post' -> 'logits', 'm0' -> 'm0'."""
    if reader == "resid_post":
        return LOGITS
    node, _, kind = reader.rpartition(".")
    return f"{node}<{kind}>" if node else reader


def _our_reader(reader: str) -> str:
    """The inverse of `_their_reader`."""
    if reader == LOGITS:
        return "resid_post"
    found = re.fullmatch(r"(a\d+\.h\d+)<([qkv])>", reader)
    return f"{found[1]}.{found[2]}" if found else reader


def _grouped(reader: str, graph: CircuitGraph) -> str:
    """The reader of our graph which a query head's key or value input is part of."""
    node, _, kind = reader.rpartition(".")
    if kind not in ("k", "v"):
        return reader
    layer, _, head = node.partition(".h")
    return f"{layer}.h{int(head) // graph.heads_per_kv_head}.{kind}"


def _our_edges(edge: Edge, graph: CircuitGraph) -> list[Edge]:
    """What an edge of `_their_graph(graph)` stands for: several, one, or none of the graph."""
    writer, reader = edge
    ours = _grouped(reader, graph)
    return [
        (source, ours) for source in (graph.embedding_writers if writer == INPUT else (writer,))
    ]


def _largest_score(edge: Edge, scores: Sequence[float], graph: CircuitGraph) -> float | None:
    """The largest by magnitude of what an edge of theirs stands for; None if that is nothing."""
    ours = _our_edges(edge, graph)
    return max((scores[graph.edge_index(one)] for one in ours), key=abs, default=None)


def _translate(theirs: list[Edge], graph: CircuitGraph) -> tuple[list[Edge], list[str]]:
    """Edges of `_their_graph(graph)` as edges of the graph, in its order, and notes."""
    kept: Counter[Edge] = Counter()
    for edge in theirs:
        kept.update(_our_edges(edge, graph))
    notes = []
    size = graph.heads_per_kv_head
    partly = sum(r.endswith((".k", ".v")) and count < size for (_, r), count in kept.items())
    if partly:
        notes.append(
            f"{partly:,} edges into a shared key or value head are in the graph for some of its "
            f"{size} query heads only; they are kept"
        )
    if not graph.embedding_writers:
        readers = len(_their_graph(graph).readers)
        from_input = sum(writer == INPUT for writer, _ in theirs)
        if from_input < readers:
            notes.append(
                f"{readers - from_input:,} edges from the input are left out there, but this "
                "model's embeddings always flow (model.embedding_writers=false)"
            )
    return sorted(kept, key=graph.edge_index), notes


def _translate_scores(theirs: dict[Edge, Any], graph: CircuitGraph) -> list[float] | None:
    """Metrics of their edges in our order, where several are one of ours the largest by magnitude.

    None where an edge has no score that is a number.
    """
    scores = [0.0] * graph.num_edges
    for edge in _their_graph(graph).edges:
        score = theirs.get(edge)
        if not _is_score(score):
            return None
        for one in _our_edges(edge, graph):
            index = graph.edge_index(one)
            scores[index] = max(scores[index], score, key=abs)
    return scores


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _merged(graph: CircuitGraph) -> list[int]:
    """Numbers of the edges that are one edge there with others: those from several embeddings."""
    if len(graph.embedding_writers) < 2:
        return []
    of_embeddings = graph.embedding_writers
    return [i for i, (writer, _) in enumerate(graph.edges) if writer in of_embeddings]


def _with_own(scores: list[float], own: list[float], graph: CircuitGraph) -> list[float]:
    """Metrics with our own in their places: of all edges, or of `_merged`."""
    if len(own) == len(scores):
        return own
    scores = list(scores)
    for index, score in zip(_merged(graph), own, strict=True):
        scores[index] = score
    return scores


def _still_hold(own: list[float], theirs: dict[Edge, Any], graph: CircuitGraph) -> bool:
    """Whether a file's scores are still those written with our own, but for rounding."""
    for edge in _their_graph(graph).edges:
        score, written = theirs.get(edge), _largest_score(edge, own, graph)
        if not _is_score(score):
            return False
        if written is not None and not math.isclose(score, written, rel_tol=1e-6, abs_tol=1e-30):
            return False
    return True


def _finish(
    path: Path,
    content: dict,
    theirs: CircuitGraph,
    kept: list[Edge],
    scores: dict[Edge, Any],
    graph: CircuitGraph | None,
) -> CircuitFile:
    """Edges of a graph file as edges of the model's graph, or of the one they were written from."""
    written_from, left_out, own_scores = _read_ours(path, content.get(OURS), theirs)
    target = graph or written_from or replace(theirs, embedding_writers=("embeds",))
    if _their_graph(target) != theirs:
        raise CircuitError(
            f"{path} is no circuit of this model: it has {theirs.num_layers} layers of "
            f"{theirs.num_heads} heads, the model {target.num_layers} of {target.num_heads}"
        )
    edges, notes = _translate(kept, target)
    if target == written_from:
        edges = [edge for edge in edges if edge not in left_out]
    elif len(target.embedding_writers) > 1 and any(writer == INPUT for writer, _ in kept):
        notes.append(f"edges from the input are kept from {' and '.join(target.embedding_writers)}")
    our_scores = _translate_scores(scores, target)
    if target == written_from and own_scores and our_scores:
        exact = _with_own(our_scores, own_scores, target)
        our_scores = exact if _still_hold(exact, scores, target) else our_scores
    if not edges:
        choose = "; choose edges by score: `edgeprune export FILE num_edges=... output=...`"
        notes.append(f"no edge is in the graph{choose if our_scores else ''}")
    d_model = content["cfg"].get("d_model")
    return CircuitFile(
        edges,
        target,
        sure=bool(graph or written_from),
        notes=tuple(f"{path}: {note}" for note in notes),
        scores=our_scores,
        d_model=d_model if type(d_model) is int and d_model > 0 else None,
    )


def _read_ours(
    path: Path, ours: Any, theirs: CircuitGraph
) -> tuple[CircuitGraph | None, set[Edge], list[float] | None]:
    """(graph, edges of embeddings left out, own scores), the last not in older files."""
    if ours is None:
        return None, set(), None
    try:
        left_out = {(writer, reader) for writer, reader in ours["left_out"]}
        graph, scores = CircuitGraph.from_dict(ours["graph"]), ours.get("scores")
        if _their_graph(graph) != theirs:  # before its edges are gone through
            raise ValueError("'graph' has not the layers and heads of 'cfg'")
        if scores is not None:
            scores = scores if isinstance(scores, list) else scores.tolist()  # of a .pt
            sizes = (len(_merged(graph)), graph.num_edges)
            if len(scores) not in sizes or any(type(s) not in (int, float) for s in scores):
                raise ValueError(f"'scores' are not {sizes[0]} or {sizes[1]} numbers")
        return graph, left_out, scores
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CircuitError(
            f"{path}: what stands under {OURS!r} cannot be read ({type(error).__name__}: {error}); "
            "remove that key, or export the circuit again"
        ) from None


def _read_config(path: Path, config: Any) -> CircuitGraph:
    """Their graph, by `cfg`."""
    if not isinstance(config, dict):
        raise CircuitError(f"{path}: 'cfg' is {type(config).__name__}, expected a dictionary")
    if config.get("parallel_attn_mlp"):
        raise CircuitError(
            f"{path}: parallel_attn_mlp is set; models whose MLP does not read its own layer's "
            "heads are not supported"
        )
    layers, heads = config.get("n_layers"), config.get("n_heads")
    try:
        return CircuitGraph(layers, heads, heads, (INPUT,))
    except ValueError as error:
        raise CircuitError(
            f"{path}: 'cfg' has n_layers={layers!r} and n_heads={heads!r}: {error}"
        ) from None


# ---------------------------------------------------------------------------------- graph as JSON


def _all_kept(neurons: Any) -> bool:
    return all(neurons) if isinstance(neurons, list) else True


def _read_eap_json(path: Path, content: dict, graph: CircuitGraph | None) -> CircuitFile:
    theirs = _read_config(path, content["cfg"])
    nodes = content.get("nodes")
    for name, node in nodes.items() if isinstance(nodes, dict) else ():
        if isinstance(node, dict) and node.get("in_graph") and not _all_kept(node.get("neurons")):
            raise CircuitError(
                f"{path}: node {name} is in the graph with some of its neurons only; circuits of "
                "neurons are not supported"
            )
    if not isinstance(content["edges"], dict):
        kind = type(content["edges"]).__name__
        raise CircuitError(f"{path}: 'edges' is {kind}, expected a dictionary of names")
    kept, scores = [], {}
    for name, entry in content["edges"].items():
        writer, _, reader = name.partition("->")
        edge = (writer, _our_reader(reader))
        try:
            theirs.edge_index(edge)
            if _their_reader(edge[1]) != reader:
                raise ValueError("one of our names")
        except ValueError:
            raise CircuitError(
                f"{path}: there is no edge {name!r} in a model of {theirs.num_layers} layers of "
                f"{theirs.num_heads} heads; expected names such as 'input->a0.h0<q>', "
                "'a0.h0->m0' and 'm0->logits'"
            ) from None
        if not isinstance(entry, dict) or entry.get("in_graph") not in (True, False):
            raise CircuitError(f"{path}: edge {name!r} has no 'in_graph' that is true or false")
        if entry["in_graph"]:
            kept.append(edge)
        scores[edge] = entry.get("score")
    return _finish(path, content, theirs, kept, scores, graph)


def _write_eap_json(exported: _Exported, file: TextIO) -> None:
    """Edge by edge: a model of 13 B parameters has four million."""
    nodes = {name: {"in_graph": kept} for name, kept in exported.nodes.items()}
    file.write(f'{{"cfg": {json.dumps(exported.config)},\n"nodes": {json.dumps(nodes)},\n')
    own = [exported.scores[index] for index in _merged(exported.graph)]  # others are exact there
    ours = {**exported.ours, "scores": own}
    file.write(f'"{OURS}": {json.dumps(ours)},\n"edges": {{')
    end = "\n"
    for (writer, reader), kept, score in exported.entries():
        entry = json.dumps({"score": score, "in_graph": kept})
        file.write(f'{end}"{writer}->{_their_reader(reader)}": {entry}')
        end = ",\n"
    file.write("\n}}\n")


# ------------------------------------------------------------------------------------ graph as .pt


def _read_pt(path: Path, graph: CircuitGraph | None) -> CircuitFile:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a damaged or foreign file
        reason = re.split(r"\n|\. ", str(error).strip())[0][:200]
        raise CircuitError(
            f"{path} cannot be read as a .pt of plain values and tensors, which alone are loaded "
            f"since others may run code: {type(error).__name__}: {reason}"
        ) from None
    needed = ("cfg", "src_nodes", "dst_nodes", "edges_in_graph")
    missing = [k for k in needed if not isinstance(content, dict) or k not in content]
    if missing:
        raise CircuitError(
            f"{path} is no graph of EAP-IG or MIB: it lacks {', '.join(missing)}; expected a "
            f"dictionary with {', '.join(needed)}"
        )
    theirs = _read_config(path, content["cfg"])
    writers, readers = content["src_nodes"], content["dst_nodes"]
    expected = [*theirs.writers], [_their_reader(reader) for reader in theirs.readers]
    are_lists = all(isinstance(names, (list, tuple)) for names in (writers, readers))
    if not are_lists or ([*writers], [*readers]) != expected:
        raise CircuitError(
            f"{path}: src_nodes and dst_nodes are not those of a model of {theirs.num_layers} "
            f"layers of {theirs.num_heads} heads, in their order"
        )
    if all(content.get(f"{name}_in_graph") is not None for name in ("neurons", "nodes")):
        neurons = _flags(path, content, "neurons_in_graph", (len(writers), None))
        nodes = _flags(path, content, "nodes_in_graph", (len(writers),))
        if (nodes & neurons.any(dim=-1) & ~neurons.all(dim=-1)).any():
            raise CircuitError(
                f"{path} keeps some nodes with some of their neurons only; circuits of neurons "
                "are not supported"
            )
    shape = (len(writers), len(readers))
    flags = _flags(path, content, "edges_in_graph", shape)
    exists = torch.zeros(shape, dtype=torch.bool)
    row = 0
    for site in theirs.sites:  # cells of no edge may be set there, and mean nothing
        exists[: site.num_writers, row : row + len(site.readers)] = True
        row += len(site.readers)
    kept = (flags & exists).nonzero().tolist()
    edges = [(theirs.writers[column], theirs.readers[row]) for column, row in kept]
    scores = {}
    if content.get("edges_scores") is not None:
        rows = _tensor(path, content, "edges_scores", shape).T.tolist()
        scores = {
            (writer, reader): score
            for reader, row in zip(theirs.readers, rows, strict=True)
            for writer, score in zip(theirs.writers, row, strict=True)
        }
    return _finish(path, content, theirs, edges, scores, graph)


def _tensor(
    path: Path, content: dict[str, Any], name: str, shape: tuple[int | None, ...]
) -> Tensor:
    """A tensor of a .pt file, if its numbers are there, are real and have the shape (None: any)."""
    import torch

    found = content[name]
    if not isinstance(found, torch.Tensor):
        got = type(found).__name__
    elif found.layout is not torch.strided or found.is_meta or found.is_quantized:
        got = "a sparse, quantised or meta tensor"
    elif found.is_complex():
        got = "complex"
    else:
        got = str(tuple(found.shape))
        pairs = zip(found.shape, shape, strict=False)
        if found.ndim == len(shape) and all(want in (None, size) for size, want in pairs):
            return found
    wanted = str(shape).replace("None", "any")
    raise CircuitError(f"{path}: {name} is {got}, expected a tensor of shape {wanted}")


def _flags(path: Path, content: dict[str, Any], name: str, shape: tuple[int | None, ...]) -> Tensor:
    """As `_tensor`, of bool or nothing but 0 and 1."""
    found = _tensor(path, content, name, shape)
    if not ((found == 0) | (found == 1)).all():
        raise CircuitError(f"{path}: {name} has other values than true and false (or 1 and 0)")
    return found.bool()


def _as_tensors(exported: _Exported) -> dict[str, Any]:
    import torch

    theirs = exported.theirs
    columns = {writer: column for column, writer in enumerate(theirs.writers)}
    rows = {reader: row for row, reader in enumerate(theirs.readers)}
    shape = (len(columns), len(rows))
    scores, flags = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    entries = list(exported.entries())
    at = (
        torch.tensor([columns[writer] for (writer, _), _, _ in entries]),
        torch.tensor([rows[reader] for (_, reader), _, _ in entries]),
    )
    scores[at] = torch.tensor([score for _, _, score in entries], dtype=torch.float32)
    flags[at] = torch.tensor([kept for _, kept, _ in entries])
    return {
        "cfg": exported.config,
        "src_nodes": list(theirs.writers),
        "dst_nodes": [_their_reader(reader) for reader in theirs.readers],
        "edges_scores": scores,
        "edges_in_graph": flags,
        "nodes_in_graph": torch.tensor([exported.nodes[writer] for writer in theirs.writers]),
        OURS: {**exported.ours, "scores": torch.tensor(exported.scores, dtype=torch.float64)},
    }


@dataclass(frozen=True)
class _Exported:
    """A circuit in the terms of the graph formats."""

    graph: CircuitGraph
    theirs: CircuitGraph
    kept: frozenset[Edge]
    scores: Sequence[float]
    config: dict[str, Any]
    nodes: dict[str, bool]
    ours: dict[str, Any]

    @classmethod
    def of(
        cls,
        graph: CircuitGraph,
        kept: frozenset[Edge],
        scores: Sequence[float] | None,
        d_model: int | None,
    ) -> _Exported:
        writes = {INPUT if writer in graph.embedding_writers else writer for writer, _ in kept}
        reads = {node for _, reader in kept for node in graph.nodes_fed_by(reader)}
        if not graph.embedding_writers:
            writes, reads = writes | {INPUT}, reads | set(graph.writers)
        theirs = _their_graph(graph)
        nodes = {w: w in writes and (w == INPUT or w in reads) for w in theirs.writers}
        embedding_edges = [(w, r) for w, r in kept if w in graph.embedding_writers]
        from_input = {reader for _, reader in embedding_edges}
        left_out = [
            (writer, reader)
            for reader in from_input
            for writer in graph.embedding_writers
            if (writer, reader) not in kept
        ]
        return cls(
            graph=graph,
            theirs=theirs,
            kept=kept,
            scores=[float(edge in kept) for edge in graph.edges] if scores is None else scores,
            config={
                "n_layers": graph.num_layers,
                "n_heads": graph.num_heads,
                "parallel_attn_mlp": False,
                "d_model": d_model or 0,
            },
            nodes={**nodes, LOGITS: True},
            ours={
                "graph": graph.to_dict(),
                "left_out": [list(e) for e in sorted(left_out, key=graph.edge_index)],
            },
        )

    def entries(self) -> Iterator[tuple[Edge, bool, float]]:
        """((writer, reader), kept, score) of each of their edges, readers by our kind of name."""
        for edge in self.theirs.edges:
            ours = _our_edges(edge, self.graph)
            kept = not ours or any(one in self.kept for one in ours)
            score = _largest_score(edge, self.scores, self.graph)
            yield edge, kept, float(kept) if score is None else score
