"""How many steps a circuit takes: a table and a picture in RESULTS.md.

    .venv/bin/python run_scripts/steps.py embedded                # about 15 minutes on one core
    .venv/bin/python run_scripts/steps.py smollm2                 # an hour; the model from the hub
    .venv/bin/python run_scripts/steps.py smollm2 model.gguf      # or from a file

Prunes for ioi by the published schedule, as shipped, and with other numbers of steps. Runs go to
runs/steps/; what is there already is not run again.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import edgeprune
from edgeprune.analysis.evaluate import Scores
from edgeprune.drawing.frontier import Curve, Panel, draw_frontier
from edgeprune.training.run import EDGES, load_masks

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs/steps"


@dataclass(frozen=True)
class Row:
    """Runs with the same settings.

    Attributes:
        settings: beside the experiment's.
        num_seeds: 0 and up.
        legend: in the picture; None: it is not drawn.
    """

    settings: str
    num_seeds: int = 1
    legend: str | None = None


@dataclass(frozen=True)
class Study:
    """One model's table and picture.

    Attributes:
        experiment: what is pruned.
        model, dtype: as for `edgeprune.load_model`.
        asked: the size that gates are learned for, in edges.
        all_edges: of the whole graph.
        sizes: that are cut and measured.
        picture, title: of the drawing.
        rows: by the names of their runs.
    """

    experiment: str
    model: str
    dtype: str
    asked: int
    all_edges: int
    sizes: Sequence[int]
    picture: str
    title: str
    rows: dict[str, Row]


STUDIES = {
    "embedded": Study(
        "ioi", "embedded", "float32", 110, 5524, (55, 83, 110, 166, 276, 552),
        "time_to_circuit.png", "ioi in the embedded model, gates learned for 98 %",
        {
            "paper": Row("trainer=paper", 1, "trainer=paper: 3,000 steps of 32 pairs, one seed"),
            "1000": Row("trainer=default trainer.steps=1000", 3),
            "600": Row("trainer=default", 3, "trainer=default: 600 steps of 16 pairs, three seeds"),
            "fast": Row("trainer=fast", 3, "trainer=fast: 200 steps of 16 pairs, three seeds"),
            "300": Row("trainer=default trainer.steps=300", 3),
            "200": Row("trainer=default trainer.steps=200", 3),
        },
    ),
    "smollm2": Study(
        "smollm2/ioi", "HuggingFaceTB/SmolLM2-135M-Instruct", "bfloat16", 3533, 70651,
        (707, 1413, 2120, 3533, 5299, 7065, 14130),
        "time_to_circuit_smollm2.png", "ioi in SmolLM2-135M, gates learned for 95 %",
        {
            "paper": Row(
                "trainer=paper trainer.steps=3000 trainer.init_mean=10 trainer.target_lead=0", 1,
                "trainer=paper: 3,000 steps of 8 pairs",
            ),
            "800": Row("", 1, "as shipped: 800 steps of 8 pairs"),
            "400": Row("trainer.steps=400", 1, "400 steps of 8 pairs"),
        },
    ),
}  # fmt: skip


def prune(study: Study, run: Path, settings: str) -> None:
    if (run / EDGES).exists():
        return
    begin = time.monotonic()
    own = [f"experiment={study.experiment}", f"run_dir={run}", "resume=auto"]
    if study.model != "embedded":
        own.append(f"model.path={study.model}")
    command = [sys.executable, "-m", "edgeprune", "prune", *own, *settings.split()]
    subprocess.run(command, check=True)
    print(f"{run.name}: {time.monotonic() - begin:.0f} s with start-up and evaluation")


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


def curve(name: str, scores: list[dict[int, Scores]], metric: str) -> Curve:
    sizes = list(scores[0])
    values = [sorted(getattr(of_run[size], metric) for of_run in scores) for size in sizes]
    middle = [statistics.median(of_size) for of_size in values]
    return Curve(name, sizes, middle, [v[0] for v in values], [v[-1] for v in values])


def main(name: str, *model: str) -> None:
    study = STUDIES[name]
    if model:
        study = replace(study, model=model[0])
    found = {}
    for row_name, row in study.rows.items():
        runs = [RUNS / name / f"{row_name}-{seed}" for seed in range(row.num_seeds)]
        for seed, run in enumerate(runs):
            prune(study, run, f"{row.settings} seed={seed}")
        found[row_name] = measure(study, runs)
        circuits = [of_run[study.asked] for of_run in found[row_name]]
        kl = " / ".join(f"{circuit.kl:.3f}" for circuit in circuits)
        exact = " / ".join(f"{circuit.exact_match:.3f}" for circuit in circuits)
        print(f"{row_name} ({row.settings}): KL {kl}, exact match {exact}")
    drawn = {row.legend: found[name] for name, row in study.rows.items() if row.legend}
    panels = [
        Panel(label, [curve(legend, runs, metric) for legend, runs in drawn.items()], [], log)
        for label, metric, log in (
            ("KL from the full model (nats)", "kl", True),
            ("exact match", "exact_match", False),
        )
    ]
    picture = ROOT / "data" / study.picture
    draw_frontier(panels, picture, title=study.title, all_edges=study.all_edges)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1] not in STUDIES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
