"""Graphs of EAP-IG and MIB, as JSON and as `.pt`.

The format (github.com/hannamw/EAP-IG, `Graph.to_json` and `Graph.to_pt`; MIB's circuit track reads
the same) gives every edge a score and a flag `in_graph`. Its graph differs from ours:

- All embeddings together are one node, `input`. An edge from it is in the graph if an edge from
  any of our embedding writers is; when read, it stands for all of them. For a model without
  embedding writers, all `input` edges are in the graph, and are ignored when read.
- Every query head has its own key and value. An edge into a shared key/value head is written for
  every query head of its group; when read, it is kept if any of them is.
- Only edges matter. Flags and scores of nodes are written but not read: EAP-IG too derives them
  from the edges. Circuits of single neurons are refused.

What the format cannot represent (our graph, the embeddings that an `input` edge does not stand
for, and exact scores) is stored under our own key, which other programs ignore. Circuits and
scores that we wrote are therefore read back exactly.

Functions that read raise ValueError with a message, or whatever error damaged content leads to.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.files import write_atomically
from edgeprune.formats.edges_json import UNKNOWN_MODEL, CircuitFile
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

INPUT, LOGITS = "input", "logits"
OWN_KEY = "edgeprune"
"""Key of what the format cannot represent."""


# ------------------------------------------------------------------------------ the two graphs


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
    num_writers = torch.tensor([site.num_writers for site in theirs.sites for _ in site.readers])
    columns = torch.arange(len(num_writers)).repeat_interleave(num_writers)
    return torch.tensor(theirs.edge_writers()), columns


class _Pairs:
    """Translates numbers per edge between our graph and the format's."""

    def __init__(self, graph: CircuitGraph) -> None:
        self.graph, self.theirs = graph, _their_graph(graph)
        expanded = {  # a shared key or value -> those of its query heads
            reader: [f"{head}.{reader[-1]}" for head in graph.nodes_fed_by(reader)]
            if "." in reader
            else [reader]
            for reader in graph.readers
        }
        ours, theirs = [], []
        for index, (writer, shared) in enumerate(graph.edges):
            writer = INPUT if writer in graph.embedding_writers else writer
            for reader in expanded[shared]:
                ours.append(index)
                theirs.append(self.theirs.edge_index((writer, reader)))
        self._ours, self._theirs = torch.tensor(ours), torch.tensor(theirs)
        """[pair] each: indices of two edges that stand for each other."""
        self.always = torch.ones(self.theirs.num_edges, dtype=torch.bool)
        """[edge] of the format's graph: whether it stands for embeddings that always flow."""
        self.always[self._theirs] = False

    def to_theirs(self, values: Tensor) -> Tensor:
        """[edge] of the format's graph; 1 for embeddings that always flow."""
        found = _largest(values[self._ours], self._theirs, self.theirs.num_edges)
        return found.masked_fill(self.always, 1)

    def to_ours(self, values: Tensor) -> Tensor:
        """[edge] of our graph."""
        return _largest(values[self._theirs], self._ours, self.graph.num_edges)


def _largest(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size], the value of largest magnitude among those with the same index; 0 without any."""
    zeros = values.new_zeros(size)
    high = zeros.scatter_reduce(0, index, values, "amax")
    low = zeros.scatter_reduce(0, index, values, "amin")
    return torch.where(high >= -low, high, low)


def _merged(graph: CircuitGraph) -> list[int]:
    """Indices of our edges that share one edge of the format: those from several embeddings."""
    embeddings = graph.embedding_writers if len(graph.embedding_writers) > 1 else ()
    return [index for index, (writer, _) in enumerate(graph.edges) if writer in embeddings]


# -------------------------------------------------------------------------------------- reading


def load_tensors(data: bytes) -> Any:
    """The content of a .pt file, which cannot run code."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # depends on how the file is damaged
        raise ValueError(
            "not a .pt file of plain values and tensors; no others are loaded, since they can run "
            "code"
        ) from None


def read(content: dict[str, Any], graph: CircuitGraph | None, name: str) -> CircuitFile:
    """The circuit and scores in our graph: the given one, or the one under our own key."""
    config, own = content["cfg"], content.get(OWN_KEY)
    if config.get("parallel_attn_mlp"):
        raise ValueError("parallel_attn_mlp is set; such models are not supported")
    theirs = CircuitGraph(config.get("n_layers"), heads := config.get("n_heads"), heads, (INPUT,))
    own_graph = own and CircuitGraph.from_dict(own["graph"])
    target = graph or own_graph
    if target is None:
        raise ValueError(UNKNOWN_MODEL)
    for model in (target, own_graph or target):
        if _their_graph(model) != theirs:
            raise ValueError(
                f"not a circuit of this model: the file has {theirs.num_layers} layers of "
                f"{heads} heads, the model {model.num_layers} layers of {model.num_heads} heads"
            )
    parse = _parse_tensors if "src_nodes" in content else _parse_json
    in_graph, their_scores = parse(content, theirs)
    if not ((in_graph == 0) | (in_graph == 1)).all():
        raise ValueError("in_graph has values other than true and false")
    in_graph, pairs = in_graph.double(), _Pairs(target)
    kept, scores, notes = pairs.to_ours(in_graph).bool(), None, []
    if changed := int((pairs.to_theirs(kept.double()) != in_graph).sum()):
        notes.append(
            f"{changed:,} edges of the file differ in this model, whose query heads share keys and "
            "values, or whose embeddings always flow"
        )
    if their_scores is not None and their_scores.isfinite().all():
        values = pairs.to_ours(their_scores)
        if target == own_graph and own.get("scores") is not None:
            values = _exact(own["scores"], values, their_scores, pairs)
        origin = {"method": "file", "file": name}
        scores = EdgeScores(target, values, by_magnitude=True, origin=origin)
    if target == own_graph:
        kept[[target.edge_index(tuple(edge)) for edge in own["left_out"]]] = False
    if not kept.any():
        notes.append("no edge is in the graph; scores may choose some: num_edges= or sparsity=")
    circuit = Circuit.from_mask(target, kept.tolist())
    return CircuitFile(circuit, {}, tuple(notes), scores, config.get("d_model") or None)


def _parse_json(content: dict[str, Any], theirs: CircuitGraph) -> tuple[Tensor, Tensor | None]:
    """[edge] each: in_graph, and scores if all are numbers. Edges not listed are not in the graph.

    Older files list nodes as bare flags.
    """
    nodes = [node for node in content.get("nodes", {}).values() if isinstance(node, dict)]
    _check_neurons(any(n.get("in_graph") and not all(n.get("neurons") or ()) for n in nodes))
    edges, names = content["edges"], _their_edges(theirs)
    if unknown := edges.keys() - set(names):
        raise ValueError(
            f"there is no edge {min(unknown)!r} in a model of {theirs.num_layers} layers of "
            f"{theirs.num_heads} heads; expected names such as {names[0]!r} and {names[-1]!r}"
        )
    entries = [edges.get(name, {"in_graph": False}) for name in names]
    scores = [entry.get("score") for entry in entries]
    numbers = all(type(score) in (int, float) for score in scores)
    return (
        torch.tensor([entry["in_graph"] for entry in entries]),
        torch.tensor(scores, dtype=torch.float64) if numbers else None,
    )


def _parse_tensors(content: dict[str, Any], theirs: CircuitGraph) -> tuple[Tensor, Tensor | None]:
    """[edge] each: in_graph and scores. Cells without an edge may be set, and are ignored."""
    names = [list(theirs.writers), [_their_reader(reader) for reader in theirs.readers]]
    if [list(content["src_nodes"]), list(content["dst_nodes"])] != names:
        raise ValueError("src_nodes and dst_nodes are not those of n_layers and n_heads, in order")
    if (neurons := content.get("neurons_in_graph")) is not None:
        partly = neurons.bool().any(dim=1) & ~neurons.bool().all(dim=1)
        _check_neurons((content["nodes_in_graph"].bool() & partly).any())
    matrices = [content["edges_in_graph"], content.get("edges_scores")]
    for matrix in matrices:
        if matrix is not None and list(matrix.shape) != [len(part) for part in names]:
            raise ValueError(f"a matrix of edges is {list(matrix.shape)}, not [writer, reader]")
    in_graph, scores = (matrix if matrix is None else matrix[_cells(theirs)] for matrix in matrices)
    return in_graph, None if scores is None else scores.double()


def _check_neurons(some_partly: bool) -> None:
    if some_partly:
        raise ValueError("circuits of neurons are not supported: some nodes keep only some of them")


def _exact(own: Any, scores: Tensor, their_scores: Tensor, pairs: _Pairs) -> Tensor:
    """[edge], our exact scores, unless the format's were changed since they were written."""
    merged, exact = _merged(pairs.graph), scores.clone()
    place = merged if len(own) == len(merged) else slice(None)
    exact[place] = torch.as_tensor(own, dtype=torch.float64)
    same = torch.isclose(their_scores, pairs.to_theirs(exact), rtol=1e-6, atol=1e-30)
    return exact if (same | pairs.always).all() else scores


# -------------------------------------------------------------------------------------- writing


def write_json(
    circuit: Circuit, path: Path, scores: EdgeScores | None, d_model: int | None
) -> None:
    """Write a graph as JSON, edge by edge: a model of 13B parameters has four million."""
    content, in_graph, values = _content(circuit, scores, d_model)
    nodes = {name: {"in_graph": kept} for name, kept in content["nodes"].items()}
    own = content[OWN_KEY]
    own |= {"scores": own["scores"][_merged(circuit.graph)].tolist()}
    names = _their_edges(_their_graph(circuit.graph))

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(f'{{"cfg": {json.dumps(content["cfg"])},\n"nodes": {json.dumps(nodes)},\n')
            file.write(f'"{OWN_KEY}": {json.dumps(own)},\n"edges": {{')
            end = "\n"
            for name, flag, score in zip(names, in_graph.tolist(), values.tolist(), strict=True):
                file.write(f'{end}"{name}": {json.dumps({"score": score, "in_graph": flag})}')
                end = ",\n"
            file.write("\n}}\n")

    write_atomically(path, write)


def write_pt(circuit: Circuit, path: Path, scores: EdgeScores | None, d_model: int | None) -> None:
    """Write a graph as tensors."""
    content, in_graph, values = _content(circuit, scores, d_model)
    theirs = _their_graph(circuit.graph)
    flags = torch.zeros(theirs.num_writers, len(theirs.readers), dtype=torch.bool)
    matrix = torch.zeros(flags.shape)
    flags[_cells(theirs)], matrix[_cells(theirs)] = in_graph, values.float()
    tensors = {
        "cfg": content["cfg"],
        "src_nodes": list(theirs.writers),
        "dst_nodes": [_their_reader(reader) for reader in theirs.readers],
        "edges_scores": matrix,
        "edges_in_graph": flags,
        "nodes_in_graph": torch.tensor([content["nodes"][writer] for writer in theirs.writers]),
        OWN_KEY: content[OWN_KEY],
    }
    buffer = io.BytesIO()  # torch does not say why writing to a file failed
    torch.save(tensors, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _content(
    circuit: Circuit, scores: EdgeScores | None, d_model: int | None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What both kinds of file hold: `cfg`, our own key, flags of nodes; [edge] flags and scores."""
    graph, pairs = circuit.graph, _Pairs(circuit.graph)
    kept = torch.tensor(circuit.mask(), dtype=torch.float64)
    values = kept if scores is None else scores.magnitudes()
    in_graph = pairs.to_theirs(kept)
    left_out = (pairs.to_ours(in_graph) > kept).nonzero().flatten().tolist()
    config = {
        "n_layers": graph.num_layers,
        "n_heads": graph.num_heads,
        "parallel_attn_mlp": False,
        "d_model": d_model or 0,
    }
    own = {
        "graph": graph.to_dict(),
        "left_out": [list(graph.edges[index]) for index in left_out],
        "scores": values,
    }
    flags = in_graph.bool()
    content = {"cfg": config, OWN_KEY: own, "nodes": _nodes(pairs.theirs, flags)}
    return content, flags, pairs.to_theirs(values)


def _nodes(theirs: CircuitGraph, in_graph: Tensor) -> dict[str, bool]:
    """Whether each node of the format's graph is in it: nodes that both read and write."""
    circuit = Circuit.from_mask(theirs, in_graph.tolist())
    writes = {writer for writer, _ in circuit.edge_set}
    reads = {node for _, reader in circuit.edge_set for node in theirs.nodes_fed_by(reader)}
    return {w: w in writes and w in reads | {INPUT} for w in theirs.writers} | {LOGITS: True}
