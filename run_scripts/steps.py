"""How many steps a circuit takes: a table and a picture in RESULTS.md.

    .venv/bin/python run_scripts/steps.py embedded                # about 15 minutes on one core
    .venv/bin/python run_scripts/steps.py smollm2                 # an hour; the model from the hub
    .venv/bin/python run_scripts/steps.py smollm2 model.gguf      # or from a file

Prunes for ioi by the published schedule, as shipped, and with other numbers of steps; and, beside
them, takes the edges of largest attribution scores, for which nothing is learned. Runs go to
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

import torch

import edgeprune
from edgeprune.drawing import Curve, Panel, draw_frontier
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.metrics import Metrics
from edgeprune.prompts import collate
from edgeprune.runs import layout
from edgeprune.runs.run import Run
from edgeprune.scores import EdgeScores

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs/steps"
OPENINGS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of all gates alike, over which attribution scores are averaged."""
ATTRIBUTION = "attribution scores (edge attribution patching)"


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
            "fast-200": Row("trainer=fast trainer.steps=200", 3),
            "fast": Row("trainer=fast", 3, "trainer=fast: 100 steps of 16 pairs, three seeds"),
            "fast-50": Row("trainer=fast trainer.steps=50", 3),
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
    if (run / layout.EDGES).exists():
        return
    begin = time.monotonic()
    own = [f"experiment={study.experiment}", f"run_dir={run}", "resume=auto"]
    if study.model != "embedded":
        own.append(f"model.path={study.model}")
    command = [sys.executable, "-m", "edgeprune", "prune", *own, *settings.split()]
    subprocess.run(command, check=True)
    print(f"{run.name}: {time.monotonic() - begin:.0f} s with start-up and evaluation")


def measure(study: Study, runs: Sequence[Path]) -> list[dict[int, Metrics]]:
    """Circuits of each size, of each run."""
    model = edgeprune.load_model(study.model, dtype=study.dtype)
    return [evaluate(model, run, study, Run.open(run).scores()) for run in runs]


def attribute(study: Study, run: Path) -> dict[int, Metrics]:
    """Circuits of each size, of the edges with the largest attribution scores by magnitude.

    A score is the gradient of the KL divergence with respect to an edge's gate, summed over a run's
    training prompts and over openings of all gates between corrupted and clean: edge attribution
    patching (Syed et al. 2023, arXiv:2310.10348), integrated as by Hanna et al. 2024
    (arXiv:2403.17806), but along the gates.
    """
    begin = time.monotonic()
    model = edgeprune.load_model(study.model, dtype=study.dtype)
    train = edgeprune.load_dataset(run / "data.jsonl", model.tokenizer, "train")
    scores = torch.zeros(study.all_edges, device=model.device)
    for start in range(0, len(train), 8):
        batch = collate(train[start : start + 8]).to(model.device)
        reference, corrupted = model.run_pair(batch)
        for opening in OPENINGS:
            gates = torch.full_like(scores, opening).requires_grad_()
            scores += differentiate(model, StepInputs(batch, reference, corrupted, gates))[1]
    print(f"attribution: {time.monotonic() - begin:.0f} s with start-up")
    return evaluate(model, run, study, EdgeScores(model.graph, scores, by_magnitude=True))


def evaluate(
    model: CircuitModel, run: Path, study: Study, scores: EdgeScores
) -> dict[int, Metrics]:
    """Circuits of each size on a run's test prompts."""
    test = edgeprune.load_dataset(run / "data.jsonl", model.tokenizer, "test")
    circuits = {size: scores.circuit(num_edges=size) for size in study.sizes}
    return {s: edgeprune.evaluate(model, c, test).circuit for s, c in circuits.items()}


def curve(name: str, scores: list[dict[int, Metrics]], metric: str) -> Curve:
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
    drawn[ATTRIBUTION] = [attribute(study, RUNS / name / "paper-0")]
    of_asked = drawn[ATTRIBUTION][0][study.asked]
    print(f"attribution: KL {of_asked.kl:.3f}, exact match {of_asked.exact_match:.3f}")
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
