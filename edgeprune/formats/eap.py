"""Graphs of EAP-IG and MIB, as JSON and as `.pt`.

The format (github.com/hannamw/EAP-IG, `Graph.to_json` and `Graph.to_pt`; MIB's circuit track reads
the same) gives every edge a score and a flag `in_graph`. Its graph differs from ours:

- All embeddings together are one node, `input`. An edge from it is in the graph if an edge from
  any of our embedding writers is; when read, it stands for all of them. For a model without
  embedding writers, all `input` edges are in the graph, and are ignored when read.
- Every query head has its own key and value. An edge into a shared key/value head is written for
  every query head of its group; when read, it is kept if any of them is.
- Flags of nodes are written but not read: EAP-IG too derives them from the edges. Circuits of
  single neurons are refused.

What the format cannot represent (our graph, the embeddings that an `input` edge does not stand
for, and exact scores) is stored under our own key, which other programs ignore. Circuits and
scores that we wrote are therefore read back exactly.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.files import write_atomically, write_text
from edgeprune.formats.edges_json import CircuitFile
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

INPUT, LOGITS = "input", "logits"
OWN_KEY = "edgeprune"
"""Key of what the format cannot represent."""


def _their_graph(graph: CircuitGraph) -> CircuitGraph:
    """The format's graph of a model. Its readers have our names; see `_their_reader`."""
    return replace(graph, num_kv_heads=graph.num_heads, embedding_writers=(INPUT,))


def _their_reader(reader: str) -> str:
    """'a0.h1.q' -> 'a0.h1<q>', 'resid_post' -> 'logits', 'm0' -> 'm0'."""
    if reader == "resid_post":
        return LOGITS
    node, _, kind = reader.rpartition(".")
    return f"{node}<{kind}>" if node else reader


def _their_edges(theirs: CircuitGraph) -> list[str]:
    names = {reader: _their_reader(reader) for reader in theirs.readers}
    return [f"{writer}->{names[reader]}" for writer, reader in theirs.edges]


def _cells(theirs: CircuitGraph) -> tuple[Tensor, Tensor]:
    """[edge] each: the row (writer) and column (reader) of an edge in the format's matrices."""
    columns = {reader: index for index, reader in enumerate(theirs.readers)}
    return torch.tensor(theirs.edge_writers()), torch.tensor([columns[r] for _, r in theirs.edges])


def _pairs(graph: CircuitGraph) -> tuple[Tensor, Tensor]:
    """[pair] each: indices of an edge of ours and one of the format's that stand for each other."""
    theirs, writers = _their_graph(graph), dict.fromkeys(graph.embedding_writers, INPUT)
    readers = {reader: [reader] for reader in graph.readers}
    for reader in graph.readers:
        if "." in reader:  # a shared key or value becomes those of its query heads
            readers[reader] = [f"{head}.{reader[-1]}" for head in graph.nodes_fed_by(reader)]
    pairs = [
        (index, theirs.edge_index((writers.get(writer, writer), their_reader)))
        for index, (writer, reader) in enumerate(graph.edges)
        for their_reader in readers[reader]
    ]
    return torch.tensor(pairs).unbind(1)


def _translate(values: Tensor, source: Tensor, target: Tensor, graph: CircuitGraph) -> Tensor:
    """[edge] of a graph, from one number per edge of the other graph.

    Where several edges stand for one, the number of largest magnitude; 1 where none does, for
    embeddings that always flow. `source` and `target` are the columns of `_pairs`.
    """
    ones, values = values.new_ones(graph.num_edges), values[source]
    high = ones.scatter_reduce(0, target, values, "amax", include_self=False)
    low = ones.scatter_reduce(0, target, values, "amin", include_self=False)
    return torch.where(high >= -low, high, low)


def load_tensors(data: bytes) -> Any:
    """The content of a .pt file, which cannot run code."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # depends on how the file is damaged
        raise ValueError("expected a .pt file of tensors, which cannot run code") from None


def read(
    content: dict[str, Any], graph: CircuitGraph, own_graph: CircuitGraph | None, name: str
) -> CircuitFile:
    """The circuit and scores in the given graph; `own_graph` is the one under our own key.

    Raises ValueError with a message, or whatever error damaged content leads to.
    """
    config, own = content["cfg"], content.get(OWN_KEY)
    if config.get("parallel_attn_mlp"):
        raise ValueError("parallel_attn_mlp is set; such models are not supported")
    theirs = CircuitGraph(config["n_layers"], config["n_heads"], config["n_heads"], (INPUT,))
    if _their_graph(graph) != theirs:
        raise ValueError(f"not of this model: the file has {theirs}, the model {graph}")
    parse = _parse_tensors if "src_nodes" in content else _parse_json
    in_graph, their_scores = parse(content, theirs)
    if not ((in_graph == 0) | (in_graph == 1)).all():
        raise ValueError("in_graph has values other than true and false")
    ours, paired = _pairs(graph)
    kept, notes, scores = _translate(in_graph.int(), paired, ours, graph), [], None
    if changed := int((_translate(kept, ours, paired, theirs) != in_graph).sum()):
        reason = "whose query heads share keys and values, or whose embeddings always flow"
        notes.append(f"{changed:,} edges of the file differ in this model, {reason}")
    if their_scores is not None and their_scores.isfinite().all():
        values = _translate(their_scores, paired, ours, graph)
        exact = own.get("scores", []) if graph == own_graph else []
        exact = torch.as_tensor(exact, dtype=torch.float64)
        if len(exact) == graph.num_edges:  # older files have fewer
            written = _translate(exact, ours, paired, theirs)
            if torch.isclose(their_scores, written, rtol=1e-6, atol=1e-30).all():  # unchanged
                values = exact
        scores = EdgeScores(graph, values, True, {"method": "file", "file": name})
    if graph == own_graph:
        kept[[graph.edge_index(edge) for edge in own["left_out"]]] = 0
    if not kept.any():
        notes.append("no edge is in the graph; scores may choose some: num_edges= or sparsity=")
    circuit = Circuit.from_mask(graph, kept.tolist())
    return CircuitFile(circuit, {}, tuple(notes), scores, config.get("d_model") or None)


def _parse_json(content: dict[str, Any], theirs: CircuitGraph) -> tuple[Tensor, Tensor | None]:
    """[edge] each: in_graph, where the file lists the edge; and scores if all are numbers."""
    nodes = [n for n in content.get("nodes", {}).values() if isinstance(n, dict)]  # or bare flags
    _check_neurons(any(n.get("in_graph") and not all(n.get("neurons") or ()) for n in nodes))
    edges, names = content["edges"], _their_edges(theirs)
    if unknown := edges.keys() - set(names):
        raise ValueError(f"no edge {min(unknown)!r}; expected {names[0]!r} ... {names[-1]!r}")
    entries = [edges.get(name, {"in_graph": False}) for name in names]
    in_graph = torch.tensor([entry["in_graph"] for entry in entries])
    scores = [entry.get("score") for entry in entries]
    numbers = all(type(score) in (int, float) for score in scores)
    return in_graph, torch.tensor(scores, dtype=torch.float64) if numbers else None


def _parse_tensors(content: dict[str, Any], theirs: CircuitGraph) -> tuple[Tensor, Tensor | None]:
    """[edge] each: in_graph and scores. Cells without an edge may be set, and are ignored."""
    readers = [_their_reader(reader) for reader in theirs.readers]
    if [list(content["src_nodes"]), list(content["dst_nodes"])] != [list(theirs.writers), readers]:
        raise ValueError("src_nodes and dst_nodes are not those of n_layers and n_heads, in order")
    if content.get("neurons_in_graph") is not None:
        neurons = content["neurons_in_graph"].bool()
        partly = neurons.any(dim=1) & ~neurons.all(dim=1)
        _check_neurons((content["nodes_in_graph"].bool() & partly).any())
    cells, scores = _cells(theirs), content.get("edges_scores")
    return content["edges_in_graph"][cells], None if scores is None else scores[cells].double()


def _check_neurons(some_partly: bool) -> None:
    if some_partly:
        raise ValueError("circuits of neurons are not supported: some nodes keep only some of them")


def write(
    circuit: Circuit, path: Path, format: str, scores: EdgeScores | None, d_model: int | None
) -> None:
    """Write a graph, as JSON with one edge per line for "eap_json", else as tensors."""
    graph, theirs = circuit.graph, _their_graph(circuit.graph)
    ours, paired = _pairs(graph)
    kept = torch.tensor(circuit.mask(), dtype=torch.float64)
    values = kept if scores is None else scores.magnitudes()
    in_graph = _translate(kept, ours, paired, theirs)
    extra = (_translate(in_graph, paired, ours, graph) > kept).nonzero().flatten().tolist()
    left_out = [list(graph.edges[index]) for index in extra]
    config = {"n_layers": graph.num_layers, "n_heads": graph.num_heads, "parallel_attn_mlp": False}
    own = {"graph": graph.to_dict(), "left_out": left_out, "scores": values}
    content = {"cfg": config | {"d_model": d_model or 0}, OWN_KEY: own}
    write_content = _write_json if format == "eap_json" else _write_pt
    write_content(path, content, theirs, in_graph.bool(), _translate(values, ours, paired, theirs))


def _write_json(
    path: Path, content: dict[str, Any], theirs: CircuitGraph, in_graph: Tensor, scores: Tensor
) -> None:
    nodes = {name: {"in_graph": kept} for name, kept in _nodes(theirs, in_graph).items()}
    own = content[OWN_KEY] | {"scores": content[OWN_KEY]["scores"].tolist()}
    entries = zip(_their_edges(theirs), scores.tolist(), in_graph.tolist(), strict=True)
    lines = (f'"{name}": {json.dumps({"score": s, "in_graph": k})}' for name, s, k in entries)
    edges = ",\n".join(lines)
    parts = {"cfg": content["cfg"], "nodes": nodes, OWN_KEY: own}
    start = "".join(f'"{name}": {json.dumps(part)},\n' for name, part in parts.items())
    write_text(path, f'{{{start}"edges": {{\n{edges}\n}}}}\n')


def _write_pt(
    path: Path, content: dict[str, Any], theirs: CircuitGraph, in_graph: Tensor, scores: Tensor
) -> None:
    flags = torch.zeros(theirs.num_writers, len(theirs.readers), dtype=torch.bool)
    matrix, cells = torch.zeros(flags.shape), _cells(theirs)
    flags[cells], matrix[cells] = in_graph, scores.float()
    nodes = _nodes(theirs, in_graph)
    tensors = {
        "cfg": content["cfg"], "src_nodes": list(theirs.writers),
        "dst_nodes": [_their_reader(reader) for reader in theirs.readers],
        "edges_scores": matrix, "edges_in_graph": flags,
        "nodes_in_graph": torch.tensor([nodes[writer] for writer in theirs.writers]),
        OWN_KEY: content[OWN_KEY],
    }  # fmt: skip
    buffer = io.BytesIO()  # torch does not say why writing to a file failed
    torch.save(tensors, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _nodes(theirs: CircuitGraph, in_graph: Tensor) -> dict[str, bool]:
    """Whether each node of the format's graph is in it: nodes that both read and write."""
    circuit = Circuit.from_mask(theirs, in_graph.tolist())
    writes = {writer for writer, _ in circuit.edge_set}
    reads = {node for _, reader in circuit.edge_set for node in theirs.nodes_fed_by(reader)}
    used = writes & (reads | {INPUT})
    return {writer: writer in used for writer in theirs.writers} | {LOGITS: True}
