"""Several processes compute the same as one; on the CPU, with gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import pytest
import torch
from conftest import call, run_cli, run_here
from safetensors.torch import load_file

from edgeprune.engine import cache
from edgeprune.scale.world import World

SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8",
    "trainer.steps=20", "trainer.checkpoint_every=5", "launcher.timeout=1",
    "trainer.batch_size=5", "num_edges=60",
)  # fmt: skip
PATIENCE = 500
"""Seconds to wait for processes; by default, they wait 30 minutes for each other."""
FIRST, LAST = (f"checkpoints/step-{step:08d}.safetensors" for step in (5, 20))
JOBS = [
    {"batch_size": 8},
    {"batch_size": 7, "method": "nodes"},
    {"batch_size": 5, "keep": False},
    {"batch_size": 6, "model": "qwen3"},
    {"batch_size": 6, "model": "untied"},
    {"batch_size": 7, "method": "every_size", "objective": "logit_difference"},
    {"batch_size": 6, "model": "split"},
]
SHARDED = [
    {**JOBS[2], "shard": "on the device"},
    {**JOBS[2], "shard": "offload"},
    {**JOBS[3], "shard": "on the device"},
    {**JOBS[2], "shard": "on the device", "recompute": True},
    {**JOBS[3], "shard": "on the device", "recompute": True},
    {**JOBS[4], "shard": "on the device"},
    {**JOBS[5], "shard": "on the device"},
    {**JOBS[6], "shard": "on the device", "recompute": True},
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, *command: object, **environment: str) -> list[subprocess.Popen]:
    """Start `python ...` in `count` processes that can join each other."""
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each process."""
    try:
        texts = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *t) for p, t in zip(processes, texts, strict=True)]


@pytest.mark.slow
def test_the_command_tokens_with_a_sharded_model_finds_what_one_process_finds(
    one_process, tmp_path
):
    found = []
    for name, settings in (("one", ()), ("two", ("launcher.shard=true", "launcher.processes=2"))):
        done = run_cli("tokens", one_process, "prompts=2", f"output={tmp_path / name}", *settings)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "tokens.json").read_text())["answers"])
    for one, two in zip(*found, strict=True):
        for through, values in one["through"].items():
            attributions = two["through"][through]["tokens"]
            assert attributions == pytest.approx(values["tokens"], abs=1e-4)


def test_heads_of_a_sharded_model():
    """Read, changed, scored, ablated as those of the whole model; edges and tokens attributed."""
    worker = Path(__file__).with_name("heads_worker.py")
    assert [(code, error) for code, _, error in finish(start(2, worker))] == [(0, ""), (0, "")]


def work(count: int, jobs: list[dict]) -> None:
    """Run jobs in processes of distributed_worker.py."""
    worker = Path(__file__).with_name("distributed_worker.py")
    root = os.pathsep.join([str(worker.parent), str(worker.parents[1])])
    for code, _, error in finish(
        start(count, worker, *(json.dumps(job) for job in jobs), PYTHONPATH=root)
    ):
        assert code == 0, error


def work_alone(jobs: list[dict]) -> None:
    """Run jobs of distributed_worker.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "MAX_KEPT", cache.MAX_KEPT)  # is set back
        for job in jobs:
            distributed_worker.run(World(), job)


def assert_same_run(left: Path, right: Path) -> None:
    """States and the last objective agree up to the order of float32 sums."""
    one, other = load_file(left), load_file(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-3, rtol=1e-3, msg=name)
        size = max(1.0, value.abs().mean().item())  # sums over a node's edges are large
        assert (other[name] - value).abs().mean() < 1e-5 * size, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of a single process, this one."""
    folder = tmp_path_factory.mktemp("alone")
    work_alone([{**job, "output": str(folder / str(i))} for i, job in enumerate(JOBS)])
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_learn_the_same_as_one(alone, tmp_path, count):
    jobs = [{**job, "output": str(tmp_path / str(i))} for i, job in enumerate(JOBS)]
    jobs += [{**JOBS[1], "until": 9, "output": str(tmp_path / "half")}]
    jobs += [{**JOBS[1], "resume": str(tmp_path / "half"), "output": str(tmp_path / "whole")}]
    jobs += [{**job, "output": str(tmp_path / f"sharded-{i}")} for i, job in enumerate(SHARDED)]
    work(count, jobs)
    for i, job in enumerate(SHARDED):
        whole = next(j for j, other in enumerate(JOBS) if other.items() <= job.items())
        assert_same_run(alone / f"{whole}-0.safetensors", tmp_path / f"sharded-{i}-0.safetensors")
    for i in range(len(JOBS)):
        assert_same_run(alone / f"{i}-0.safetensors", tmp_path / f"{i}-0.safetensors")
        first, *others = (load_file(tmp_path / f"{i}-{r}.safetensors") for r in range(count))
        for other in others:  # ranks stay identical to the bit
            assert all(torch.equal(first[name], other[name]) for name in first)
    one, same = (load_file(tmp_path / f"{name}-0.safetensors") for name in ("1", "whole"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    # from several processes to one
    work_alone([{**JOBS[1], "resume": str(tmp_path / "half"), "output": str(tmp_path / "fewer")}])
    assert_same_run(alone / "1-0.safetensors", tmp_path / "fewer-0.safetensors")


def test_parts_add_up_to_the_batch():
    for count in range(1, 8):
        parts = [World(count, rank).part(range(7)) for rank in range(count)]
        assert [i for part in parts for i in part] == list(range(7))
        assert {len(part) for part in parts} <= {7 // count, 7 // count + 1}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run_here("prune", *SMALL, f"run_dir={run_dir}")
    return run_dir


TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        (TORCHRUN, ()),
        ((), ("launcher=accelerate", "launcher.processes=2")),
        (TORCHRUN, ("launcher.shard=true", "launcher.offload=true")),
    ],
)
def test_a_launched_run_equals_that_of_one_process(one_process, tmp_path, launcher, settings):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", *launcher, "edgeprune", "prune", *SMALL]
    done = subprocess.run(
        [*command, *settings, f"run_dir={run_dir}"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 20/20") == 1  # rank 0 alone prints
    assert_same_run(one_process / LAST, run_dir / LAST)
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    assert names == {str(path.relative_to(one_process)) for path in one_process.rglob("*")}


@pytest.mark.slow
def test_launched_processes_fail_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "prune", "task.path=missing.jsonl", "model=embedded",
         f"run_dir={tmp_path / 'run'}", "launcher.processes=2"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "missing.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
    """Wait until the processes have written a file; if they do not, they are killed."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            pytest.fail(f"{path} was not written: {finish(processes)}")
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_run(
    one_process, tmp_path, capsys, monkeypatch, victim, number
):
    """The same command finishes the run, with another number of processes."""
    run_dir = tmp_path / "run"
    command = ("prune", *SMALL, f"run_dir={run_dir}", "resume=auto")
    processes = start(2, "-m", "edgeprune", *command)
    wait_for(run_dir / FIRST, processes)
    processes[victim].send_signal(number)
    ((code, _, error),) = finish([processes[1 - victim]])
    processes[victim].kill()
    assert code == 1
    assert "Traceback" not in error
    assert "another process of the run died or stopped responding" in error.splitlines()[-1]
    assert not (run_dir / LAST).exists()
    code, _, error = call(capsys, monkeypatch, *command)
    assert code == 0, error
    assert "resuming from step" in error
    assert_same_run(one_process / LAST, run_dir / LAST)


@pytest.mark.slow
def test_a_process_that_dies_while_circuits_of_a_sharded_model_are_measured_ends_the_run(tmp_path):
    run_dir = tmp_path / "run"
    settings = ("task.validation=200", "trainer.steps=5", "launcher.shard=true")
    processes = start(2, "-m", "edgeprune", "prune", *SMALL, *settings, f"run_dir={run_dir}")
    wait_for(run_dir / "scores.safetensors", processes)
    processes[1].kill()
    ((code, _, error),) = finish(processes[:1])
    processes[1].wait()
    assert code == 1
    assert "Traceback" not in error and "(this is a bug" not in error
    assert "another process of the run died or stopped responding" in error.splitlines()[-1]
    assert not (run_dir / "curve.json").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    run_dir = tmp_path / "run"
    processes = start(2, "-m", "edgeprune", "prune", *SMALL, f"run_dir={run_dir}")
    wait_for(run_dir / FIRST, processes)
    processes[1].send_signal(signal.SIGUSR1)
    (first, out, error), (second, *quiet) = finish(processes)
    assert (first, second) == (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    assert "stopped by SIGTERM after step" in error
    assert quiet == ["", ""], "only rank 0 prints"
    assert out == ""


def test_processes_given_different_commands_refuse(tmp_path):
    run_dir = f"run_dir={tmp_path}/${{oc.env:RANK}}"
    processes = start(2, "-m", "edgeprune", "prune", *SMALL, run_dir)
    (code, _, error), (other, *quiet) = finish(processes)
    assert (code, other) == (2, 2)
    assert "the settings of the 2 processes differ" in error
    assert quiet == ["", ""]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_without_the_others_does_not_hang(tmp_path):
    command = ("prune", *SMALL, f"run_dir={tmp_path}/run")
    done = run_cli(*command, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 1
    assert "the processes of the run could not connect: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_processes_share_what_is_learned_again(one_process, tmp_path):
    """`edgeprune test repeat=`: the same scores, whichever process learned them."""
    shared = shutil.copytree(one_process, tmp_path / "shared")
    alone = shutil.copytree(one_process, tmp_path / "alone")
    few = ("prompts=2", "random_circuits=1", "repeat=bootstrap:3")
    run_here("test", alone, *few)
    done = run_cli("test", shared, *few, "launcher=accelerate", "launcher.processes=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Jaccard index") == 1  # rank 0 alone prints
    for path in (alone / "repeats").iterdir():
        assert (shared / "repeats" / path.name).read_bytes() == path.read_bytes()
