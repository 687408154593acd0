"""The project's own sbatch script and Hydra's submitit launcher, on a real SLURM cluster.

Needs a cluster that `sbatch` reaches (SLURM_CONF says which) with two nodes that share this
machine's file system; `make test-slurm`. On a big cluster, keep the runs where all nodes see them:
`pytest -m slurm --basetemp=/shared/tests tests/test_slurm.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import run_cli
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "run_scripts" / "prune.sbatch"
SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8",
    "trainer.steps=200",
    "trainer.checkpoint_every=10", "trainer.batch_size=5", "num_edges=60",
    "launcher.timeout=5",
)  # fmt: skip
LAST = "checkpoints/step-00000200.safetensors"
ENVIRONMENT = {
    **os.environ, "EDGEPRUNE": f"{sys.executable} -m edgeprune", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}  # fmt: skip


def has_cluster() -> bool:
    return (
        shutil.which("sinfo") is not None
        and not subprocess.run(["sinfo"], capture_output=True).returncode
    )


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not has_cluster(), reason="no SLURM cluster"),
]


def submit(log: Path, *arguments: object, nodes: int = 2) -> str:
    """A job of the project's script; returns its number."""
    done = subprocess.run(
        ["sbatch", "--parsable", f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={log}",
         SCRIPT, *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True)
    return dict(word.split("=", 1) for word in shown.stdout.decode().split() if "=" in word)


def wait_until(condition, log: Path, timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """(run directory, log) of a run over two nodes."""
    run_dir = tmp_path_factory.mktemp("slurm") / "run"
    log = run_dir.parent / "log"
    job = submit(log, *SMALL, f"run_dir={run_dir}")
    wait_until(lambda: state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), log)
    assert state(job)["JobState"] == "COMPLETED", log.read_text()
    return run_dir, log


def test_two_nodes_find_what_one_process_finds(two_nodes, tmp_path):
    run_dir, log = two_nodes
    assert ", 2 processes" in log.read_text()
    done = run_cli("prune", *SMALL, f"run_dir={tmp_path / 'one'}", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    saved = "checkpoints/step-{:08d}.safetensors"
    for step, tolerance in ((20, 2e-3), (200, 5e-2)):  # sums in another order drift apart
        folders = (tmp_path / "one", run_dir)
        one, two = (load_file(d / saved.format(step))["edge"] for d in folders)
        torch.testing.assert_close(two, one, atol=tolerance, rtol=1e-3)
        assert (two - one).abs().mean() < 1e-4
    one, two = (set(map(tuple, json.loads((d / "edges.json").read_text()))) for d in folders)
    assert len(one & two) >= 59


def test_a_job_told_to_stop_is_queued_again_and_ends_at_the_same_bits(two_nodes, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = submit(log, *SMALL, f"run_dir={run_dir}")
    wait_until(lambda: (run_dir / "checkpoints/step-00000010.safetensors").exists(), log)
    # what SLURM sends before the time limit, by --signal=B:USR1
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_until(lambda: state(job).get("Restarts") == "1", log)
    assert not (run_dir / LAST).exists(), "it was over before it was stopped"
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    wait_until(lambda: state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), log)
    assert state(job)["JobState"] == "COMPLETED", log.read_text()
    text = log.read_text()
    assert "stopped by SIGUSR1 after step" in text
    assert f"job {job} is queued again" in text
    assert "resuming from step" in text
    whole, _ = two_nodes
    for name in (LAST, "scores.safetensors", "edges.json"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.skipif(find_spec("submitit") is None, reason="pip install 'edgeprune[slurm]'")
def test_a_sweep_goes_through_submitit(tmp_path):
    settings = (*SMALL, "trainer.steps=20", "launcher=slurm", "hydra.launcher.timeout_min=10",
                f"hydra.sweep.dir={tmp_path}/sweep", "seed=0,1",
                f"run_dir={tmp_path}/seed-${{seed}}")  # fmt: skip
    done = run_cli("prune", *settings, "--multirun", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert (tmp_path / f"seed-{seed}/edges.json").exists()
    assert len(list((tmp_path / "sweep/.submitit").glob("*_[01]"))) == 2, "two jobs of an array"
    again = run_cli("prune", *settings, "trainer.learning_rate=7", "--multirun", **ENVIRONMENT)
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    assert "trainer.learning_rate" in again.stderr.splitlines()[-1]  # which differs
