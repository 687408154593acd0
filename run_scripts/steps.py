"""How many steps a circuit takes: the table and the picture in RESULTS.md.

    .venv/bin/python run_scripts/steps.py     # about 15 minutes on one core

Prunes the embedded model's ioi at 98 % by the published schedule, by the default, and by
trainer=fast with fewer and more steps. Runs go to runs/steps/; what is there already is not run
again.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import edgeprune
from edgeprune.analysis.evaluate import Scores
from edgeprune.drawing.frontier import Curve, Panel, draw_frontier
from edgeprune.training.run import EDGES, load_masks

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs/steps"
SETTINGS = {
    "paper": ("trainer=paper", 1),
    "1000": ("trainer=default trainer.steps=1000", 3),
    "600": ("trainer=default", 3),
    "fast": ("trainer=fast", 3),
    "300": ("trainer=default trainer.steps=300", 3),
    "200": ("trainer=default trainer.steps=200", 3),
}
"""What is set, and how many seeds."""
ASKED = 110
SIZES = (55, 83, ASKED, 166, 276, 552)
DRAWN = {
    "fast": "trainer=fast: 200 steps of 16 pairs, three seeds",
    "600": "trainer=default: 600 steps of 16 pairs, three seeds",
    "paper": "trainer=paper: 3,000 steps of 32 pairs, one seed",
}


def prune(name: str, setting: str, seed: int) -> None:
    run = RUNS / f"{name}-{seed}"
    if (run / EDGES).exists():
        return
    begin = time.monotonic()
    settings = [*setting.split(), f"seed={seed}", f"run_dir={run}", "resume=auto"]
    command = ["prune", "experiment=ioi", *settings]
    subprocess.run([sys.executable, "-m", "edgeprune", *command], check=True)
    print(f"{run.name}: {time.monotonic() - begin:.0f} s with start-up and evaluation")


def measure(name: str, num_seeds: int) -> list[dict[int, Scores]]:
    """Circuits of each size, of each seed."""
    model = edgeprune.load_model("embedded")
    found = []
    for seed in range(num_seeds):
        run = RUNS / f"{name}-{seed}"
        test = edgeprune.load_dataset(run / "data.jsonl", model.tokenizer, "test")
        masks = load_masks(run, None)[0]
        of_size = {size: masks.circuit_of_size(size) for size in SIZES}
        found.append({s: edgeprune.evaluate(model, c, test).circuit for s, c in of_size.items()})
    return found


def curve(name: str, scores: list[dict[int, Scores]], metric: str) -> Curve:
    values = [sorted(getattr(of_seed[size], metric) for of_seed in scores) for size in SIZES]
    middle = [statistics.median(of_size) for of_size in values]
    return Curve(name, SIZES, middle, [v[0] for v in values], [v[-1] for v in values])


def main() -> None:
    found = {}
    for name, (setting, num_seeds) in SETTINGS.items():
        for seed in range(num_seeds):
            prune(name, setting, seed)
        found[name] = measure(name, num_seeds)
    for name, scores in found.items():
        circuits = [of_seed[ASKED] for of_seed in scores]
        kl = " / ".join(f"{circuit.kl:.3f}" for circuit in circuits)
        print(f"{name}: KL {kl}, exact match {[round(c.exact_match, 3) for c in circuits]}")
    panels = [
        Panel(label, [curve(text, found[name], metric) for name, text in DRAWN.items()], [], log)
        for label, metric, log in (
            ("KL from the full model (nats)", "kl", True),
            ("exact match", "exact_match", False),
        )
    ]
    title = "ioi in the embedded model, gates learned for 98 %"
    draw_frontier(panels, ROOT / "data/time_to_circuit.png", title=title, all_edges=5524)


if __name__ == "__main__":
    main()
