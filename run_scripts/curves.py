#!/usr/bin/env python
"""Measure runs at fixed sparsities on test and training prompts: tables and pictures in RESULTS.md.

    python run_scripts/curves.py curve.png 300 "every size=runs/a-0,runs/a-1" "paper=runs/paper"

The arguments are the picture, the number of prompts of each split, and per line a legend and its
runs, with different seeds. All must be of one model and task. "attribution" adds a line of scores
for which nothing is learned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import edgeprune
from edgeprune.api.attribute import score_edges
from edgeprune.drawing import draw_frontier
from edgeprune.evaluation.curve import Curve, curve_panels, measure_curve
from edgeprune.runs.run import Run

SPARSITIES = (0.995, 0.99, 0.985, 0.98, 0.97, 0.95, 0.9, 0.8)
ATTRIBUTION = {"method": "gates", "metric": "kl", "steps": 5, "batch_size": 8}
"""How the scores of "attribution" are made, see `edgeprune attribute`."""


def print_row(name: str, test: Curve, train: Curve, sizes: Sequence[int]) -> None:
    kl = (f"{test.points[n].kl:.3f} ({train.points[n].kl:.3f})" for n in sizes)
    exact = (f"{test.points[n].exact_match:.3f}" for n in sizes)
    print(f"| {name} | {' | '.join(kl)} |\n|   exact match | {' | '.join(exact)} |", flush=True)


def main(picture: str, num_prompts: int, arguments: Sequence[str]) -> None:
    named = {}
    for argument in arguments:
        *legend, runs = argument.rsplit("=", 1)  # a legend may contain "=", a path may not
        named |= {legend[0]: runs.split(",")} if legend else {argument: [""]}
    first = Run.open(next(iter(named.values()))[0])
    model = edgeprune.load_model(first.config.model.path, dtype=first.config.model.dtype)
    total = model.graph.num_edges
    sizes = [model.graph.resolve_size(sparsity=sparsity) for sparsity in SPARSITIES]
    print("KL on test (training) prompts, by sparsity")
    print(f"| | {' | '.join(map(str, SPARSITIES))} |")

    def measure(name: str, run: Run, learned: bool) -> Curve:
        """On the run's own prompts: another run may have trained on its test prompts."""
        test, train = (
            edgeprune.load_dataset(run.data_path, model.tokenizer, split)[:num_prompts]
            for split in ("test", "train")
        )
        scores = run.scores() if learned else score_edges(model, train, **ATTRIBUTION)
        on_test, on_train = (
            measure_curve(
                model, scores, pairs, sizes=sizes, batch_size=32,
                ablation=run.config.ablation.kind,
            )
            for pairs in (test, train)
        )  # fmt: skip
        print_row(name, on_test, on_train, sizes)
        return on_test

    lines = {
        legend: [measure(run or legend, Run.open(run) if run else first, bool(run)) for run in runs]
        for legend, runs in named.items()
    }
    title = f"{first.config.title}, {num_prompts} test prompts"
    panels = curve_panels(lines)[:2]  # KL and exact match
    draw_frontier(panels, picture, title=title, all_edges=total)


if __name__ == "__main__":
    if len(sys.argv) < 4 or not sys.argv[2].isdigit():
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
