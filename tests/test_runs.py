"""Run directories: what is protected, resuming, and real faults: kills, full disks, NaN."""

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_refused, call, run_cli, run_here, write_jsonl
from safetensors.torch import load_file, save_file

from edgeprune import Run, load_circuit
from edgeprune.config import AttributeConfig, ModelConfig, TaskConfig
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.runs.run import claim
from edgeprune.scale.world import World
from edgeprune.training.trainer import Trainer

SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8", "trainer.batch_size=4",
    "num_edges=60",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("without_pictures")

PAIR = {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps(run_dir: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return sorted(int(p.stem[5:]) for p in run_dir.glob("checkpoints/step-*.safetensors"))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoints/step-{step:08d}.safetensors"


def start(*arguments: object, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run_here("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}")
    return run_dir


@pytest.fixture
def prune(capsys, monkeypatch):
    """`prune` in this process: exit code and standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        code, _, err = call(capsys, monkeypatch, "prune", *arguments)
        return code, err

    return run


# ------------------------------------------------------------------------------------ from Python


def test_a_run_knows_its_scores_circuit_and_measurements(a_run):
    run = Run.open(a_run)
    assert run.config.num_edges == 60
    assert run.circuit().circuit == load_circuit(a_run) == run.scores().circuit(num_edges=60)
    assert run.scores(step=4).ranking().tolist() == run.scores().ranking().tolist()
    assert run.evaluations()["validation"]["num_examples"] == 8
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    assert (run.curve().num_examples, run.curve().num_edges) == (8, run.graph.num_edges)


# --------------------------------------------------------------------------------- what may be run


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_directory_of_other_files_is_refused(tmp_path, overwrite, prune):
    (tmp_path / "proj").mkdir()
    data = write_jsonl(tmp_path / "proj/data.jsonl", PAIR)
    before = contents(tmp_path)
    code, err = prune("num_edges=60", f"task.path={data}", f"run_dir={tmp_path / 'proj'}",
                      f"overwrite={overwrite}")  # fmt: skip
    assert code == 2
    assert str(tmp_path / "proj") in err
    assert contents(tmp_path) == before


def test_an_empty_directory_may_become_a_run(tmp_path, prune):
    (tmp_path / "run").mkdir()
    assert prune(*SMALL, "trainer.steps=2", f"run_dir={tmp_path / 'run'}")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_run_is_neither_replaced_nor_resumed_with_other_settings(a_run, tmp_path, prune):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    again = (*SMALL, "trainer.steps=4", f"run_dir={run_dir}")
    code, err = prune(*again)
    assert (code, "resume=auto" in err, "overwrite=true" in err) == (2, True, True)
    code, err = prune(*again, "resume=auto", "trainer.learning_rate=0.123")
    assert (code, "trainer.learning_rate: " in err, "0.123 here" in err) == (2, True, True)
    assert contents(run_dir) == contents(a_run)
    with (run_dir / "data.jsonl").open("a") as file:
        file.write("\n")
    code, err = prune(*again, "resume=auto")
    assert (code, "the data has changed" in err) == (2, True)


def test_settings_for_less_memory_may_change_on_resuming(tmp_path, prune, monkeypatch):
    """A run that ran out of memory is advised to change them."""
    run_dir, step = tmp_path / "run", Trainer.train_step
    arguments = (*SMALL, "trainer.steps=4", f"run_dir={run_dir}")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def failing(self):
        if self.step == 2:
            raise error
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", failing)
        code, err = prune(*arguments)
    assert code == 1
    assert "trainer.micro_batch_size" in err
    assert steps(run_dir) == [2]
    changed = ("trainer.micro_batch_size=2", "trainer.recompute=true")
    assert prune(*arguments, "resume=auto", *changed)[0] == 0
    assert steps(run_dir) == [2, 4]
    assert Run.open(run_dir).config.trainer.micro_batch_size == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("task.path=typo.jsonl",),
        ("task.path=same.jsonl",),  # interchange ablation would change nothing
        ("model.device=cuda:99",),
        ("num_edges=9999999",),
        ("trainer.cuda_graph=true", "model.device=cpu"),
    ],
)
def test_a_run_that_cannot_begin_replaces_nothing(a_run, tmp_path, arguments, prune, monkeypatch):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    same = dict.fromkeys(("clean", "corrupted"), "1 + 2 = <predict>3</predict>")
    write_jsonl(tmp_path / "same.jsonl", same)
    code, err = prune(*SMALL, "trainer.steps=4", f"run_dir={run_dir}", "overwrite=true", *arguments)
    assert code in (1, 2), err
    assert contents(run_dir) == contents(a_run)
    code, err = prune(*SMALL, "trainer.steps=4", f"run_dir={tmp_path / 'new'}", *arguments)
    assert code in (1, 2), err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "same.jsonl"}


def test_overwriting_replaces_a_run_as_a_whole(a_run, tmp_path, prune):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    overwrite = (*SMALL, "trainer.steps=2", "task.seed=1", f"run_dir={run_dir}", "overwrite=true")
    process = start("prune", *overwrite)
    wait_for((tmp_path / ".run.new/data.jsonl").exists, process)
    process.kill()  # while it loads
    process.communicate()
    assert contents(run_dir) == contents(a_run)
    assert prune(*overwrite)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert steps(run_dir) == [2]
    assert (run_dir / "data.jsonl").read_bytes() != (a_run / "data.jsonl").read_bytes()
    assert Run.open(run_dir).manifest["data"]["path"] == str(run_dir / "data.jsonl")


@pytest.mark.parametrize("reads", ["task.path={}/data.jsonl", "start={}"])
def test_overwriting_does_not_delete_what_is_read(a_run, tmp_path, prune, reads):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    code, err = prune(reads.format(run_dir), "num_edges=60", "trainer.steps=2",
                      f"run_dir={run_dir}", "overwrite=true")  # fmt: skip
    assert (code, reads.format(run_dir) in err) == (2, True)
    assert contents(run_dir) == contents(a_run)


def test_paths_of_a_run_are_valid_from_any_directory(a_run, tmp_path, monkeypatch):
    monkeypatch.chdir(a_run.parent)
    config = AttributeConfig(
        model=ModelConfig(path=str(EMBEDDED_MODEL)), task=TaskConfig(path=f"{a_run.name}/run.json"),
        method="exact", circuit=a_run.name, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    with claim(config, World()) as run:
        settings = yaml.safe_load((run.path / "config.yaml").read_text())
    assert settings["circuit"] == str(a_run)
    assert settings["task"]["path"] == str(a_run / "run.json")


def test_no_output_goes_into_a_run_directory_or_replaces_an_input(
    a_run, tmp_path, capsys, monkeypatch
):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    graph = tmp_path / "graph.pt"
    assert call(capsys, monkeypatch, "export", run_dir, f"output={graph}")[0] == 0
    (tmp_path / "link.json").symlink_to(run_dir / "edges.json")
    monkeypatch.chdir(run_dir)
    before = contents(tmp_path)
    for arguments, output in (
        (("export", "."), "config.yaml"),
        (("export", "."), run_dir / "checkpoints/x.json"),
        (("evaluate", "."), "run.json"),
        (("evaluate", "."), "../link.json"),
        (("prepare",), "data.jsonl"),
        (("draw", "."), "training.png"),
        (("report", ".."), "report"),
        (("compare", ".", graph), "both"),
        (("export", graph, "num_edges=9"), graph),
        (("tokens", "."), "."),
        (("heads", "."), run_dir),
    ):
        code, _, err = call(capsys, monkeypatch, *arguments, f"output={output}")
        assert code == 2, err
        assert contents(tmp_path) == before


def test_damaged_files_of_a_run_are_named(a_run, tmp_path, capsys, monkeypatch):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    for name, texts in {
        "config.yaml": ["- 1", "[1", "stepz: 3"],
        "run.json": ["{", "[]", '{"graph": 3}', '{"graph": {}}'],
        "circuit.json": ["{", "{}"],
    }.items():
        whole = (run_dir / name).read_text()
        for text in texts:
            (run_dir / name).write_text(text)
            code, _, err = call(capsys, monkeypatch, "evaluate", run_dir)
            assert (code in (1, 2), name in err, "bug" in err) == (True, True, False), err
        (run_dir / name).write_text(whole)


def test_links_are_followed_and_folders_are_not_replaced(a_run, tmp_path, capsys, monkeypatch):
    target, folder = tmp_path / "target.json", tmp_path / "folder"
    (tmp_path / "link.json").symlink_to(target)
    folder.mkdir()
    export = ("export", a_run, "num_edges=9")
    assert call(capsys, monkeypatch, *export, f"output={tmp_path / 'link.json'}")[0] == 0
    assert len(json.loads(target.read_text())) == 9
    assert call(capsys, monkeypatch, *export, f"output={folder}")[0] == 2
    assert folder.is_dir()


def test_a_linked_run_survives_what_a_killed_one_left(a_run, tmp_path, prune):
    shutil.copytree(a_run, tmp_path / "disk" / "run")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "run")
    leftover = tmp_path / "disk" / ".run.new"  # of overwrite=true, killed while loading
    leftover.mkdir()
    half_written = link / "checkpoints" / ".step-00000002.safetensors.1.tmp"  # killed by SIGKILL
    half_written.touch()
    before = checkpoint(link, 4).read_bytes()
    more = (*SMALL, "trainer.steps=4", f"run_dir={link}")
    assert prune(*more, "resume=auto")[0] == 0
    assert (checkpoint(link, 4).read_bytes(), leftover.exists()) == (before, False)
    assert not half_written.exists()
    assert prune(*more, "seed=1", "overwrite=true")[0] == 0
    assert link.is_symlink() and checkpoint(link, 4).read_bytes() != before


def test_a_damaged_evaluation_is_left_out_of_the_report(a_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(a_run, tmp_path / "run")
    for text in ("{", "[3]"):
        (tmp_path / "run" / "evaluation-validation.json").write_text(text)
        code, _, err = call(capsys, monkeypatch, "report", tmp_path / "run")
        assert (code, "evaluation-validation.json" in err) == (0, True)
        assert (tmp_path / "run" / "report" / "report.html").exists()


def test_a_damaged_test_of_several_circuits_is_left_out_of_the_report(
    a_run, tmp_path, capsys, monkeypatch
):
    shutil.copytree(a_run, tmp_path / "run")
    for circuits in ({}, {"a": 3}, {"a": {"edges_sha256": "0"}}):
        (tmp_path / "test.json").write_text(json.dumps({"cells": [], "circuits": circuits}))
        code, _, err = call(capsys, monkeypatch, "report", tmp_path)
        assert code == 0, err
        assert "test.json is damaged" in err


@pytest.mark.parametrize(("part", "key"), [("model", "settings"), ("data", "settings")])
def test_a_circuit_that_does_not_say_where_it_is_from_asks_for_it(
    a_run, tmp_path, capsys, monkeypatch, part, key
):
    content = json.loads((a_run / "circuit.json").read_text())
    del content["origin"][part][key]
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    code, _, err = call(capsys, monkeypatch, "evaluate", tmp_path)
    assert code == 2 and f"identifies its {part}" in err, err


def test_a_circuit_chosen_otherwise_than_asked_for_is_left_out_of_reports(
    a_run, tmp_path, capsys, monkeypatch, prune
):
    runs = [shutil.copytree(a_run, tmp_path / "runs/size"), tmp_path / "runs/kl"]
    more = ("num_edges=null", "max_kl=3", "trainer.steps=4", f"run_dir={runs[1]}")
    assert prune(*SMALL, *more)[0] == 0

    def reported() -> set[str]:
        code, _, err = call(capsys, monkeypatch, "report", tmp_path / "runs")
        assert code == 0, err
        with (tmp_path / "runs/report/runs.csv").open() as file:
            return {row["run"] for row in csv.DictReader(file)}

    assert reported() == {"size", "kl"}
    for run_dir, other in ((runs[0], "max_kl=2"), (runs[1], "num_edges=60")):
        whole = (run_dir / "edges.json").read_bytes()
        assert call(capsys, monkeypatch, "export", run_dir, other)[0] == 0
        assert reported() == {"size", "kl"} - {run_dir.name}
        assert call(capsys, monkeypatch, "export", run_dir)[0] == 0
        assert (run_dir / "edges.json").read_bytes() == whole
        assert reported() == {"size", "kl"}


# ------------------------------------------------------------------------------ locks and signals


def test_a_second_run_in_the_same_place_is_refused_until_the_first_is_dead(tmp_path, prune):
    run_dir = tmp_path / "run"
    arguments = (*SMALL, "trainer.steps=2000", f"run_dir={run_dir}")
    first = start("prune", *arguments, "trainer.checkpoint_every=5")
    try:
        wait_for(lambda: steps(run_dir), first)
        os.kill(first.pid, signal.SIGSTOP)  # a run that is stuck still holds its place
        before = {path: path.stat().st_mtime for path in run_dir.rglob("*") if path.is_file()}
        for more in ("resume=auto", "overwrite=true"):
            code, err = prune(*arguments, more)
            assert (code, str(run_dir) in err) == (2, True), err
        after = {path: path.stat().st_mtime for path in run_dir.rglob("*") if path.is_file()}
        del before[run_dir / ".lock"], after[run_dir / ".lock"]
        assert after == before
    finally:
        first.kill()
        first.communicate()
    second = start("prune", *arguments, "resume=auto", "trainer.checkpoint_every=5")
    last = steps(run_dir)[-1]
    wait_for(lambda: steps(run_dir)[-1] > last, second)
    second.kill()
    assert f"step {last}" in second.communicate()[1]


STOPPED = ("trainer.steps=40", "trainer.checkpoint_every=5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was not stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_here("prune", *SMALL, *STOPPED, f"run_dir={run_dir}")
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_bits(whole, tmp_path, prune, number):
    run_dir = tmp_path / "run"
    arguments = (*SMALL, *STOPPED, f"run_dir={run_dir}", "resume=auto")
    process = start(
        "prune",
        *arguments,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
    )
    wait_for(checkpoint(run_dir, 5).exists, process)
    process.send_signal(number)
    message = process.communicate(timeout=120)[1]
    assert not checkpoint(run_dir, 40).exists(), "it ended before it was stopped"
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert number.name in message
        assert "Traceback" not in message
    assert prune(*arguments)[0] == 0
    for name in ("metrics.jsonl", "edges.json", "scores.safetensors", "curve.json",
                 "snapshots.safetensors", "checkpoints/step-00000040.safetensors"):  # fmt: skip
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_a_run_ends_at_the_same_bits(tmp_path):
    settings = (*SMALL, "trainer.steps=160", "trainer.checkpoint_every=2", "resume=auto")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert run_cli("prune", *settings, f"run_dir={whole}").returncode == 0
    rng = random.Random(0)
    reached, startup = [], 1.0
    for kill in range(20):
        before = steps(run_dir)
        began = time.monotonic()
        process = start("prune", *settings, f"run_dir={run_dir}")
        if kill % 4 == 0:  # while it starts, loads, or reads its checkpoint
            time.sleep(rng.uniform(0, 1.2 * startup))
        else:  # while it trains or writes
            wait_for(lambda before=before: steps(run_dir) != before, process)
            startup = time.monotonic() - began
            time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()
        reached.append((steps(run_dir) or [0])[-1])
    assert reached == sorted(reached), "a kill undid a checkpoint"
    assert len(set(reached)) >= 15
    assert run_cli("prune", *settings, f"run_dir={run_dir}").returncode == 0
    for name in ("checkpoints/step-00000160.safetensors", "metrics.jsonl", "edges.json"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [path for path in run_dir.rglob("*") if path.name.endswith(".tmp")]


# ------------------------------------------------------------------- full disks, damage, moved runs


def limited(size: int):
    """Files may not grow beyond a size: what a full disk does, without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [0, 300])
def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path, size):
    process = start(
        "prune", *SMALL, "trainer.steps=4", f"run_dir={tmp_path / 'run'}", preexec_fn=limited(size)
    )
    error = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 1
    assert error[-1].startswith("edgeprune: ")
    assert "File too large" in error[-1]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_no_checkpoint(tmp_path, prune):
    run_dir = tmp_path / "run"
    arguments = [*SMALL, "trainer.steps=8", "trainer.checkpoint_every=4",
                 f"run_dir={run_dir}", "resume=auto"]  # fmt: skip
    assert prune(*arguments)[0] == 0
    wanted = checkpoint(run_dir, 8).read_bytes()
    checkpoint(run_dir, 8).unlink()
    kept = checkpoint(run_dir, 4).read_bytes()
    process = start("prune", *arguments, preexec_fn=limited(30_000))  # less than a checkpoint
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert str(run_dir) in error and "resume=auto" in error
    assert checkpoint(run_dir, 4).read_bytes() == kept
    assert prune(*arguments)[0] == 0
    assert checkpoint(run_dir, 8).read_bytes() == wanted


def test_damaged_checkpoints_and_metrics_are_passed_over(tmp_path, prune, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    arguments = (*SMALL, "trainer.steps=12", "trainer.checkpoint_every=4", f"run_dir={run_dir}")
    assert prune(*arguments)[0] == 0
    wanted, lines = checkpoint(run_dir, 12).read_bytes(), (run_dir / "metrics.jsonl").read_bytes()
    altered = bytearray(wanted)
    altered[-3] ^= 1
    for damaged in (wanted[:-100], bytes(altered), b""):
        checkpoint(run_dir, 12).write_bytes(damaged)
        (run_dir / "metrics.jsonl").write_bytes(lines + b'\xff\xfe{"step"')
        code, _, err = call(capsys, monkeypatch, "export", run_dir, "checkpoint=12")
        assert (code, "step-00000012" in err) == (1, True)
        code, err = prune(*arguments, "resume=auto")
        assert code == 0, err
        assert "step-00000012" in err
        assert checkpoint(run_dir, 12).read_bytes() == wanted
        assert (run_dir / "metrics.jsonl").read_bytes() == lines


def as_one_who_may_not_write_everywhere() -> list[str]:
    """A prefix that takes from root the power to ignore permissions."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv to prevent it")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def test_a_read_only_place(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o555)
    try:
        done = subprocess.run(
            [*as_one_who_may_not_write_everywhere(), sys.executable, "-m", "edgeprune", "prune",
             *SMALL, f"run_dir={place / 'run'}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        place.chmod(0o755)
    assert_refused(done, 1, str(place), "Permission denied")
    assert not list(place.iterdir())


def test_a_run_moved_with_its_model_and_data_resumes(tmp_path, prune, capsys, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(EMBEDDED_MODEL, old / "model")
    write_jsonl(old / "sums.jsonl", *[PAIR] * 4)

    def arguments(place: Path) -> tuple[str, ...]:
        return ("num_edges=60", "trainer.batch_size=4", "trainer.steps=4",
                f"model.path={place / 'model'}", f"task.path={place / 'sums.jsonl'}",
                f"run_dir={place / 'run'}", "resume=auto")  # fmt: skip

    assert prune(*arguments(old))[0] == 0
    old.rename(new)
    assert prune(*arguments(new))[0] == 0
    assert call(capsys, monkeypatch, "evaluate", new / "run")[0] == 0  # the places are noted
    weights = load_file(new / "model/model.safetensors")
    weights["transformer.wpe.weight"] *= 1.5
    save_file(weights, new / "model/model.safetensors", metadata={"format": "pt"})
    code, err = prune(*arguments(new))
    assert (code, "the model has changed" in err) == (2, True)


def test_an_unfinished_run_is_left_out_of_reports(a_run, tmp_path, capsys, monkeypatch):
    run_dir = shutil.copytree(a_run, tmp_path / "runs/run")
    shutil.copytree(a_run, tmp_path / "runs/other")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("  steps: 4\n", "  steps: 40\n"))
    for name in ("scores.safetensors", "circuit.json", "edges.json", "curve.json"):
        (run_dir / name).unlink()
    code, _, err = call(capsys, monkeypatch, "export", run_dir)
    assert code == 0, err
    assert "4 of 40 steps" in err
    code, out, err = call(capsys, monkeypatch, "report", tmp_path / "runs")
    assert (code, "1 run " in out, str(run_dir) in err) == (0, True, True)


# ---------------------------------------------------------------------------- data that goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path, prune):
    """A model whose weights are damaged from position 30 on, and one prompt of that length."""
    model, run_dir = shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"), tmp_path / "run"
    weights = load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"][30:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sums = [" + ".join(["1"] * count) + " =" for count in (*range(2, 14), 20)]
    data = write_jsonl(
        tmp_path / "sums.jsonl",
        *({"clean": f"{sum} <predict>3</predict>", "corrupted": f"2{sum[1:]} <predict>4</predict>"}
          for sum in sums),
    )  # fmt: skip
    code, err = prune(f"model.path={model}", f"task.path={data}", "trainer.steps=6",
                      "trainer.batch_size=2", "seed=1", "num_edges=60",
                      f"run_dir={run_dir}")  # fmt: skip
    assert (code, "Traceback" in err) == (1, False)
    last = err.strip().splitlines()[-1]
    assert "'1 + 1" in last and "trainer.learning_rate" in last
    (step,) = steps(run_dir)
    assert f"step {step + 1}" in err
    assert load_file(checkpoint(run_dir, step))["edge"].isfinite().all()


def test_held_out_prompts_that_cannot_be_measured_are_found_before_training(tmp_path, prune):
    def line(split: str, sum: str, **changes: str) -> dict:
        return {"clean": f"{sum} = <predict>3</predict>", "split": split,
                "corrupted": f"2{sum[1:]} = <predict>4</predict>", **changes}  # fmt: skip

    train_lines = [line("train", f"1 + {i}") for i in range(1, 5)]
    misfit = {"corrupted": "2 + 1 + 1 = <predict>4</predict>"}
    arguments = (f"run_dir={tmp_path / 'run'}", "num_edges=60", "trainer.steps=2")
    data = write_jsonl(tmp_path / "a.jsonl", *train_lines, line("validation", "1 + 1", **misfit))
    assert prune(*arguments, f"task.path={data}")[0] == 1
    longer = line("validation", "1 + 1 + 1")
    data = write_jsonl(tmp_path / "b.jsonl", *train_lines, longer)
    code, err = prune(*arguments, f"task.path={data}", "ablation=mean")
    assert (code, "ablation.per_position=false" in err) == (2, True)
    bad_test = line("test", "1 + 1", clean="1 + 4 = 5")
    data = write_jsonl(tmp_path / "c.jsonl", *train_lines, longer, bad_test)
    code, err = prune(*arguments, f"task.path={data}")
    assert (code, "c.jsonl, line 6" in err) == (1, True)
    assert not (tmp_path / "run").exists()
    data = write_jsonl(tmp_path / "d.jsonl", *train_lines, longer, line("test", "1 + 1", **misfit))
    code, err = prune(*arguments, f"task.path={data}")
    assert (code, "test prompts" in err) == (0, True), err
