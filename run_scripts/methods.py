#!/usr/bin/env python
"""Compare methods that score edges, on one model and task: the tables in RESULTS.md.

    python run_scripts/methods.py ioi
    python run_scripts/methods.py ioi --model FOLDER --steps 400 --learning-rate 0.3 --batch-size 8

Learns scores (`trainer=every_size`, several seeds) and computes attribution scores, on the graph of
EAP-IG and MIB. Measures circuits of 1 to 20 % of the edges on test prompts that no method has seen,
and MIB's areas. The control is the circuit of the first seed between other heads. Prints a table
and writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import edgeprune
from edgeprune.api.attribute import score_edges
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.evaluate import measure_circuits
from edgeprune.evaluation.mib import mib_areas
from edgeprune.files import write_json
from edgeprune.metrics import Metrics
from edgeprune.prompts import encode_records, iterate_batches
from edgeprune.prompts.tasks import generate_records
from edgeprune.scores import EdgeScores

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""The measured sizes, as shares of all edges."""
METRICS = dict.fromkeys(("eap", "relp", "gim"), "logit_difference")
"""What edges are scored by, where it is not KL; that of these with KL is always 0."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", help="ioi, greater_than, gendered_pronoun, ...")
    add("--model", default="embedded", help="hub name, folder or .gguf file")
    add("--dtype", default="float32", help="of the model")
    add("--seeds", type=int, default=3, help="number of seeds of training")
    add("--steps", type=int, default=100, help="training steps")
    add("--learning-rate", type=float, default=0.8, help="of training")
    add("--batch-size", type=int, default=16, help="pairs per training step")
    default = ["eap", "relp", "gim", "eap_ig", "eap_ig_activations", "gates"]
    add("--methods", nargs="*", default=default, help="attribution methods")
    add("--attributed", type=int, default=200, help="training prompts of attribution methods")
    add("--train", type=int, help="training prompts; by default, none is used twice")
    add("--test", type=int, default=300, help="test prompts")
    add("--output", type=Path, default=Path("methods.json"), help="file of all numbers")
    return parser.parse_args()


def main() -> None:
    args = parse()
    graph = {"embedding_writers": "tokens", "split_kv_readers": True}
    model = edgeprune.load_model(args.model, dtype=args.dtype, **graph)
    sizes = {"train": args.train or args.steps * args.batch_size, "test": args.test}
    records = generate_records(args.task, model.tokenizer, sizes, seed=0)
    train, test = (
        encode_records([r for r in records if r["split"] == split], model.tokenizer)
        for split in ("train", "test")
    )
    batches = list(iterate_batches(test, 32))
    total, rows = model.graph.num_edges, []

    def measure(name: str, seconds: float, scores: EdgeScores, permuted: bool = False) -> None:
        circuits = [scores.circuit(num_edges=0)]
        circuits += [scores.circuit(num_edges=round(share * total)) for share in SHARES]
        if permuted:
            circuits = [circuit.head_permuted(0) for circuit in circuits]
        full, *examples = measure_circuits(
            model, circuits, batches, Ablation(model, "interchange", test)
        )
        found = [Metrics.of(each, full, examples[0]) for each in examples]
        row = {"name": name, "seconds": seconds, "empty_kl": found[0].kl}
        row |= {key: [metrics[key] for metrics in found[1:]] for key in ("kl", "exact_match")}
        if not permuted:
            ranked = {
                key: EdgeScores(scores.graph, scores.magnitudes(), key == "cmd")
                for key in ("cpr", "cmd")  # CPR is of the ranking by score, CMD of that by |score|
            }
            row |= {key: getattr(mib_areas(model, own, test), key) for key, own in ranked.items()}
        rows.append(row)
        cells = [
            f"{kl:.3f} ({exact:.2f})"
            for kl, exact in zip(row["kl"], row["exact_match"], strict=True)
        ]
        areas = [f"{row[key]:.3f}" if key in row else "" for key in ("cpr", "cmd")]
        print(f"| {name} | {' | '.join([*cells, *areas, f'{seconds:.0f}'])} |", flush=True)
        about = {key: str(value) for key, value in vars(args).items()}
        write_json(args.output, {**about, "edges": total, "shares": list(SHARES), "rows": rows})

    print(
        f"{args.task} in {args.model}: {total:,} edges, {len(test)} test prompts; KL (exact match)"
    )
    print(f"| | {' | '.join(f'{share:.0%}' for share in SHARES)} | CPR | CMD | CPU seconds |")
    for seed in range(args.seeds):
        start = time.process_time()
        pruned = edgeprune.prune(
            model, train, train[:16], seed=seed, steps=args.steps, batch_size=args.batch_size,
            learning_rate=args.learning_rate, num_edges=0, progress=False,
        )  # fmt: skip
        measure(f"every_size, seed {seed}", time.process_time() - start, pruned.scores)
        if seed == 0:
            measure("the same, head-permuted", 0, pruned.scores, permuted=True)
    for method in args.methods:
        start = time.process_time()
        metric = METRICS.get(method, "kl")
        scores = score_edges(model, train[: args.attributed], method, metric=metric)
        measure(f"{method}, {metric}", time.process_time() - start, scores)


if __name__ == "__main__":
    main()
