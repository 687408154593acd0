"""Graphs of EAP-IG and MIB, as JSON and as `.pt`.

The format (github.com/hannamw/EAP-IG, `Graph.to_json` and `Graph.to_pt`; MIB's circuit track reads
the same) gives every edge a score and a flag `in_graph`. Its graph is that of a model loaded with
`embedding_writers=tokens` and `split_kv_readers=true`: circuits and scores of such a model are
translated edge by edge, without loss. Other graphs of ours differ from it:

- `input` is the token embedding alone. GPT-2's position embedding belongs to no node and always
  flows. If it is a writer in our graph, its edges are not written; when a file is read, they are
  all kept, with scores of 0. Under interchange ablation they have no effect, since clean and
  corrupted prompts have the same positions. If no embedding is a writer in our graph, all `input`
  edges are written as part of the circuit, with the largest score; when a file is read, they are
  ignored.
- Every query head has its own key and value. An edge into a key or value that heads share is
  written, with its score, for every query head of its group; when a file is read, it is kept if any
  of these edges is, with the score of largest magnitude, so that what is written is read. (The
  attribution score of a shared reader is the sum over its heads; split readers have one each.)
- Flags of nodes are written but not read: EAP-IG too derives them from the edges. Circuits of
  single neurons are refused.

Under interchange ablation a circuit gives the same logits in EAP-IG and in edgeprune. Under zero
ablation it does so only in models without position embeddings and without biases of the attention's
output projection: in EAP-IG and MIB, these belong to no node and always flow. In edgeprune, as
published with Edge Pruning, a closed edge from a head does not carry the head's share of the bias,
and a closed edge from the position embedding carries nothing (with `embedding_writers=tokens`, the
position embedding always flows here as well).

Our graph, circuit and exact scores are stored under our own key, which other programs ignore. They
are read back exactly, unless another program has changed the flags or the scores.
"""

import io
import json
import logging
from collections.abc import Callable
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

log = logging.getLogger("edgeprune")

INPUT, LOGITS = "input", "logits"
OWN_KEY = "edgeprune"
"""Key below which we store what the format cannot represent."""

EXACT = "model.embedding_writers=tokens model.split_kv_readers=true"
INEXACT = (
    "differ in this model, whose query heads share keys and values, or whose embeddings always "
    f"flow; {EXACT} reads it exactly"
)
"""End of the notes that tell what could not be translated exactly."""

ZERO_ABLATION = (
    "under zero ablation, EAP-IG and MIB measure something else if the model has position "
    "embeddings or biases of the attention's output: there these always flow"
)
"""Warning for circuits under zero ablation; see above."""


def their_graph(graph: CircuitGraph) -> CircuitGraph:
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
    """[pair] each: the numbers of an edge of ours and of a corresponding edge of the format."""
    theirs = their_graph(graph)
    writers = dict(zip(graph.writers, graph.writers, strict=True))
    writers |= dict.fromkeys(graph.embedding_writers)  # None: in no node of the format
    writers |= dict.fromkeys(graph.embedding_writers[:1], INPUT)  # the token embedding
    readers = {reader: [reader] for reader in graph.readers}
    for reader in graph.readers:
        if "." in reader:  # a shared key or value becomes those of its query heads
            readers[reader] = [f"{head}.{reader[-1]}" for head in graph.nodes_fed_by(reader)]
    pairs = [
        (index, theirs.edge_index((writers[writer], their_reader)))
        for index, (writer, reader) in enumerate(graph.edges)
        if writers[writer] is not None
        for their_reader in readers[reader]
    ]
    return torch.tensor(pairs).unbind(1)


def _translate(
    values: Tensor, source: Tensor, target: Tensor, graph: CircuitGraph, unpaired: float
) -> Tensor:
    """[edge] of a graph, from one number per edge of the other graph.

    If several edges correspond to one, it gets the number of largest magnitude; if none does, it
    gets `unpaired`. `source` and `target` are the columns of `_pairs`.
    """
    start, values = values.new_full((graph.num_edges,), unpaired), values[source]
    high = start.scatter_reduce(0, target, values, "amax", include_self=False)
    low = start.scatter_reduce(0, target, values, "amin", include_self=False)
    return torch.where(high >= -low, high, low)


def load_tensors(data: bytes) -> Any:
    """The content of a .pt file; code in it is not run."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # depends on how the file is damaged
        raise ValueError("expected a .pt file of tensors, which cannot run code") from None


def read(
    content: dict[str, Any], graph: CircuitGraph, own_graph: CircuitGraph | None, name: str
) -> CircuitFile:
    """Read circuit and scores in the given graph; `own_graph` is the one below our own key.

    Raises ValueError with a message, or whatever error damaged content leads to.
    """
    config, own = content["cfg"], content.get(OWN_KEY, {}) if graph == own_graph else {}
    if config.get("parallel_attn_mlp"):
        raise ValueError("parallel_attn_mlp is set; such models are not supported")
    theirs = CircuitGraph(config["n_layers"], config["n_heads"], config["n_heads"], (INPUT,))
    if their_graph(graph) != theirs:
        raise ValueError(f"not of this model: the file has {theirs}, the model {graph}")
    parse = _parse_tensors if "src_nodes" in content else _parse_json
    in_graph, their_scores = parse(content, theirs)
    if not ((in_graph == 0) | (in_graph == 1)).all():
        raise ValueError("in_graph has values other than true and false")
    pairs, notes, exact, scores = _pairs(graph), [], None, None
    if "kept" in own:  # older files have something else
        numbers = torch.as_tensor(own["kept"], dtype=torch.int64)
        exact = torch.zeros(graph.num_edges, dtype=torch.float64).index_fill_(0, numbers, 1)
    kept, changed = _recover(in_graph.double(), exact, graph, pairs, 1, lambda kept: 1)
    if changed:
        notes.append(f"{changed:,} edges of the file {INEXACT}")
    if kept is not exact and (flowing := graph.embedding_writers[1:]):
        count = sum(writer in flowing for writer, _ in graph.edges)
        notes.append(
            f"all {count:,} edges from {', '.join(flowing)} are kept, since EAP-IG and MIB let it "
            f"always flow; {EXACT} reads the file exactly"
        )
    if their_scores is not None and not their_scores.isfinite().all():
        index = int(their_scores.isfinite().logical_not().nonzero()[0])
        notes.append(
            f"scores are not used, since that of {_their_edges(theirs)[index]} is "
            f"{their_scores[index].item()}"
        )
    elif their_scores is not None:
        exact = torch.as_tensor(own.get("scores", []), dtype=torch.float64)
        exact = exact if len(exact) == graph.num_edges else None
        values, changed = _recover(their_scores, exact, graph, pairs, 0, _largest)
        if changed:
            notes.append(f"{changed:,} scores of the file {INEXACT}")
        scores = EdgeScores(graph, values, True, {"method": "file", "file": name})
    if not in_graph.any():
        notes.append("no edge is in the graph; scores may choose some: num_edges= or sparsity=")
    circuit = Circuit.from_mask(graph, kept.bool().tolist())
    d_model = config.get("d_model") or None
    return CircuitFile(circuit, {}, tuple(notes), scores, d_model, is_eap=True)


def _recover(
    found: Tensor, exact: Tensor | None, graph: CircuitGraph, pairs: tuple[Tensor, Tensor],
    unread: float, unwritten: Callable[[Tensor], float],
) -> tuple[Tensor, int]:  # fmt: skip
    """[edge] of ours from the format's numbers, and how many of these would be written otherwise.

    Args:
        exact: the numbers below our own key, taken if the format's are still those of them.
        unread: the number of our edges that the format does not have.
        unwritten: from our numbers, the one of the format's edges that we do not have.
    """
    ours, paired = pairs

    def num_changed(values: Tensor) -> int:
        written = _translate(values, ours, paired, their_graph(graph), unwritten(values))
        return int((~torch.isclose(written, found, rtol=1e-6, atol=1e-30)).sum())  # as in files

    if exact is not None and not num_changed(exact):
        return exact, 0
    values = _translate(found, paired, ours, graph, unread)
    return values, num_changed(values)


def _largest(scores: Tensor) -> float:
    return scores.abs().max().item()


def _parse_json(content: dict[str, Any], theirs: CircuitGraph) -> tuple[Tensor, Tensor | None]:
    """[edge] each: in_graph, False for edges that the file lacks; and scores if all are numbers."""
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
    graph, theirs = circuit.graph, their_graph(circuit.graph)
    ours, paired = _pairs(graph)
    kept = torch.tensor(circuit.mask(), dtype=torch.float64)
    values = kept if scores is None else scores.magnitudes()
    in_graph = _translate(kept, ours, paired, theirs, unpaired=1).bool()
    their_scores = _translate(values, ours, paired, theirs, unpaired=_largest(values))
    config = {"n_layers": graph.num_layers, "n_heads": graph.num_heads, "parallel_attn_mlp": False}
    own = {"graph": graph.to_dict(), "kept": kept.nonzero().flatten(), "scores": values}
    content = {"cfg": config | {"d_model": d_model or 0}, OWN_KEY: own}
    write_content = _write_json if format == "eap_json" else _write_pt
    write_content(path, content, theirs, in_graph, their_scores)
    if flowing := graph.embedding_writers[1:]:
        log.info(
            f"{path}: edges from {', '.join(flowing)} are left out, since EAP-IG and MIB let it "
            "always flow; under interchange ablation this makes no difference"
        )


def _write_json(
    path: Path, content: dict[str, Any], theirs: CircuitGraph, in_graph: Tensor, scores: Tensor
) -> None:
    nodes = {name: {"in_graph": kept} for name, kept in _nodes(theirs, in_graph).items()}
    own = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in content[OWN_KEY].items()}
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
    """Whether each node of the format is in the circuit: it has edges into it and out of it."""
    circuit = Circuit.from_mask(theirs, in_graph.tolist())
    writes = {writer for writer, _ in circuit.edge_set}
    reads = {node for _, reader in circuit.edge_set for node in theirs.nodes_fed_by(reader)}
    used = writes & (reads | {INPUT})
    return {writer: writer in used for writer in theirs.writers} | {LOGITS: True}
