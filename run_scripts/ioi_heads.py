#!/usr/bin/env python
"""Classify the heads of an ioi circuit by what they attend to, and count edges between the kinds.

    python run_scripts/ioi_heads.py runs/ioi-smollm2/...       # a run of task ioi or ioi_t1

Attention is that of the full model on clean test prompts. With S the name that occurs twice, IO the
other name and END the last token, the kinds are those of Wang et al. 2023 (arXiv:2211.00593):

    previous token    from every token to the one before it
    duplicate token   from the second S to the first
    induction         from the second S to the token after the first
    S-inhibition      from END to the second S
    name mover        from END to IO

A head's kind is the one with the largest mean attention, if that is at least 0.3. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from edgeprune.models.load import load_model
from edgeprune.prompts import read_records
from edgeprune.runs.run import Run

KINDS = ("previous token", "duplicate token", "induction", "S-inhibition", "name mover")
MIN_ATTENTION = 0.3
"""Minimum mean attention, a fraction, for a head to have a kind."""


def positions(record: dict, tokenizer: object) -> tuple[Tensor, dict[str, int]]:
    """Return the token ids of the prompt, [1, pos], and the positions of IO, both S and END."""
    prompt, answer = record["clean"].removesuffix("</predict>").split("<predict>")
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]

    def token_of(name: str, start: int) -> tuple[int, int]:
        """Return the token that contains a name's last character, and the next character."""
        end = prompt.index(name.strip(), start) + len(name.strip())
        return next(i for i, e in enumerate(ends) if e >= end), end

    subject = record["distractor"]
    io, _ = token_of(answer, 0)
    first, after = token_of(subject, 0)
    second, _ = token_of(subject, after)
    ids = torch.tensor([encoded["input_ids"]])
    return ids, {"IO": io, "S1": first, "S2": second, "END": ids.shape[1] - 1}


@torch.no_grad()
def attention_to_kinds(model: object, records: list[dict]) -> Tensor:
    """Average the attention that defines each kind over the prompts: [layer, head, kind]."""
    totals = torch.zeros(model.graph.num_layers, model.graph.num_heads, len(KINDS))
    for record in records:
        ids, at = positions(record, model.tokenizer)
        attentions = model.architecture.body(ids, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            weights = weights[0]  # [head, query, key]
            # Without token 1, for which the one before is the only choice besides itself.
            previous = weights.diagonal(-1, 1, 2)[:, 1:].mean(-1)
            second, end = weights[:, at["S2"]], weights[:, at["END"]]
            kinds = [second[:, at["S1"]], second[:, at["S1"] + 1], end[:, at["S2"]]]
            totals[layer] += torch.stack([previous, *kinds, end[:, at["IO"]]], -1)
    return totals / len(records)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--prompts", type=int, default=100, help="test prompts to average over")
    args = parser.parse_args()

    run = Run.open(args.run)
    model = load_model(run.config.model.path, device="cpu", attention="eager")
    records = [r for r in read_records(run.data_path) if r["split"] == "test"][: args.prompts]
    circuit = run.circuit().circuit.without_dangling()
    scores = attention_to_kinds(model, records)

    kind_of, in_circuit = {}, [node for node in circuit.nodes if node.startswith("a")]
    edges_of = Counter(writer for writer, _ in circuit.edges)
    for _, reader in circuit.edges:
        edges_of.update(circuit.nodes_fed_by(reader))
    print(f"| head | kind | edges | {' | '.join(KINDS)} |\n|---|---|---|{'---|' * len(KINDS)}")
    for layer in range(model.graph.num_layers):
        for head in range(model.graph.num_heads):
            name = f"a{layer}.h{head}"
            best = int(scores[layer, head].argmax())
            if scores[layer, head, best] < MIN_ATTENTION:
                continue
            kind_of[name] = KINDS[best]
            if name in in_circuit:
                cells = " | ".join(f"{value:.2f}" for value in scores[layer, head].tolist())
                print(f"| {name} | {KINDS[best]} | {edges_of[name]} | {cells} |")

    print("\n| kind | heads in the model | in the circuit |\n|---|---|---|")
    for kind in KINDS:
        heads = [name for name, k in kind_of.items() if k == kind]
        print(f"| {kind} | {len(heads)} | {sum(name in in_circuit for name in heads)} |")
    print(f"| none of these | {model.graph.num_layers * model.graph.num_heads - len(kind_of)} | "
          f"{sum(name not in kind_of for name in in_circuit)} |")  # fmt: skip

    print("\n| edges from | into | number |\n|---|---|---|")
    between = Counter()
    for writer, reader in circuit.edges:
        port = reader.rpartition(".")[2]
        fed = {kind_of[node] for node in circuit.nodes_fed_by(reader) if node in kind_of}
        for kind in fed if writer in kind_of else ():
            between[kind_of[writer], f"{kind}, {port}"] += 1
        if reader == "resid_post" and writer in kind_of:
            between[kind_of[writer], "output"] += 1
    for (source, target), number in between.most_common():
        print(f"| {source} | {target} | {number} |")


if __name__ == "__main__":
    main()
