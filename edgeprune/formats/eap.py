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
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.files import write_atomically
from edgeprune.formats.circuit_file import UNKNOWN_MODEL, CircuitFile
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

INPUT, LOGITS = "input", "logits"
OWN_KEY = "edgeprune"
"""Key of what the format cannot represent."""
NO_NEURONS = "some nodes keep only some of their neurons; circuits of neurons are not supported"
"""Message for a circuit of single neurons."""


@dataclass(frozen=True)
class _Content:
    """What both kinds of file hold.

    Attributes:
        config: `cfg`.
        theirs: the format's graph. Its readers have our names; see `_their_reader`.
        kept: [edge] of the format's graph, bool.
        scores: [edge] of the format's graph, float64; NaN where the file has no number.
        own: what is under our own key.
    """

    config: dict[str, Any]
    theirs: CircuitGraph
    kept: Tensor
    scores: Tensor
    own: dict[str, Any] | None


# ------------------------------------------------------------------------------ the two graphs


def _their_graph(graph: CircuitGraph) -> CircuitGraph:
    return replace(graph, num_kv_heads=graph.num_heads, embedding_writers=(INPUT,))


def _their_reader(reader: str) -> str:
    """'a0.h1.q' -> 'a0.h1<q>', 'resid_post' -> 'logits', 'm0' -> 'm0'."""
    if reader == "resid_post":
        return LOGITS
    node, _, kind = reader.rpartition(".")
    return f"{node}<{kind}>" if node else reader


def _pairs(graph: CircuitGraph) -> tuple[Tensor, Tensor]:
    """[pair] each: indices of an edge of ours and one of the format's that stand for each other."""
    theirs, embeddings = _their_graph(graph), graph.embedding_writers
    expanded = {  # a shared key or value -> those of its query heads
        reader: [f"{head}.{reader[-1]}" for head in graph.nodes_fed_by(reader)]
        if "." in reader
        else [reader]
        for reader in graph.readers
    }
    ours, paired = [], []
    for index, (writer, shared) in enumerate(graph.edges):
        for reader in expanded[shared]:
            ours.append(index)
            paired.append(theirs.edge_index((INPUT if writer in embeddings else writer, reader)))
    return torch.tensor(ours), torch.tensor(paired)


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


def _cells(theirs: CircuitGraph) -> tuple[Tensor, Tensor]:
    """[edge] each: the row (writer) and column (reader) of an edge in the format's matrices."""
    num_writers = torch.tensor([site.num_writers for site in theirs.sites for _ in site.readers])
    columns = torch.arange(len(num_writers)).repeat_interleave(num_writers)
    return torch.tensor(theirs.edge_writers()), columns


# -------------------------------------------------------------------------------------- reading


def read_json(name: str, content: dict[str, Any], graph: CircuitGraph | None) -> CircuitFile:
    """Read a graph in JSON. Edges that it does not list are not in the graph."""
    theirs = _parse_config(content["cfg"])
    nodes = [node for node in content.get("nodes", {}).values() if isinstance(node, dict)]
    if any(node.get("in_graph") and not all(node.get("neurons") or ()) for node in nodes):
        raise ValueError(NO_NEURONS)
    readers = {_their_reader(reader): reader for reader in theirs.readers}
    kept, scores = [False] * theirs.num_edges, [math.nan] * theirs.num_edges
    for edge, entry in content["edges"].items():
        writer, _, reader = edge.partition("->")
        try:
            index = theirs.edge_index((writer, readers.get(reader)))
        except ValueError:
            raise ValueError(
                f"there is no edge {edge!r} in a model of {_counts(theirs)}; expected names such "
                "as 'input->a0.h0<q>', 'a0.h0->m0' and 'm0->logits'"
            ) from None
        if entry["in_graph"] not in (True, False):
            raise ValueError(f"'in_graph' of edge {edge!r} is neither true nor false")
        kept[index] = bool(entry["in_graph"])
        if type(entry.get("score")) in (int, float):
            scores[index] = float(entry["score"])
    flags, values = torch.tensor(kept), torch.tensor(scores, dtype=torch.float64)
    return _read(name, _Content(content["cfg"], theirs, flags, values, content.get(OWN_KEY)), graph)


def read_pt(name: str, data: bytes, graph: CircuitGraph | None) -> CircuitFile:
    """Read a graph in tensors. Cells that belong to no edge may be set, and are ignored."""
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # depends on how the file is damaged
        reason = re.split(r"\n|\. ", str(error).strip())[0][:200]
        raise ValueError(
            "not a .pt file of plain values and tensors; no others are loaded, since they can run "
            f"code ({type(error).__name__}: {reason})"
        ) from None
    theirs = _parse_config(content["cfg"])
    writers, readers = list(theirs.writers), [_their_reader(reader) for reader in theirs.readers]
    if [list(content["src_nodes"]), list(content["dst_nodes"])] != [writers, readers]:
        raise ValueError(f"src_nodes and dst_nodes are not those of {_counts(theirs)}, in order")
    nodes, neurons = content.get("nodes_in_graph"), content.get("neurons_in_graph")
    if nodes is not None and neurons is not None:
        partly = neurons.bool().any(dim=1) & ~neurons.bool().all(dim=1)
        if (nodes.bool() & partly).any():
            raise ValueError(NO_NEURONS)
    shape, cells = (len(writers), len(readers)), _cells(theirs)
    kept = _tensor(content, "edges_in_graph", shape)[cells]
    if not ((kept == 0) | (kept == 1)).all():
        raise ValueError("edges_in_graph has values other than true and false (or 1 and 0)")
    scores = torch.full((theirs.num_edges,), torch.nan, dtype=torch.float64)
    if content.get("edges_scores") is not None:
        scores = _tensor(content, "edges_scores", shape)[cells].double()
    own = content.get(OWN_KEY)
    return _read(name, _Content(content["cfg"], theirs, kept.bool(), scores, own), graph)


def _counts(graph: CircuitGraph) -> str:
    return f"{graph.num_layers} layers of {graph.num_heads} heads"


def _parse_config(config: dict[str, Any]) -> CircuitGraph:
    if config.get("parallel_attn_mlp"):
        raise ValueError(
            "parallel_attn_mlp is set; models whose MLP does not read the heads of its own layer "
            "are not supported"
        )
    layers, heads = config.get("n_layers"), config.get("n_heads")
    return CircuitGraph(layers, heads, heads, (INPUT,))


def _tensor(content: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    found = content[name]
    if found.shape != shape or found.is_complex() or found.layout is not torch.strided:
        raise ValueError(
            f"{name} is a tensor of shape {list(found.shape)}, {found.dtype} and {found.layout}, "
            f"expected a dense one of real numbers of shape {list(shape)}"
        )
    return found


def _read(name: str, content: _Content, graph: CircuitGraph | None) -> CircuitFile:
    """The circuit and scores in our graph: the given one, or the one under our own key."""
    theirs, own = content.theirs, content.own
    written_from = None if own is None else CircuitGraph.from_dict(own["graph"])
    target = graph or written_from
    if target is None:
        raise ValueError(UNKNOWN_MODEL)
    for model in (target, written_from or target):
        if _their_graph(model) != theirs:
            raise ValueError(
                f"not a circuit of this model: the file has {_counts(theirs)}, the model "
                f"{_counts(model)}"
            )
    ours, paired = _pairs(target)
    kept = torch.zeros(target.num_edges, dtype=torch.bool)
    kept[ours[content.kept[paired]]] = True
    scores, notes = None, _losses(content, target, ours, paired)
    if content.scores.isfinite().all():
        scores = _largest(content.scores[paired], ours, target.num_edges)
    if target == written_from:
        for writer, reader in own["left_out"]:
            kept[target.edge_index((writer, reader))] = False
        if scores is not None and own.get("scores") is not None:  # older files have none
            scores = _own_scores(own["scores"], scores, content, ours, paired, target)
    elif kept[_merged(target)].any():
        notes.append(f"edges from the input are kept from {' and '.join(target.embedding_writers)}")
    if not kept.any():
        choose = "" if scores is None else "; choose edges by score with num_edges= or sparsity="
        notes.append(f"no edge is in the graph{choose}")
    if scores is not None:
        scores = EdgeScores(
            target, scores, by_magnitude=True, origin={"method": "file", "file": name}
        )
    circuit, d_model = Circuit.from_mask(target, kept.tolist()), content.config.get("d_model")
    d_model = d_model if type(d_model) is int and d_model > 0 else None
    return CircuitFile(circuit, notes=tuple(notes), scores=scores, d_model=d_model)


def _own_scores(
    own: Any, scores: Tensor, content: _Content, ours: Tensor, paired: Tensor, graph: CircuitGraph
) -> Tensor:
    """[edge], our exact scores, unless the format's were changed since they were written."""
    merged, exact = _merged(graph), scores.clone()
    exact[merged if len(own) == len(merged) else slice(None)] = torch.as_tensor(
        own, dtype=torch.float64
    )
    written = _largest(exact[ours], paired, len(content.scores))[paired]
    agree = torch.isclose(content.scores[paired], written, rtol=1e-6, atol=1e-30).all()
    return exact if agree else scores


def _losses(content: _Content, graph: CircuitGraph, ours: Tensor, paired: Tensor) -> list[str]:
    """Notes on kept or left-out edges that our graph cannot represent."""
    num_kept = ours[content.kept[paired]].bincount(minlength=graph.num_edges)
    partly = int(((num_kept > 0) & (num_kept < ours.bincount())).sum())
    always = int((~content.kept.index_fill(0, paired, True)).sum())
    notes = []
    if partly:
        notes.append(
            f"{partly:,} edges into a shared key or value head are in the graph for only some of "
            f"its {graph.heads_per_kv_head} query heads; they are kept"
        )
    if always:
        notes.append(
            f"{always:,} edges from the input are not in the graph, but the embeddings of this "
            "model always flow (model.embedding_writers=false)"
        )
    return notes


# -------------------------------------------------------------------------------------- writing


def write_json(
    circuit: Circuit, path: Path, scores: EdgeScores | None, d_model: int | None
) -> None:
    """Write a graph as JSON, edge by edge: a model of 13B parameters has four million."""
    content = _to_content(circuit, scores, d_model)
    nodes = {name: {"in_graph": kept} for name, kept in _nodes(content).items()}
    own = content.own | {"scores": content.own["scores"][_merged(circuit.graph)].tolist()}
    kept, values = content.kept.tolist(), content.scores.tolist()

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(f'{{"cfg": {json.dumps(content.config)},\n"nodes": {json.dumps(nodes)},\n')
            file.write(f'"{OWN_KEY}": {json.dumps(own)},\n"edges": {{')
            end = "\n"
            for edge, flag, score in zip(content.theirs.edges, kept, values, strict=True):
                entry = json.dumps({"score": score, "in_graph": flag})
                file.write(f'{end}"{edge[0]}->{_their_reader(edge[1])}": {entry}')
                end = ",\n"
            file.write("\n}}\n")

    write_atomically(path, write)


def write_pt(circuit: Circuit, path: Path, scores: EdgeScores | None, d_model: int | None) -> None:
    """Write a graph as tensors."""
    content = _to_content(circuit, scores, d_model)
    theirs, nodes, cells = content.theirs, _nodes(content), _cells(content.theirs)
    flags = torch.zeros(theirs.num_writers, len(theirs.readers), dtype=torch.bool)
    values = torch.zeros(flags.shape)
    flags[cells], values[cells] = content.kept, content.scores.float()
    buffer = io.BytesIO()  # torch does not say why writing to a file failed
    torch.save(
        {
            "cfg": content.config,
            "src_nodes": list(theirs.writers),
            "dst_nodes": [_their_reader(reader) for reader in theirs.readers],
            "edges_scores": values,
            "edges_in_graph": flags,
            "nodes_in_graph": torch.tensor([nodes[writer] for writer in theirs.writers]),
            OWN_KEY: content.own,
        },
        buffer,
    )
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _to_content(circuit: Circuit, scores: EdgeScores | None, d_model: int | None) -> _Content:
    graph, theirs = circuit.graph, _their_graph(circuit.graph)
    ours, paired = _pairs(graph)
    kept = torch.tensor(circuit.mask(), dtype=torch.float64)
    values = kept if scores is None else scores.magnitudes()
    always = torch.ones(theirs.num_edges, dtype=torch.bool).index_fill(0, paired, False)
    embeddings = graph.embedding_writers
    from_input = {reader for writer, reader in circuit.edge_set if writer in embeddings}
    left_out = [
        [writer, reader]
        for writer, reader in graph.edges
        if writer in embeddings and reader in from_input and (writer, reader) not in circuit
    ]
    return _Content(
        config={
            "n_layers": graph.num_layers,
            "n_heads": graph.num_heads,
            "parallel_attn_mlp": False,
            "d_model": d_model or 0,
        },
        theirs=theirs,
        kept=_largest(kept[ours], paired, theirs.num_edges).bool() | always,
        scores=_largest(values[ours], paired, theirs.num_edges).masked_fill(always, 1.0),
        own={"graph": graph.to_dict(), "left_out": left_out, "scores": values},
    )


def _nodes(content: _Content) -> dict[str, bool]:
    """Whether each node of the format's graph is in it: nodes that both read and write."""
    edges = [edge for edge, kept in zip(content.theirs.edges, content.kept.tolist()) if kept]  # noqa: B905
    writes = {writer for writer, _ in edges}
    reads = {node for _, reader in edges for node in content.theirs.nodes_fed_by(reader)} | {INPUT}
    return {w: w in writes and w in reads for w in content.theirs.writers} | {LOGITS: True}
