"""Builds compiled transformers from programs spelled out by hand, in the form `modeling/tracr.py`
reads.

Every dimension of the residual stream has a label. The embeddings write `tokens:x` (one-hot),
`indices:i` (one-hot; BOS has no index) and `one` (1 everywhere); heads and MLP units write the
labels that the program gives them, each label by one node. Which node reads what another writes is
therefore known by construction.
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
"""Attention score of a match; a softmax of such scores is exact in float32."""


@dataclass(frozen=True)
class Head:
    """Selects positions and aggregates over them.

    Attributes:
        match: (query label, key label, score): the attention score is the sum over all triples of
            score * query * key.
        copy: (value label, label written, factor).
    """

    match: tuple[tuple[str, str, float], ...]
    copy: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Unit:
    """One hidden unit of an MLP: relu(sum of reads * factor), written times a factor.

    Attributes:
        reads, writes: label -> factor.
    """

    reads: dict[str, float]
    writes: dict[str, float]


@dataclass(frozen=True)
class Layer:
    """Heads side by side, then an MLP of some units."""

    heads: tuple[Head, ...] = ()
    units: tuple[Unit, ...] = ()


@dataclass(frozen=True)
class Program:
    """A program and how its transformer computes it.

    Attributes:
        name, description: for people.
        tokens: the vocabulary without BOS and PAD.
        max_length: longest input, BOS not counted.
        reference_length: the length for which true edges are stated.
        layers: the transformer.
        output: label -> its value, for one-hot outputs; or the one label that holds a number.
        compute: the outputs of an input, as the program defines them.
        causal: whether attention sees only what came before.
        scores_bos: whether the output at BOS, which no program defines, has to stay the same.
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


# ------------------------------------------------------------------------- ways to spell a program


def attend_bos(score: float = SHARP / 2) -> tuple[str, str, float]:
    """For `match`: look at BOS where no match has a higher score."""
    return (ONE, f"tokens:{BOS}", score)


def both(first: str, second: str, writes: dict[str, float]) -> Unit:
    """1 where two one-hot labels are both 1."""
    return Unit({first: 1.0, second: 1.0, ONE: -1.0}, writes)


def above(label: str, threshold: float, writes: dict[str, float], width: float) -> list[Unit]:
    """A step: 0 up to threshold - width/2, 1 from threshold + width/2, linear between."""
    slope = 1 / width
    negative = {written: -factor for written, factor in writes.items()}
    low, high = slope * threshold - 0.5, slope * threshold + 0.5
    return [Unit({label: slope, ONE: -low}, writes), Unit({label: slope, ONE: -high}, negative)]


# ------------------------------------------------------------------------------------ what it reads


def structural_edges(program: Program) -> list[Edge]:
    """The edges that carry a label its reader reads, dangling ones left out."""
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


# --------------------------------------------------------------------------------------- the files


def residual_labels(program: Program) -> list[str]:
    """Every label of the residual stream, sorted."""
    labels = {ONE, *(f"tokens:{token}" for token in (*program.tokens, BOS, PAD))}
    labels |= {f"indices:{index}" for index in range(program.max_length)}
    for layer in program.layers:
        labels |= {label for head in layer.heads for _, label, _ in head.copy}
        labels |= {label for unit in layer.units for label in unit.writes}
    return sorted(labels)


def make_weights(program: Program) -> dict[str, Tensor]:
    """The tensors of weights.safetensors, float32."""
    labels = residual_labels(program)
    place = {label: index for index, label in enumerate(labels)}
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
        weights["tok_embed"][token, place[f"tokens:{name}"]] = 1
        weights["tok_embed"][token, place[ONE]] = 1
    for index in range(program.max_length):
        weights["pos_embed"][index + 1, place[f"indices:{index}"]] = 1
    outputs = [program.output] if isinstance(program.output, str) else list(program.output)
    weights["unembed"] = torch.zeros(d_model, len(outputs))
    for column, label in enumerate(outputs):
        weights["unembed"][place[label], column] = 1
    for number, layer in enumerate(program.layers):
        prefix = f"blocks.{number}."
        for part in "QKV":
            weights[f"{prefix}attn.W_{part}"] = torch.zeros(graph.num_heads, d_model, d_head)
            weights[f"{prefix}attn.b_{part}"] = torch.zeros(graph.num_heads, d_head)
        weights[f"{prefix}attn.W_O"] = torch.zeros(graph.num_heads, d_head, d_model)
        weights[f"{prefix}attn.b_O"] = torch.zeros(d_model)
        for index, head in enumerate(layer.heads):
            for inner, (query, key, score) in enumerate(head.match):
                weights[f"{prefix}attn.W_Q"][index, place[query], inner] = score * d_head**0.5
                weights[f"{prefix}attn.W_K"][index, place[key], inner] = 1
            for inner, (value, label, factor) in enumerate(head.copy):
                weights[f"{prefix}attn.W_V"][index, place[value], inner] = 1
                weights[f"{prefix}attn.W_O"][index, inner, place[label]] = factor
        weights[f"{prefix}mlp.W_in"] = torch.zeros(d_model, d_mlp)
        weights[f"{prefix}mlp.b_in"] = torch.zeros(d_mlp)
        weights[f"{prefix}mlp.W_out"] = torch.zeros(d_mlp, d_model)
        weights[f"{prefix}mlp.b_out"] = torch.zeros(d_model)
        for inner, unit in enumerate(layer.units):
            for label, factor in unit.reads.items():
                weights[f"{prefix}mlp.W_in"][place[label], inner] = factor
            for label, factor in unit.writes.items():
                weights[f"{prefix}mlp.W_out"][inner, place[label]] = factor
    return weights


def make_config(program: Program) -> dict[str, Any]:
    """The fields of config.json."""
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
    """Every input of length 1 to the longest, with one corrupted input each."""
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
