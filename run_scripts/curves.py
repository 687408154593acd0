#!/usr/bin/env python
"""Measure runs at fixed sparsities on test and training prompts: tables and pictures in RESULTS.md.

    python run_scripts/curves.py data/curve.png "every size=runs/a-0,runs/a-1" "paper=runs/paper"

Each argument after the picture is a legend and the runs, with different seeds, of one line. They
must be of one model and task. The last line is of attribution scores, for which nothing is learned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import edgeprune
from edgeprune.drawing import draw_frontier
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.evaluation.curve import Curve, curve_panels, log_sizes, measure_curve
from edgeprune.prompts import Pair, collate
from edgeprune.runs.run import Run
from edgeprune.scores import EdgeScores

SPARSITIES = (0.995, 0.99, 0.985, 0.98, 0.97, 0.95, 0.9, 0.8)
"""Sparsities in the table; the picture has more."""
MAX_PROMPTS = 300
"""Number of prompts of each split."""
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


def main(picture: str, *arguments: str) -> None:
    named = {legend: runs.split(",") for legend, runs in (a.split("=", 1) for a in arguments)}
    first = Run.open(next(iter(named.values()))[0])
    settings = first.config.model
    model = edgeprune.load_model(settings.path, dtype=settings.dtype)
    splits = {
        split: edgeprune.load_dataset(first.data_path, model.tokenizer, split)[:MAX_PROMPTS]
        for split in ("test", "train")
    }
    total = model.graph.num_edges
    shown = [model.graph.resolve_size(sparsity=sparsity) for sparsity in SPARSITIES]
    sizes = {"test": {*shown, *log_sizes(max(1, round(0.003 * total)), total, 8)}, "train": shown}
    print("KL on test (training) prompts, by sparsity")
    print(f"| | {' | '.join(map(str, SPARSITIES))} |")
    lines: dict[str, list[Curve]] = {}

    def measure(name: str, scores: EdgeScores) -> Curve:
        test, train = (
            measure_curve(
                model,
                scores,
                pairs,
                sizes=sizes[split],
                batch_size=32,
                ablation=first.config.ablation.kind,
            )
            for split, pairs in splits.items()
        )
        print_row(name, test, train, shown)
        return test

    for legend, runs in named.items():
        lines[legend] = [measure(run, Run.open(run).scores()) for run in runs]
    legend = "attribution scores (edge attribution patching)"
    lines[legend] = [measure(legend, attribute(model, splits["train"]))]
    title = f"{first.config.title}, {len(splits['test'])} test prompts"
    panels = curve_panels(lines)[:2]  # KL and exact match
    draw_frontier(panels, picture, title=title, all_edges=total)


if __name__ == "__main__":
    if len(sys.argv) < 3 or "=" not in sys.argv[2]:
        sys.exit(__doc__)
    main(*sys.argv[1:])
