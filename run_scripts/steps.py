"""How many steps a circuit takes: the tables and the pictures in RESULTS.md.

    .venv/bin/python run_scripts/steps.py     # the embedded model: about 15 minutes on one core
    .venv/bin/python run_scripts/steps.py smollm2 [path/to/model.gguf]    # two hours

Prunes ioi by the published schedule and by the default, with fewer and more steps. Runs go to
runs/steps/; what is there already is not run again.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import edgeprune
from edgeprune.analysis.evaluate import Scores
from edgeprune.drawing.frontier import Curve, Panel, draw_frontier
from edgeprune.training.run import EDGES, load_masks

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs/steps"


@dataclass(frozen=True)
class Study:
    """Schedules of one experiment, compared.

    Attributes:
        title: of the picture.
        picture: its file.
        experiment: what all runs share.
        model: as for `load_model`.
        dtype: of the model.
        schedules: name -> settings, and how many seeds.
        drawn: name -> words in the legend.
        asked: edges that are asked for.
        sizes: of the circuits that are cut from each run's gates.
    """

    title: str
    picture: str
    experiment: str
    model: str
    dtype: str
    schedules: Mapping[str, tuple[str, int]]
    drawn: Mapping[str, str]
    asked: int
    sizes: Sequence[int]


EMBEDDED = Study(
    title="ioi in the embedded model, gates learned for 98 %",
    picture="time_to_circuit.png",
    experiment="ioi",
    model="embedded",
    dtype="float32",
    schedules={
        "paper": ("trainer=paper", 1),
        "1000": ("trainer.steps=1000", 3),
        "600": ("trainer.steps=600", 3),
        "300": ("trainer.steps=300", 3),
        "200": ("trainer.steps=200", 3),
    },
    drawn={
        "600": "default: 600 steps of 16 pairs, three seeds",
        "paper": "trainer=paper: 3,000 steps of 32 pairs, one seed",
    },
    asked=110,
    sizes=(55, 83, 110, 166, 276, 552),
)


def prune(study: Study, name: str, seed: int) -> Path:
    """The run's folder; it is run if it was not yet."""
    run = RUNS / f"{study.experiment.replace('/', '-')}-{name}-{seed}"
    if (run / EDGES).exists():
        return run
    begin = time.monotonic()
    settings = study.schedules[name][0].split()
    command = ["prune", f"experiment={study.experiment}", f"model.path={study.model}", *settings]
    command += [f"seed={seed}", f"run_dir={run}", "resume=auto"]
    subprocess.run([sys.executable, "-m", "edgeprune", *command], check=True)
    print(f"{run.name}: {time.monotonic() - begin:.0f} s with start-up and evaluation")
    return run


def measure(study: Study, runs: Sequence[Path]) -> list[dict[int, Scores]]:
    """Circuits of each size, of each run."""
    model = edgeprune.load_model(study.model, dtype=study.dtype)
    found = []
    for run in runs:
        test = edgeprune.load_dataset(run / "data.jsonl", model.tokenizer, "test")
        masks = load_masks(run, None)[0]
        of_size = {size: masks.circuit_of_size(size) for size in study.sizes}
        found.append({s: edgeprune.evaluate(model, c, test).circuit for s, c in of_size.items()})
    return found


def curve(name: str, scores: Sequence[dict[int, Scores]], metric: str) -> Curve:
    sizes = list(scores[0])
    values = [sorted(getattr(of_seed[size], metric) for of_seed in scores) for size in sizes]
    middle = [statistics.median(of_size) for of_size in values]
    return Curve(name, sizes, middle, [v[0] for v in values], [v[-1] for v in values])


def main(study: Study) -> None:
    found = {}
    for name, (_, num_seeds) in study.schedules.items():
        runs = [prune(study, name, seed) for seed in range(num_seeds)]
        found[name] = measure(study, runs)
        circuits = [of_seed[study.asked] for of_seed in found[name]]
        kl = " / ".join(f"{circuit.kl:.3f}" for circuit in circuits)
        print(f"{name}: KL {kl}, exact match {[round(c.exact_match, 3) for c in circuits]}")
    panels = [
        Panel(
            label, [curve(text, found[name], metric) for name, text in study.drawn.items()], [], log
        )
        for label, metric, log in (
            ("KL from the full model (nats)", "kl", True),
            ("exact match", "exact_match", False),
        )
    ]
    draw_frontier(panels, ROOT / "data" / study.picture, title=study.title, all_edges=0)


if __name__ == "__main__":
    main(EMBEDDED)
