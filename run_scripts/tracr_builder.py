"""Build compiled transformers from hand-written programs, in the format of `models/tracr.py`.

Every dimension of the residual stream has a label. The embeddings write `tokens:x` (one-hot),
`indices:i` (one-hot; BOS has no index) and `one` (1 everywhere); heads and MLP units write the
labels that the program gives them, each label from one node. So it is known by construction which
node reads from which.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.files import write_atomically, write_json, write_text
from edgeprune.graph import CircuitGraph, Edge

BOS, PAD, ONE = "BOS", "compiler_pad", "one"
SHARP = 100.0
"""Attention score of a match; the softmax of such scores is exactly one-hot in float32."""


@dataclass(frozen=True)
class Head:
    """An attention head, which selects positions and averages over them.

    Attributes:
        match: triples (query label, key label, score); the attention score is the sum of
            score * query * key over them.
        copy: triples (value label, written label, factor).
    """

    match: tuple[tuple[str, str, float], ...]
    copy: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Unit:
    """A hidden unit of an MLP: relu(sum of factor * read label), written times a factor.

    Attributes:
        reads, writes: map a label to its factor.
    """

    reads: dict[str, float]
    writes: dict[str, float]


@dataclass(frozen=True)
class Layer:
    """Parallel heads, followed by an MLP."""

    heads: tuple[Head, ...] = ()
    units: tuple[Unit, ...] = ()


@dataclass(frozen=True)
class Program:
    """A program and the transformer that computes it.

    Attributes:
        name, description: for display.
        tokens: the vocabulary without BOS and PAD.
        max_length: length of the longest input, without BOS.
        reference_length: input length for which the true edges are stated.
        layers: the transformer's layers.
        output: maps labels to values if the outputs are one-hot, else the label of a number.
        compute: maps an input to its right outputs.
        causal: whether attention is causal.
        scores_bos: whether a circuit also has to keep the output at BOS, which no program defines.
    """

    name: str
    description: str
    tokens: tuple[str, ...]
    max_length: int
    reference_length: int
    layers: tuple[Layer, ...]
    output: dict[str, str] | str
    compute: Callable[[Sequence[str]], list]
    causal: bool = False
    scores_bos: bool = False

    @property
    def graph(self) -> CircuitGraph:
        heads = max(1, *(len(layer.heads) for layer in self.layers))
        return CircuitGraph(len(self.layers), heads, heads, ("tok_embeds", "pos_embeds"))


# ------------------------------------------------------------------------- parts of programs


def attend_bos(score: float = SHARP / 2) -> tuple[str, str, float]:
    """Return a triple of `match` that attends to BOS unless another match scores higher."""
    return (ONE, f"tokens:{BOS}", score)


def both(first: str, second: str, writes: dict[str, float]) -> Unit:
    """Return a unit that is 1 where two one-hot labels are both 1."""
    return Unit({first: 1.0, second: 1.0, ONE: -1.0}, writes)


def above(label: str, threshold: float, writes: dict[str, float], width: float) -> list[Unit]:
    """Return units for a step: 0 up to threshold - width/2, 1 from threshold + width/2 on."""
    slope = 1 / width
    negative = {written: -factor for written, factor in writes.items()}
    low, high = slope * threshold - 0.5, slope * threshold + 0.5
    return [Unit({label: slope, ONE: -low}, writes), Unit({label: slope, ONE: -high}, negative)]


# ------------------------------------------------------------------------------------------- edges


def structural_edges(program: Program) -> list[Edge]:
    """Return the edges that carry a label which their reader reads, without dangling edges."""
    graph = program.graph
    written = {
        "tok_embeds": {ONE, *(f"tokens:{token}" for token in (*program.tokens, BOS, PAD))},
        "pos_embeds": {f"indices:{index}" for index in range(program.max_length)},
    }
    read: dict[str, set[str]] = {"resid_post": set(program.output)}
    if isinstance(program.output, str):
        read["resid_post"] = {program.output}
    for number, layer in enumerate(program.layers):
        for index, head in enumerate(layer.heads):
            name = f"a{number}.h{index}"
            read[f"{name}.q"] = {query for query, _, _ in head.match}
            read[f"{name}.k"] = {key for _, key, _ in head.match}
            read[f"{name}.v"] = {value for value, _, _ in head.copy}
            written[name] = {label for _, label, _ in head.copy}
        read[f"m{number}"] = {label for unit in layer.units for label in unit.reads}
        written[f"m{number}"] = {label for unit in layer.units for label in unit.writes}
    carrying = [
        (writer, reader)
        for writer, reader in graph.edges
        if written.get(writer, set()) & read.get(reader, set())
    ]
    return Circuit.from_edges(graph, carrying).without_dangling().edges


# ------------------------------------------------------------------------------------------- files


def residual_labels(program: Program) -> list[str]:
    """Return all labels of the residual stream, sorted."""
    labels = {ONE, *(f"tokens:{token}" for token in (*program.tokens, BOS, PAD))}
    labels |= {f"indices:{index}" for index in range(program.max_length)}
    for layer in program.layers:
        labels |= {label for head in layer.heads for _, label, _ in head.copy}
        labels |= {label for unit in layer.units for label in unit.writes}
    return sorted(labels)


def make_weights(program: Program) -> dict[str, Tensor]:
    """Return the tensors of weights.safetensors, in float32."""
    labels = residual_labels(program)
    dim = {label: index for index, label in enumerate(labels)}
    d_model, graph = len(labels), program.graph
    heads = [head for layer in program.layers for head in layer.heads]
    d_head = max(1, *(max(len(h.match), len(h.copy)) for h in heads)) if heads else 1
    d_mlp = max(1, *(len(layer.units) for layer in program.layers))
    names = [*program.tokens, BOS, PAD]
    weights = {
        "tok_embed": torch.zeros(len(names), d_model),
        "pos_embed": torch.zeros(program.max_length + 1, d_model),
    }
    for token, name in enumerate(names):
        weights["tok_embed"][token, dim[f"tokens:{name}"]] = 1
        weights["tok_embed"][token, dim[ONE]] = 1
    for index in range(program.max_length):
        weights["pos_embed"][index + 1, dim[f"indices:{index}"]] = 1
    outputs = [program.output] if isinstance(program.output, str) else list(program.output)
    weights["unembed"] = torch.zeros(d_model, len(outputs))
    for column, label in enumerate(outputs):
        weights["unembed"][dim[label], column] = 1
    for number, layer in enumerate(program.layers):
        prefix = f"blocks.{number}."
        for part in "QKV":
            weights[f"{prefix}attn.W_{part}"] = torch.zeros(graph.num_heads, d_model, d_head)
            weights[f"{prefix}attn.b_{part}"] = torch.zeros(graph.num_heads, d_head)
        weights[f"{prefix}attn.W_O"] = torch.zeros(graph.num_heads, d_head, d_model)
        weights[f"{prefix}attn.b_O"] = torch.zeros(d_model)
        for index, head in enumerate(layer.heads):
            for inner, (query, key, score) in enumerate(head.match):
                weights[f"{prefix}attn.W_Q"][index, dim[query], inner] = score * d_head**0.5
                weights[f"{prefix}attn.W_K"][index, dim[key], inner] = 1
            for inner, (value, label, factor) in enumerate(head.copy):
                weights[f"{prefix}attn.W_V"][index, dim[value], inner] = 1
                weights[f"{prefix}attn.W_O"][index, inner, dim[label]] = factor
        weights[f"{prefix}mlp.W_in"] = torch.zeros(d_model, d_mlp)
        weights[f"{prefix}mlp.b_in"] = torch.zeros(d_mlp)
        weights[f"{prefix}mlp.W_out"] = torch.zeros(d_mlp, d_model)
        weights[f"{prefix}mlp.b_out"] = torch.zeros(d_model)
        for inner, unit in enumerate(layer.units):
            for label, factor in unit.reads.items():
                weights[f"{prefix}mlp.W_in"][dim[label], inner] = factor
            for label, factor in unit.writes.items():
                weights[f"{prefix}mlp.W_out"][inner, dim[label]] = factor
    return weights


def make_config(program: Program) -> dict[str, Any]:
    """Return the fields of config.json."""
    weights = make_weights(program)
    d_model, d_out = weights["unembed"].shape
    _, _, d_head = weights["blocks.0.attn.W_Q"].shape
    numerical = isinstance(program.output, str)
    names = [*program.tokens, BOS, PAD]
    return {
        "program": program.name,
        "description": program.description,
        "n_layers": program.graph.num_layers,
        "n_heads": program.graph.num_heads,
        "d_model": d_model,
        "d_head": d_head,
        "d_mlp": weights["blocks.0.mlp.W_in"].shape[1],
        "d_vocab": len(names),
        "n_ctx": program.max_length + 1,
        "d_out": d_out,
        "activation": "relu",
        "layer_norm": False,
        "causal": program.causal,
        "dtype": "float32",
        "attn_scale": d_head**-0.5,
        "max_seq_len": program.max_length,
        "reference_seq_len": program.reference_length,
        "bos_prepended": True,
        "reference_scores_bos": program.scores_bos,
        "token_to_id": {name: token for token, name in enumerate(names)},
        "bos_token": BOS,
        "bos_id": names.index(BOS),
        "pad_token": PAD,
        "pad_id": names.index(PAD),
        "output_type": "numerical" if numerical else "categorical",
        "output_decoding": {
            "kind": "value of the single column" if numerical else "argmax over columns",
            "values": None if numerical else list(program.output.values()),
        },
        "residual_labels": residual_labels(program),
    }


def make_examples(program: Program) -> list[dict[str, Any]]:
    """Return every input from length 1 to the maximum, each with one corrupted input."""
    draw = random.Random(program.name)
    ids = {name: token for token, name in enumerate([*program.tokens, BOS, PAD])}
    examples = []
    for length in range(1, program.max_length + 1):
        for tokens in itertools.product(program.tokens, repeat=length):
            other = [draw.choice([t for t in program.tokens if t != token]) for token in tokens]
            output = program.compute(tokens)
            example = {
                "length": length,
                "tokens": list(tokens),
                "input_ids": [ids[BOS], *(ids[token] for token in tokens)],
                "output": output,
                "corr_tokens": other,
                "corr_input_ids": [ids[BOS], *(ids[token] for token in other)],
            }
            if isinstance(program.output, str):
                example["model_output"] = [float(value) for value in output]
            else:
                columns = list(program.output.values())
                example["output_ids"] = [columns.index(value) for value in output]
            examples.append(example)
    return examples


def write_folder(program: Program, folder: Path) -> None:
    """Write config.json, weights.safetensors and examples.jsonl."""
    write_json(folder / "config.json", make_config(program))
    weights = make_weights(program)
    write_atomically(folder / "weights.safetensors", lambda path: save_file(weights, path))
    lines = (json.dumps(example) + "\n" for example in make_examples(program))
    write_text(folder / "examples.jsonl", "".join(lines))
