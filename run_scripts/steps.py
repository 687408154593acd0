#!/usr/bin/env python
"""Measure how many steps a circuit takes: a table and a picture in RESULTS.md.

    python run_scripts/steps.py embedded                # about 15 minutes on one core
    python run_scripts/steps.py smollm2                 # an hour; the model from the hub
    python run_scripts/steps.py smollm2 model.gguf      # or from a file

Prunes for ioi by the published schedule, as shipped, and with other numbers of steps, and compares
the edges with the largest attribution scores, for which nothing is learned. Runs go to runs/steps/;
finished runs are not repeated.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import edgeprune
from edgeprune.drawing import Curve, Panel, draw_frontier
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.metrics import Metrics
from edgeprune.prompts import collate
from edgeprune.runs.run import Run
from edgeprune.scores import EdgeScores

ROOT = Path(__file__).parents[1]
GATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Values of all gates at which attribution scores are computed and summed."""
ATTRIBUTION = "attribution scores (edge attribution patching)"


@dataclass(frozen=True)
class Study:
    """The table and picture of one model.

    Attributes:
        experiment: name of the experiment.
        model, dtype: arguments of `edgeprune.load_model`.
        learned: number of edges for which gates are learned.
        sizes: numbers of edges of the measured circuits.
        picture, title: file in data/ and title of the drawing.
        rows: per name of a run: settings, number of seeds, and legend, empty if not drawn.
    """

    experiment: str
    model: str
    dtype: str
    learned: int
    sizes: Sequence[int]
    picture: str
    title: str
    rows: Mapping[str, tuple[str, int, str]]


STUDIES = {
    "embedded": Study(
        "ioi", "embedded", "float32", 110, (55, 83, 110, 166, 276, 552),
        "time_to_circuit.png", "ioi in the embedded model, gates learned for 98 %",
        {
            "paper": ("trainer=paper", 1, "trainer=paper: 3,000 steps of 32 pairs, one seed"),
            "1000": ("trainer=default trainer.steps=1000", 3, ""),
            "600": ("trainer=default", 3, "trainer=default: 600 steps of 16 pairs, three seeds"),
            "fast-200": ("trainer=fast trainer.steps=200", 3, ""),
            "fast": ("trainer=fast", 3, "trainer=fast: 100 steps of 16 pairs, three seeds"),
            "fast-50": ("trainer=fast trainer.steps=50", 3, ""),
            "300": ("trainer=default trainer.steps=300", 3, ""),
            "200": ("trainer=default trainer.steps=200", 3, ""),
        },
    ),
    "smollm2": Study(
        "smollm2/ioi", "HuggingFaceTB/SmolLM2-135M-Instruct", "bfloat16", 3533,
        (707, 1413, 2120, 3533, 5299, 7065, 14130),
        "time_to_circuit_smollm2.png", "ioi in SmolLM2-135M, gates learned for 95 %",
        {
            "paper": (
                "trainer=paper trainer.steps=3000 trainer.init_mean=10 trainer.target_lead=0", 1,
                "trainer=paper: 3,000 steps of 8 pairs",
            ),
            "800": ("", 1, "as shipped: 800 steps of 8 pairs"),
            "400": ("trainer.steps=400", 1, "400 steps of 8 pairs"),
        },
    ),
}  # fmt: skip


def prune(study: Study, model: str, run: Path, settings: str) -> None:
    """Prune in a new process unless the run is finished, and print the seconds."""
    if (run / "circuit.json").exists():
        return
    begin = time.monotonic()
    options = [f"experiment={study.experiment}", f"model.path={model}", f"run_dir={run}"]
    command = [sys.executable, "-m", "edgeprune", "prune", *options, "resume=auto"]
    subprocess.run([*command, *settings.split()], check=True)
    print(f"{run.name}: {time.monotonic() - begin:.0f} s with start-up and evaluation")


def attribute(model: CircuitModel, run: Path) -> EdgeScores:
    """Sum the gradients of the KL with respect to the gates over a run's training prompts.

    Edge attribution patching (Syed et al. 2023, arXiv:2310.10348), integrated as by Hanna et al.
    2024 (arXiv:2403.17806), but along the gates.
    """
    begin = time.monotonic()
    train = edgeprune.load_dataset(run / "data.jsonl", model.tokenizer, "train")
    scores = torch.zeros(model.graph.num_edges, device=model.device)
    for start in range(0, len(train), 8):
        batch = collate(train[start : start + 8]).to(model.device)
        reference, corrupted = model.run_pair(batch)
        for value in GATES:
            gates = torch.full_like(scores, value).requires_grad_()
            scores += differentiate(model, StepInputs(batch, reference, corrupted, gates))[1]
    print(f"attribution: {time.monotonic() - begin:.0f} s")
    return EdgeScores(model.graph, scores, by_magnitude=True)


def evaluate(
    study: Study, model: CircuitModel, run: Path, scores: EdgeScores
) -> dict[int, Metrics]:
    """Measure the circuits of each size on a run's test prompts."""
    test = edgeprune.load_dataset(run / "data.jsonl", model.tokenizer, "test")
    circuits = {size: scores.circuit(num_edges=size) for size in study.sizes}
    return {n: edgeprune.evaluate(model, c, test).circuit for n, c in circuits.items()}


def curve(name: str, runs: Sequence[Mapping[int, Metrics]], metric: str) -> Curve:
    """Return a line through the medians of runs, and a band from the lowest to the highest."""
    sizes = list(runs[0])
    values = [sorted(getattr(run[size], metric) for run in runs) for size in sizes]
    median = [statistics.median(of_size) for of_size in values]
    return Curve(name, sizes, median, [v[0] for v in values], [v[-1] for v in values])


def print_row(name: str, runs: Sequence[Metrics]) -> None:
    kl = " / ".join(f"{metrics.kl:.3f}" for metrics in runs)
    exact = " / ".join(f"{metrics.exact_match:.3f}" for metrics in runs)
    print(f"{name}: KL {kl}, exact match {exact}")


def main(name: str, path: str | None = None) -> None:
    study, folder = STUDIES[name], ROOT / "runs/steps" / name
    for row, (settings, num_seeds, _) in study.rows.items():
        for seed in range(num_seeds):
            options = f"{settings} seed={seed}"
            prune(study, path or study.model, folder / f"{row}-{seed}", options)
    model = edgeprune.load_model(path or study.model, dtype=study.dtype)
    found = {}
    for row, (settings, num_seeds, _) in study.rows.items():
        runs = [folder / f"{row}-{seed}" for seed in range(num_seeds)]
        found[row] = [evaluate(study, model, run, Run.open(run).scores()) for run in runs]
        print_row(f"{row} ({settings})", [metrics[study.learned] for metrics in found[row]])
    drawn = {legend: found[row] for row, (_, _, legend) in study.rows.items() if legend}
    run = folder / "paper-0"
    drawn[ATTRIBUTION] = [evaluate(study, model, run, attribute(model, run))]
    print_row(ATTRIBUTION, [drawn[ATTRIBUTION][0][study.learned]])
    panels = [
        Panel(label, [curve(legend, runs, metric) for legend, runs in drawn.items()], [], log)
        for label, metric, log in (
            ("KL from the full model (nats)", "kl", True),
            ("exact match", "exact_match", False),
        )
    ]
    picture = ROOT / "data" / study.picture
    draw_frontier(panels, picture, title=study.title, all_edges=model.graph.num_edges)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1] not in STUDIES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
