#!/usr/bin/env python
"""Write the compiled transformers of data/tracr_models and verify their true edges.

    python run_scripts/make_tracr_models.py [FOLDER]       # half a minute

The true edges of each program are stated here by hand, separately for zero and interchange
ablation: a constant (the direction `one`, the position, BOS) is the same in clean and corrupted
prompts, so an edge that carries only constants is not a true edge under interchange ablation. Then
every subset of the structural edges without dangling edges is run in float64, with a separate
implementation of the forward pass: the stated set has to be the only smallest one that leaves all
outputs unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tracr_builder import (
    BOS,
    ONE,
    SHARP,
    Head,
    Layer,
    Program,
    Unit,
    above,
    attend_bos,
    both,
    make_config,
    make_weights,
    structural_edges,
    write_folder,
)

from edgeprune.circuit import Circuit
from edgeprune.files import write_json
from edgeprune.graph import CircuitGraph, Edge
from edgeprune.paths import TRACR_MODELS
from edgeprune.prompts.tasks.tracr import make_records

TOLERANCE = 1e-4
"""Largest difference between outputs that count as unchanged."""
MAX_SUBSETS = 2**16
"""Limit of the number of subsets to try."""


# ---------------------------------------------------------------------------------------- programs


def share(value: str, written: str) -> Head:
    """Attend uniformly: the fraction of positions that have the value."""
    return Head((), ((value, written, 1.0),))


def copied(tokens: Sequence[str], name: str) -> tuple[tuple[str, str, float], ...]:
    """Return triples of `copy` that copy tokens to labels with another name."""
    return tuple((f"tokens:{token}", f"{name}:{token}", 1.0) for token in tokens)


def nearest(label: str, values: list[tuple[float, str]]) -> tuple[Unit, ...]:
    """Return units that write the label of the value nearest to a number, with a step between."""
    values = sorted(values)
    units = [Unit({ONE: 1.0}, {values[0][1]: 1.0})]
    for (low, low_label), (high, high_label) in pairwise(values):
        writes = {low_label: -1.0, high_label: 1.0}
        units += above(label, (low + high) / 2, writes, width=(high - low) / 4)
    return tuple(units)


def reverse() -> Program:
    """Uniform attention to BOS gives the length; length and index give the opposite position."""
    length = 5
    tokens = ("1", "2", "3")
    sizes = [(1 / (n + 1), f"length:{n}") for n in range(1, length + 1)]
    opposite = tuple(
        both(f"length:{n}", f"indices:{i}", {f"opposite:{n - 1 - i}": 1.0})
        for n in range(1, length + 1)
        for i in range(n)
    )
    look = tuple((f"opposite:{i}", f"indices:{i}", SHARP) for i in range(length))
    return Program(
        name="reverse",
        description="The input, reversed.",
        tokens=tokens,
        max_length=length,
        reference_length=3,
        layers=(
            Layer((share(f"tokens:{BOS}", "bos_share"),), nearest("bos_share", sizes)),
            Layer((), opposite),
            Layer((Head((*look, attend_bos()), copied(tokens, "out")),)),
        ),
        output={f"out:{t}": t for t in tokens},
        compute=lambda x: list(reversed(x)),
    )


def xproportion() -> Program:
    """An MLP marks x; a head averages the marks up to its own position, without BOS."""
    length = 5
    past = tuple(
        (f"indices:{q}", f"indices:{k}", SHARP) for q in range(length) for k in range(q + 1)
    )
    return Program(
        name="xproportion",
        description="The share of x among the tokens up to this one.",
        tokens=("a", "b", "c", "x"),
        max_length=length,
        reference_length=4,
        layers=(
            Layer((), (Unit({"tokens:x": 1.0}, {"is_x": 1.0}),)),
            Layer((Head((*past, attend_bos()), (("is_x", "share", 1.0),)),)),
        ),
        output="share",
        compute=lambda x: [x[: i + 1].count("x") / (i + 1) for i in range(len(x))],
        scores_bos=True,
    )


def neighbours() -> Program:
    """Two parallel heads fetch the tokens before and after."""
    length = 4
    tokens = ("a", "b", "c")

    def fetch(offset: int, name: str) -> Head:
        match = tuple(
            (f"indices:{i}", f"indices:{i + offset}", SHARP)
            for i in range(length)
            if 0 <= i + offset < length
        )
        return Head((*match, attend_bos()), copied(tokens, name))

    yes = {"out:yes": 1.0, "out:no": -1.0}
    same = tuple(both(f"before:{t}", f"after:{t}", yes) for t in tokens)
    default = Unit({ONE: 1.0}, {"out:no": 1.0})
    return Program(
        name="neighbours",
        description="Whether the tokens before and after this one are the same.",
        tokens=tokens,
        max_length=length,
        reference_length=4,
        layers=(Layer((fetch(-1, "before"), fetch(1, "after")), (*same, default)),),
        output={"out:yes": "yes", "out:no": "no"},
        compute=lambda x: [
            "yes" if 0 < i < len(x) - 1 and x[i - 1] == x[i + 1] else "no" for i in range(len(x))
        ],
    )


def brackets() -> Program:
    """Two causal heads count brackets, an MLP compares, a head checks whether it ever failed."""
    length = 5
    smallest = 1 / (length + 1)  # the smallest nonzero fraction of attention
    step = {"threshold": smallest / 2, "width": smallest / 2}

    def over(one: str, other: str, written: str) -> list[Unit]:
        """1 where the first fraction is larger than the second."""
        units = above(one, **step, writes={written: 1.0})
        return [Unit({**unit.reads, other: -unit.reads[one]}, unit.writes) for unit in units]

    def compute(x: Sequence[str]) -> list[str]:
        outputs, depth, failed = [], 0, False
        for token in x:
            depth += {"(": 1, ")": -1}.get(token, 0)
            failed = failed or depth < 0
            outputs.append("fail" if failed else "open" if depth else "ok")
        return outputs

    ever = above("fewer_share", **step, writes={"ever": 1.0})
    verdicts = (
        Unit({"more": 1.0, "ever": -1.0}, {"out:open": 1.0, "out:ok": -1.0}),
        Unit({"ever": 1.0}, {"out:fail": 1.0, "out:ok": -1.0}),
        Unit({ONE: 1.0}, {"out:ok": 1.0}),
    )
    return Program(
        name="brackets",
        description="Whether the brackets so far are closed (ok), open, or closed early (fail).",
        tokens=("(", ")", "x"),
        max_length=length,
        reference_length=5,
        layers=(
            Layer(
                (share("tokens:(", "opened"), share("tokens:)", "closed")),
                (*over("opened", "closed", "more"), *over("closed", "opened", "fewer")),
            ),
            Layer((share("fewer", "fewer_share"),), tuple(ever)),
            Layer((), verdicts),
        ),
        output={"out:ok": "ok", "out:open": "open", "out:fail": "fail"},
        compute=compute,
        causal=True,
    )


PROGRAMS = {make.__name__: make for make in (reverse, xproportion, neighbours, brackets)}

TRUE_EDGES = {
    "reverse": {
        "zero": "tok_embeds-a0.h0.v tok_embeds-m0 a0.h0-m0 tok_embeds-m1 pos_embeds-m1 m0-m1 "
                "m1-a2.h0.q pos_embeds-a2.h0.k tok_embeds-a2.h0.v a2.h0-resid_post",
        "interchange": "tok_embeds-a2.h0.v a2.h0-resid_post",
    },
    "xproportion": {
        "zero": "tok_embeds-m0 tok_embeds-a1.h0.q pos_embeds-a1.h0.q tok_embeds-a1.h0.k "
                "pos_embeds-a1.h0.k m0-a1.h0.v a1.h0-resid_post",
        "interchange": "tok_embeds-m0 m0-a1.h0.v a1.h0-resid_post",
    },
    "neighbours": {
        "zero": "tok_embeds-a0.h0.q pos_embeds-a0.h0.q tok_embeds-a0.h0.k pos_embeds-a0.h0.k "
                "tok_embeds-a0.h0.v tok_embeds-a0.h1.q pos_embeds-a0.h1.q tok_embeds-a0.h1.k "
                "pos_embeds-a0.h1.k tok_embeds-a0.h1.v tok_embeds-m0 a0.h0-m0 a0.h1-m0 "
                "m0-resid_post",
        "interchange": "tok_embeds-a0.h0.v tok_embeds-a0.h1.v a0.h0-m0 a0.h1-m0 m0-resid_post",
    },
    "brackets": {
        "zero": "tok_embeds-a0.h0.v tok_embeds-a0.h1.v tok_embeds-m0 a0.h0-m0 a0.h1-m0 "
                "m0-a1.h0.v tok_embeds-m1 a1.h0-m1 tok_embeds-m2 m0-m2 m1-m2 m2-resid_post",
        "interchange": "tok_embeds-a0.h0.v tok_embeds-a0.h1.v a0.h0-m0 a0.h1-m0 m0-a1.h0.v "
                       "a1.h0-m1 m0-m2 m1-m2 m2-resid_post",
    },
}  # fmt: skip
"""Maps program and ablation to the true edges, each as writer-reader."""


# ------------------------------------------------------------------------------------------ search


def run_masks(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    ids: Tensor,
    masks: Tensor,
    ablation_values: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run many masks at once, in float64 and directly from the definition.

    Args:
        config, weights: of the model.
        ids: [batch, pos].
        masks: [mask, edge]; 1 keeps an edge, 0 ablates it.
        ablation_values: per writer, what ablated edges carry, [batch, pos, d_model]; None: zeros.

    Returns:
        The outputs, [mask, batch, pos, column], and per writer its outbox,
        [mask, batch, pos, d_model].
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    heads = config["n_heads"]
    graph = CircuitGraph(config["n_layers"], heads, heads, ("tok_embeds", "pos_embeds"))
    count, length = len(masks), ids.shape[1]
    tokens = weights["tok_embed"][ids]
    positions = weights["pos_embed"][:length].expand_as(tokens)
    written = [x.expand(count, *x.shape) for x in (tokens, positions)]
    sites = iter(graph.sites)

    def read() -> Tensor:
        """[mask, reader, batch, pos, d_model]"""
        site = next(sites)
        gates = masks[:, site.place].view(count, len(site.readers), site.num_writers)
        values = torch.stack(written, 1)
        if ablation_values is None:
            return torch.einsum("krw,kwbpd->krbpd", gates, values)
        others = torch.stack(ablation_values[: site.num_writers])
        return torch.einsum("krw,kwbpd->krbpd", gates, values - others) + others.sum(0)

    for layer in range(graph.num_layers):
        prefix = f"blocks.{layer}."
        by_part = read().view(count, 3, graph.num_heads, *tokens.shape)
        q, k, v = (
            torch.einsum("khbpd,hde->khbpe", by_part[:, i], weights[f"{prefix}attn.W_{part}"])
            for i, part in enumerate("QKV")
        )
        scores = q @ k.transpose(-1, -2) * config["attn_scale"]
        if config["causal"]:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        mixed = scores.softmax(-1) @ v
        outboxes = torch.einsum("khbpe,hed->khbpd", mixed, weights[f"{prefix}attn.W_O"])
        written += list(outboxes.unbind(1))
        hidden = (read()[:, 0] @ weights[f"{prefix}mlp.W_in"]).relu()
        written.append(hidden @ weights[f"{prefix}mlp.W_out"])
    return read()[:, 0] @ weights["unembed"], written


def search(program: Program, records: list[dict], scored_from: int, ablation: str) -> dict:
    """Find all smallest sets of structural edges that leave the outputs unchanged.

    Returns:
        The entry of ground_truth_edges.json.

    Raises:
        RuntimeError: there are more than `MAX_SUBSETS` subsets.
    """
    graph, edges = program.graph, structural_edges(program)
    model = make_config(program), make_weights(program)
    if 2 ** len(edges) > MAX_SUBSETS:
        raise RuntimeError(f"{program.name} has {len(edges)} structural edges: too many to try all")
    clean = torch.tensor([record["clean_ids"] for record in records])
    corrupted = torch.tensor([record["corrupted_ids"] for record in records])
    if ablation == "zero":
        clean = clean.unique(dim=0)
    everything = torch.ones(1, graph.num_edges, dtype=torch.double)
    reference = run_masks(*model, clean, everything)[0][:, :, scored_from:]
    ablation_values = None
    if ablation == "interchange":
        ablation_values = [x[0] for x in run_masks(*model, corrupted, everything)[1]]
    passing: list[frozenset[Edge]] = []
    tried = 0
    every_subset, size = non_dangling(graph, edges), max(1, 20_000 // len(clean))
    while subsets := list(islice(every_subset, size)):
        masks = torch.tensor(
            [Circuit(graph, subset).mask() for subset in subsets], dtype=torch.double
        )
        outputs = run_masks(*model, clean, masks, ablation_values)[0][:, :, scored_from:]
        same = ((outputs - reference).abs() <= TOLERANCE).flatten(1).all(1)
        passing += [subset for subset, ok in zip(subsets, same.tolist(), strict=True) if ok]
        tried += len(subsets)
    smallest = min(map(len, passing))
    minimal = [Circuit(graph, s) for s in passing if len(s) == smallest]
    return {
        "lengths": [program.reference_length],
        "scored_from_position": scored_from,
        "set_passes": True,
        "method": f"exhaustive ({tried} non-dangling subsets of the {len(edges)} structural edges)",
        "minimal_size": smallest,
        "n_minimal_sets": len(minimal),
        "minimal_edges": pairs(minimal[0].edges),
        "other_minimal_sets": [pairs(circuit.edges) for circuit in minimal[1:]],
    }


def non_dangling(graph: CircuitGraph, edges: list[Edge]) -> Iterator[frozenset[Edge]]:
    """Yield every nonempty subset of the edges that has no dangling edge."""
    for bits in range(1, 2 ** len(edges)):
        subset = frozenset(edge for place, edge in enumerate(edges) if bits >> place & 1)
        if any(reader == "resid_post" for _, reader in subset) and all(
            writer.endswith("embeds") or any(e[1].startswith(writer) for e in subset)
            for writer, _ in subset
        ):
            circuit = Circuit(graph, subset)
            if len(circuit.without_dangling()) == len(subset):
                yield subset


def pairs(edges: list[Edge]) -> list[list[str]]:
    """Return edges as JSON holds them."""
    return [list(edge) for edge in edges]


# ------------------------------------------------------------------------------------------- files


def write_model(program: Program, folder: Path) -> None:
    """Write a program's folder and verify its true edges.

    Raises:
        RuntimeError: the stated edges are not the only smallest set.
    """
    write_folder(program, folder)
    config = make_config(program)
    found = {}
    for ablation in ("zero", "interchange"):
        scored_from = 0 if program.scores_bos and ablation == "zero" else 1
        records = make_records(folder, config, scored_from=scored_from)
        found[ablation] = search(program, records, scored_from, ablation)
        text = TRUE_EDGES[program.name][ablation]
        stated = Circuit.from_edges(program.graph, (edge.split("-") for edge in text.split()))
        if (
            found[ablation]["minimal_edges"] != pairs(stated.edges)
            or (found[ablation]["other_minimal_sets"])
        ):
            raise RuntimeError(
                f"{program.name}, {ablation}: stated {stated.edges}, but the smallest sets are "
                f"{found[ablation]['minimal_edges']}, {found[ablation]['other_minimal_sets']}"
            )
    zero, interchange = found["zero"], found["interchange"]
    structural = structural_edges(program)
    truth = {
        "program": program.name,
        "naming": "writers: tok_embeds, pos_embeds, a{l}.h{h}, m{l}; readers: a{l}.h{h}.q/.k/.v, "
        "m{l}, resid_post",
        "n_edges_total": program.graph.num_edges,
        "n_edges_structural": len(structural),
        "n_edges_primary": zero["minimal_size"],
        "edges": zero["minimal_edges"],
        "primary_definition": "unique smallest zero-ablation circuit at the reference length, "
        f"positions {zero['scored_from_position']}..n-1",
        "primary_lengths": zero["lengths"],
        "primary_scored_from_position": zero["scored_from_position"],
        "structural_edges": pairs(structural),
        "structural_definition": "the writer writes a label which the reader reads, and both lie "
        "on a path from an embedding to resid_post",
        "edges_patching": interchange["minimal_edges"],
        "zero_ablation": {"reference_length": zero},
        "counterfactual_patching": {
            **interchange,
            "corruptions": "up to 4 per input, every non-BOS position changed",
        },
        "validation": {"tolerance": TOLERANCE, "dtype": "float64"},
    }
    write_json(folder / "ground_truth_edges.json", truth)
    print(
        f"{program.name}: {len(structural)} structural edges of {program.graph.num_edges}, true "
        f"{zero['minimal_size']} (zero), {interchange['minimal_size']} (interchange) -> {folder}"
    )


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TRACR_MODELS
    for name, make in PROGRAMS.items():
        write_model(make(), target / name)


if __name__ == "__main__":
    main()
