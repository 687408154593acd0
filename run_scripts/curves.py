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

import torch

import edgeprune
from edgeprune.drawing import draw_frontier
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.evaluation.curve import Curve, curve_panels, measure_curve
from edgeprune.prompts import Pair, collate
from edgeprune.runs.run import Run
from edgeprune.scores import EdgeScores

SPARSITIES = (0.995, 0.99, 0.985, 0.98, 0.97, 0.95, 0.9, 0.8)
GATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Values of all gates at which attribution scores are computed and summed."""


def attribute(model: CircuitModel, train: Sequence[Pair]) -> EdgeScores:
    """Sum the gradients of the KL with respect to the gates over the training prompts.

    Edge attribution patching (Syed et al. 2023, arXiv:2310.10348), integrated as by Hanna et al.
    2024 (arXiv:2403.17806), but along the gates.
    """
    scores = torch.zeros(model.graph.num_edges, device=model.device)
    for start in range(0, len(train), 8):
        batch = collate(train[start : start + 8]).to(model.device)
        reference, corrupted = model.run_pair(batch)
        for value in GATES:
            gates = torch.full_like(scores, value).requires_grad_()
            scores += differentiate(model, StepInputs(batch, reference, corrupted, gates))[1]
    return EdgeScores(model.graph, scores, by_magnitude=True)


def print_row(name: str, test: Curve, train: Curve, sizes: Sequence[int]) -> None:
    kl = (f"{test.points[n].kl:.3f} ({train.points[n].kl:.3f})" for n in sizes)
    exact = (f"{test.points[n].exact_match:.3f}" for n in sizes)
    print(f"| {name} | {' | '.join(kl)} |\n|   exact match | {' | '.join(exact)} |", flush=True)


def main(picture: str, num_prompts: int, arguments: Sequence[str]) -> None:
    named = {legend: runs.split(",") for legend, _, runs in (a.partition("=") for a in arguments)}
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
        scores = run.scores() if learned else attribute(model, train)
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
