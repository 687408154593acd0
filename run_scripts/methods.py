#!/usr/bin/env python
"""Compare methods that score edges, on one model and task: tables and pictures in RESULTS.md.

    python run_scripts/methods.py ioi
    python run_scripts/methods.py ioi --model FOLDER --steps 400 --learning-rate 0.3 --batch-size 8

Learns scores (`trainer=every_size`, several seeds) and computes attribution scores, on the graph of
EAP-IG and MIB. Measures circuits of MIB's sizes, .1 % of the edges to all, on test prompts that no
method has seen, and MIB's areas. The control is the circuit of the first seed between other heads.
Prints a table, draws the curves and writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import edgeprune
from edgeprune.api.attribute import score_edges
from edgeprune.circuit import Circuit
from edgeprune.config import AT_CLEAN
from edgeprune.drawing import draw_frontier
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.curve import Curve, curve_panels
from edgeprune.evaluation.evaluate import measure_circuits
from edgeprune.evaluation.mib import SHARES, Areas
from edgeprune.files import write_json
from edgeprune.metrics import Metrics
from edgeprune.prompts import encode_records, iterate_batches
from edgeprune.prompts.tasks import generate_records
from edgeprune.scores import EdgeScores

SHOWN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""The sizes in the table, as shares of all edges."""


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
    add("--output", type=Path, default=Path("methods"), help="numbers and picture, without suffix")
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
    total = model.graph.num_edges
    sizes = [int(share * total) for share in SHARES]
    rows: list[dict] = []
    lines: dict[str, list[Curve]] = {}

    def curve_of(circuits: list[Circuit]) -> Curve:
        """The circuits are of `sizes`; the last has all edges."""
        ablation = Ablation(model, "interchange", test)
        circuits = [Circuit(model.graph, frozenset()), *circuits[:-1]]
        full, *others = measure_circuits(model, circuits, batches, ablation)
        measured = zip((0, *sizes), (*others, full), strict=True)
        return Curve({n: Metrics.of(each, full, others[0]) for n, each in measured}, len(test))

    def areas(curve: Curve) -> Areas:
        found = [curve.points[size]["logit_difference_recovered"] for size in sizes]
        return Areas(tuple(sizes), tuple(found))

    def cut(scores: EdgeScores) -> list[Circuit]:
        return [scores.circuit(num_edges=size) for size in sizes]

    def measure_scores(legend: str, name: str, seconds: float, scores: EdgeScores) -> None:
        """CPR is of the ranking by score, CMD of that by magnitude."""
        curve = by_score = curve_of(cut(scores))
        if scores.by_magnitude:
            by_score = curve_of(cut(EdgeScores(scores.graph, scores.values, by_magnitude=False)))
        add_row(legend, name, seconds, curve, by_score)

    def add_row(legend: str, name: str, seconds: float, curve: Curve, by_score: Curve) -> None:
        """Print the row, and write and draw what there is so far."""
        row = {"name": name, "seconds": seconds, "cpr": areas(by_score).cpr}
        row |= {"cmd": areas(curve).cmd, "curve": curve.to_dict()}
        rows.append(row)
        lines.setdefault(legend, []).append(curve)
        shown = [curve.points[int(share * total)] for share in SHOWN]
        cells = [f"{point.kl:.3f} ({point.exact_match:.2f})" for point in shown]
        cells += [f"{row['cpr']:.3f}", f"{row['cmd']:.3f}", f"{seconds:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        about = {key: str(value) for key, value in vars(args).items()}
        write_json(args.output.with_suffix(".json"), {**about, "edges": total, "rows": rows})
        title = f"{args.task} in {Path(args.model).stem}, {len(test)} test prompts"
        draw_frontier(
            curve_panels(lines)[:2], args.output.with_suffix(".png"), title=title, all_edges=total
        )

    print(
        f"{args.task} in {args.model}: {total:,} edges, {len(test)} test prompts; KL (exact match)"
    )
    print(f"| | {' | '.join(f'{share:.1%}' for share in SHOWN)} | CPR | CMD | CPU seconds |")
    for seed in range(args.seeds):
        start = time.process_time()
        pruned = edgeprune.prune(
            model, train, train[:16], seed=seed, steps=args.steps, batch_size=args.batch_size,
            learning_rate=args.learning_rate, num_edges=0, progress=False,
        )  # fmt: skip
        seconds = time.process_time() - start
        measure_scores("learned, by seed", f"every_size, seed {seed}", seconds, pruned.scores)
        if seed == 0:
            permuted = curve_of([circuit.head_permuted(0) for circuit in cut(pruned.scores)])
            add_row("between other heads", "the same, head-permuted", 0, permuted, permuted)
    for method in args.methods:
        start = time.process_time()
        metric = "logit_difference" if method in AT_CLEAN else "kl"
        scores = score_edges(model, train[: args.attributed], method, metric=metric)
        name = f"{method}, {metric}"
        measure_scores(name, name, time.process_time() - start, scores)


if __name__ == "__main__":
    main()
