"""Things going wrong for real: kills, full and read-only disks, two runs in one place, NaN."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    assert_refused,
    call,
    random_gpt2,
    random_pairs,
    run_cli,
    write_jsonl,
)
from safetensors.torch import load_file, save_file

from edgeprune.circuit import Circuit
from edgeprune.config import (
    AblationConfig,
    ModelConfig,
    PruneConfig,
    Resume,
    TaskConfig,
    TrainerConfig,
)
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import ConfigError, Interrupted
from edgeprune.files import write_text
from edgeprune.graph import CircuitGraph
from edgeprune.models import wrap_model
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.runs.run import begin, claim, first_files, train
from edgeprune.scale.world import World
from edgeprune.training.checkpoint import list_checkpoints
from edgeprune.training.trainer import Trainer

SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8", "trainer.batch_size=4",
    "num_edges=60", "sparsity=null",
)  # fmt: skip


def start(*arguments: object, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def wait_for(condition, process: subprocess.Popen, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_a_run_ends_at_the_same_bits(tmp_path):
    settings = (*SMALL, "trainer.steps=160", "trainer.checkpoint_every=2", "resume=auto")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert run_cli("prune", *settings, f"run_dir={whole}").returncode == 0
    rng = random.Random(0)
    reached, startup = [], 1.0
    for kill in range(20):
        before = list_checkpoints(run_dir)
        began = time.monotonic()
        process = start("prune", *settings, f"run_dir={run_dir}")
        if kill % 4 == 0:  # while it starts, loads, or reads its checkpoint
            time.sleep(rng.uniform(0, 1.2 * startup))
        else:  # while it trains or writes
            wait_for(lambda before=before: list_checkpoints(run_dir) != before, process)
            startup = time.monotonic() - began
            time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it was over before it was killed"
        process.kill()
        process.communicate()
        reached.append((list_checkpoints(run_dir) or [0])[-1])
    assert reached == sorted(reached), "a kill undid a checkpoint"
    assert len(set(reached)) >= 15
    done = run_cli("prune", *settings, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {reached[-1]} of 160" in done.stderr
    last = "checkpoints/step-00000160"
    for name in (f"{last}/masks.safetensors", f"{last}/optimizer.safetensors", "metrics.jsonl",
                 "edges.json", "circuit.json"):  # fmt: skip
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [path for path in run_dir.rglob("*") if path.name.endswith(".tmp")]


def test_a_second_run_in_the_same_place_is_refused_until_the_first_is_dead(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ("prune", *SMALL, "trainer.steps=2000", f"run_dir={run_dir}")
    first = start(*arguments, "trainer.checkpoint_every=5")
    try:
        wait_for(lambda: list_checkpoints(run_dir), first)
        os.kill(first.pid, signal.SIGSTOP)  # a run that is stuck still holds its place
        before = {path: path.stat().st_mtime for path in run_dir.rglob("*")}
        for more in ("resume=auto", "overwrite=true"):
            second = run_cli(*arguments, more)
            assert_refused(second, 2, f"another run is at work in {run_dir}", "run_dir=")
        assert {path: path.stat().st_mtime for path in run_dir.rglob("*")} == before
    finally:
        first.kill()
        first.communicate()
    second = start(*arguments, "resume=auto", "trainer.checkpoint_every=5")
    last = list_checkpoints(run_dir)[-1]
    wait_for(lambda: list_checkpoints(run_dir)[-1] > last, second)
    second.kill()
    assert f"resuming from step {last}" in second.communicate()[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file below a folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("lr: 0.1\n")
    return folder


def set_up(folder: Path, **settings) -> None:
    """A run begins."""
    config = PruneConfig(run_dir=str(folder), **settings)
    claim(folder, config)
    data = Path(__file__)
    if config.task.path is None:
        data = put(first_files(folder, World()), "data.jsonl") / "data.jsonl"
    begin(folder, config, wrap_model(random_gpt2()), data)


def leave_run(folder: Path, **settings) -> Path:
    """What a run leaves, as far as names go."""
    set_up(folder, **settings)
    put(folder, "metrics.jsonl", "edges.json", "circuit.json", "evaluation-test.json",
        "checkpoints/step-00000001/masks.safetensors", "circuit.pdf")  # fmt: skip
    return folder


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_files_that_no_run_left_are_not_touched(tmp_path, overwrite, capsys, monkeypatch):
    names = ("config.yaml", "metrics.jsonl", "data.jsonl", "checkpoints/best.pt")
    proj = put(tmp_path / "proj", *names)
    before = contents(proj)
    code, _, err = call(
        capsys, monkeypatch, "prune", "experiment=ioi", "task=custom",
        f"task.path={proj / 'data.jsonl'}", f"run_dir={proj}", f"overwrite={overwrite}",
    )  # fmt: skip
    assert code == 2
    assert "files that no run left there" in err
    assert "config.yaml, metrics.jsonl, checkpoints, data.jsonl; choose another run_dir=" in err
    assert contents(proj) == before


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "data.jsonl", "metrics.jsonl", "edges.json",
             "evaluation-test.json", "checkpoints/best.pt", "circuit.svg", "graph.json"]
)  # fmt: skip
def test_one_file_of_a_runs_names_is_enough_to_be_refused(tmp_path, name):
    put(tmp_path, name)
    with pytest.raises(ConfigError, match="files that no run left there"):
        claim(tmp_path, PruneConfig(run_dir=str(tmp_path), overwrite=True))
    assert list(contents(tmp_path)) == [name]


def test_a_folder_of_other_files_may_be_a_run_directory(tmp_path):
    set_up(put(tmp_path, "notes.txt"))
    assert set(contents(tmp_path)) == {"notes.txt", "config.yaml", "data.jsonl", "run.json"}


def test_a_runs_settings_do_not_make_what_lies_beside_them_a_runs(tmp_path):
    """A run writes run.json before it leaves anything but settings and prompts."""
    run_dir = leave_run(tmp_path / "run")
    (run_dir / "run.json").unlink()
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="files that no run left there"):
        claim(run_dir, PruneConfig(run_dir=str(run_dir)))
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("config.yaml", "[1", "config.yaml cannot be read"),
        ("config.yaml", "- 1", "config.yaml is no list of settings"),
        ("run.json", "{", "cannot read"),
        ("run.json", "[]", "cannot read"),
    ],
)
def test_where_damage_hides_whose_files_they_are_that_is_said(tmp_path, name, content, wanted):
    run_dir = leave_run(tmp_path / "run")
    (run_dir / name).write_text(content)
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="so it cannot be told whether a run left") as error:
        claim(run_dir, PruneConfig(run_dir=str(run_dir), overwrite=True))
    assert str(error.value).startswith((f"{run_dir}/{wanted}", f"cannot read {run_dir}/{name}: "))
    assert contents(run_dir) == before


def test_damaged_files_of_a_run_are_named_once_and_without_pythons_words(
    a_run, tmp_path, capsys, monkeypatch
):
    run_dir = shutil.copytree(a_run, tmp_path / "run")

    def refused(name: str, content: str, *command: object) -> str:
        whole = (run_dir / name).read_text()
        (run_dir / name).write_text(content)
        code, _, err = call(capsys, monkeypatch, *command)
        (run_dir / name).write_text(whole)
        assert (code, err.count(f"{run_dir}/{name}")) == (2, 1), err
        assert not any(word in err for word in ("Error", "subscriptable", "'graph'", "indices"))
        return err

    for command in (("evaluate", run_dir), ("export", run_dir), ("draw", run_dir)):
        assert "no list of settings" in refused("config.yaml", "- 1", *command)
    for content in ("{}", "null", "[]", '{"graph": 3}', '{"graph": {}}'):
        refused("run.json", content, "export", run_dir)
        refused("run.json", content, "evaluate", run_dir)
    graph_alone = json.dumps({"graph": json.loads((run_dir / "run.json").read_text())["graph"]})
    (run_dir / "run.json").write_text(graph_alone)
    assert call(capsys, monkeypatch, "export", run_dir, "format=eap_json")[0] == 0


def test_overwriting_throws_away_a_run_and_nothing_else(tmp_path):
    run_dir = put(leave_run(tmp_path / "run"), "mine/edges.json", "notes.txt")
    task = TaskConfig(name="custom", path="my.jsonl")
    set_up(run_dir, seed=1, overwrite=True, task=task)
    assert set(contents(run_dir)) == {"config.yaml", "run.json", "mine/edges.json", "notes.txt"}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["seed"] == 1


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("faults") / "run"
    done = run_cli("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize(
    "arguments",
    [
        ("task=custom", "task.path=typo.jsonl"),
        ("task=custom", "task.path=same.jsonl"),  # interchange ablation would change nothing
        ("model.device=cuda:99",),
        ("num_edges=9999999",),
        ("trainer.cuda_graph=true", "model.device=cpu"),
    ],
)
def test_a_command_that_cannot_begin_overwrites_nothing(
    a_run, tmp_path, arguments, capsys, monkeypatch
):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "same.jsonl", dict.fromkeys(
        ("clean", "corrupted"), "1 + 2 = <predict>3</predict>"
    ))  # fmt: skip
    overwrite = ("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}", "overwrite=true")
    code, _, err = call(capsys, monkeypatch, *overwrite, *arguments)
    assert code in (1, 2), err
    assert contents(run_dir) == contents(a_run)


def test_a_command_that_is_stopped_while_loading_overwrites_nothing(
    a_run, tmp_path, capsys, monkeypatch
):
    from edgeprune.commands import prune

    run_dir = shutil.copytree(a_run, tmp_path / "run")
    overwrite = ("prune", *SMALL, "trainer.steps=2", "task.seed=1", f"run_dir={run_dir}",
                 "overwrite=true")  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prune, "load_model", stop)
        assert call(capsys, monkeypatch, *overwrite)[0] == 130
    assert contents(run_dir) == contents(a_run)

    process = start(*overwrite)
    wait_for((run_dir / ".new-run/data.jsonl").exists, process)
    process.kill()
    process.communicate()
    left = {name: c for name, c in contents(run_dir).items() if not name.startswith(".new-run/")}
    assert left == contents(a_run)
    resume = ("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}", "resume=auto")
    assert call(capsys, monkeypatch, *resume)[0] == 0
    assert not (run_dir / ".new-run").exists()

    assert call(capsys, monkeypatch, *overwrite)[0] == 0
    assert contents(run_dir).keys() != contents(a_run).keys()  # another last step
    assert list_checkpoints(run_dir) == [2]
    prompts = (run_dir / "data.jsonl").read_bytes()
    assert prompts != (a_run / "data.jsonl").read_bytes()
    noted = json.loads((run_dir / "run.json").read_text())["data"]
    assert noted == {
        "path": str(run_dir / "data.jsonl"), "sha256": hashlib.sha256(prompts).hexdigest()
    }  # fmt: skip


def test_no_output_replaces_what_is_read_or_a_runs_own_files(a_run, tmp_path, capsys, monkeypatch):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    assert call(capsys, monkeypatch, "export", run_dir, "format=eap_pt")[0] == 0
    (tmp_path / "link.json").symlink_to(run_dir / "edges.json")
    monkeypatch.chdir(run_dir)
    before = contents(run_dir)
    for command, output, wanted in (
        (("export", "."), "config.yaml", "own files of the run in"),
        (("export", "."), run_dir / "checkpoints/step-00000004/x.json", "(checkpoints)"),
        (("evaluate", "."), "edges.json", "is what is read, which would be replaced"),
        (("evaluate", "graph.pt"), "../link.json", "(edges.json)"),
        (("evaluate", "."), "run.json", "(run.json); choose another file"),
        (("evaluate", "."), "data.jsonl", "(data.jsonl)"),
        (("prepare",), "data.jsonl", "(data.jsonl)"),
        (("export", "graph.pt", "num_edges=9"), run_dir / "graph.pt", "is what is read"),
        (("draw", "."), "training.png", "(training.png)"),
        (("benchmark",), "metrics.jsonl", "(metrics.jsonl)"),
    ):  # fmt: skip
        formats = ["formats=png"] if command[0] == "draw" else []
        code, _, err = call(capsys, monkeypatch, *command, f"output={output}", *formats)
        assert (code, wanted in err) == (2, True), err
        assert contents(run_dir) == before
    (run_dir / "data.jsonl").unlink()  # which may be written anew, and comes out as it was
    again = ("prepare", *SMALL[:4], f"output={run_dir / 'data.jsonl'}")
    code, _, err = call(capsys, monkeypatch, *(a for a in again if "experiment" not in a))
    assert code == 0, err
    assert contents(run_dir) == before


def test_overwriting_throws_away_what_commands_made_of_a_run(a_run, tmp_path, capsys, monkeypatch):
    run_dir = put(shutil.copytree(a_run, tmp_path / "run"), "report/notes.txt", "mine.pdf")
    before = set(contents(run_dir))
    for command in (("draw",), ("export", "format=eap_json"), ("export", "format=eap_pt"),
                    ("evaluate",), ("report",)):  # fmt: skip
        assert call(capsys, monkeypatch, command[0], run_dir, *command[1:])[0] == 0
    made = {"circuit.pdf", "circuit.svg", "circuit.png", "circuit.dot", "graph.json", "graph.pt",
            "evaluation-test.json", "report/report.html", "report/.report.json"}  # fmt: skip
    assert made <= set(contents(run_dir))
    again = ("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}", "overwrite=true")
    assert call(capsys, monkeypatch, *again)[0] == 0
    assert set(contents(run_dir)) == before


def test_overwriting_does_not_throw_away_the_prompts_to_be_read(tmp_path):
    run_dir = leave_run(tmp_path / "run")
    before = contents(run_dir)
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    for folder in (run_dir, link):
        task = TaskConfig(name="custom", path=str(folder / "data.jsonl"))
        with pytest.raises(ConfigError, match="data.jsonl would be deleted .* copy it"):
            claim(run_dir, PruneConfig(run_dir=str(run_dir), task=task, overwrite=True))
    assert contents(run_dir) == before


def test_prompts_of_ones_own_are_not_taken_for_generated_ones(tmp_path):
    """Beside a run whose prompts lie elsewhere."""
    run_dir = leave_run(tmp_path / "run", task=TaskConfig(name="custom", path="my.jsonl"))
    put(run_dir, "data.jsonl")
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="no run left there.*: data.jsonl; choose"):
        claim(run_dir, PruneConfig(run_dir=str(run_dir), overwrite=True))
    assert contents(run_dir) == before


def test_a_runs_settings_name_files_for_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-model").mkdir()
    run_dir = Path("run")
    for model, wanted in (("my-model", str(tmp_path / "my-model")), ("org/model", "org/model")):
        parts = {"model": ModelConfig(path=model), "task": TaskConfig(path="my.jsonl")}
        set_up(run_dir, **parts, overwrite=True)
        settings = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert settings["task"]["path"] == str(tmp_path / "my.jsonl")
        assert settings["model"]["path"] == wanted
    put(run_dir, "checkpoints/step-00000001/masks.safetensors")
    claim(run_dir, PruneConfig(run_dir="run", **parts, resume=Resume.auto))  # the same settings


def test_what_is_no_file_is_not_replaced_and_links_are_followed(tmp_path):
    pipe, link, real = (tmp_path / name for name in ("pipe", "link", "real.json"))
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/full"), Path("/dev/stdout")):
        with pytest.raises(OSError, match="is a device or a pipe; give the path of a file"):
            write_text(path, "text")
    assert pipe.is_fifo() and Path("/dev/full").is_char_device()
    link.symlink_to(real)
    write_text(link, "text")
    assert link.is_symlink() and real.read_text() == "text"


def test_an_unfinished_run_is_said_to_be_one_and_left_out_of_reports(tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    arguments = ("prune", *SMALL, "trainer.steps=6", "trainer.checkpoint_every=2",
                 f"run_dir={run_dir}")  # fmt: skip
    assert call(capsys, monkeypatch, *arguments)[0] == 0
    assert "steps, so its gates" not in call(capsys, monkeypatch, "export", str(run_dir))[2]
    shutil.rmtree(run_dir / "checkpoints/step-00000006")
    damaged = run_dir / "checkpoints/step-00000004/masks.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run_dir / "edges.json").unlink()
    code, _, err = call(capsys, monkeypatch, "evaluate", str(run_dir))
    assert code == 2 and "has no edges.json yet; let the run end" in err
    code, _, err = call(capsys, monkeypatch, "export", str(run_dir))
    assert code == 0
    assert "step-00000004 is damaged: masks.safetensors was altered or cut; passing over it" in err
    assert "has done 2 of 6 steps" in err
    code, _, err = call(capsys, monkeypatch, "report", str(tmp_path))
    assert code == 2
    assert "is left out: its circuit is of step 2 of 6; let the run end" in err
    assert call(capsys, monkeypatch, *arguments, "resume=auto")[0] == 0
    assert call(capsys, monkeypatch, "report", str(tmp_path))[0] == 0


def test_prompts_that_were_trained_on_are_said(tmp_path, capsys, monkeypatch):
    pair = {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>"}
    longer = {**pair, "clean": "1 + 2 + 3 = <predict>6</predict>"}
    data = write_jsonl(
        tmp_path / "sums.jsonl", *[{**pair, "split": "train"}] * 4, {**longer, "split": "train"},
        {**pair, "split": "validation"}, {**longer, "split": "validation"},
    )  # fmt: skip
    code, out, err = call(
        capsys, monkeypatch, "prune", f"task.path={data}", "num_edges=60", "trainer.steps=2",
        "trainer.batch_size=2", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 0, err
    assert "1 of 1 validation prompts are training prompts, too" in err
    assert "4 pairs (1 left out)" in err
    assert "1 prompts (1 left out)" in " ".join(out.split())
    assert "no edge on " in out


def test_an_empty_run_dir_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, monkeypatch, "prune", "experiment=ioi", "run_dir=''")
    assert code == 2
    assert "run_dir is empty; name a folder" in err
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    """A model whose weights are damaged from position 30 on, and one prompt as long as that."""
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
    done = run_cli("prune", "model=custom", f"model.path={model}", "task=custom",
                   f"task.path={data}", "trainer.steps=6", "trainer.batch_size=2", "seed=1",
                   "num_edges=60", f"run_dir={run_dir}")  # fmt: skip
    assert_refused(done, 1, "the loss is nan at step ", "on the batch that begins with '1 + 1",
                   "the state before this step is kept", "Lower trainer.learning_rate")  # fmt: skip
    step = int(done.stderr.split(" at step ")[1].split()[0])
    assert step > 1
    assert list_checkpoints(run_dir) == [step - 1]
    masks = load_file(run_dir / f"checkpoints/step-{step - 1:08d}/masks.safetensors")
    assert masks["edge_log_alpha"].isfinite().all()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_that_failed_before_its_first_checkpoint_is_not_in_the_way(
    tmp_path, resume, capsys, monkeypatch
):
    """Not even of other settings; and it is no run to evaluate."""
    run_dir = tmp_path / "run"
    prune = ("prune", *SMALL, "trainer.steps=2", f"run_dir={run_dir}", f"resume={resume}")

    step = Trainer.train_step

    def failing(self):  # in a step after which no checkpoint is saved
        if self.step == 1:
            raise ConfigError("cannot be done")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", failing)
        assert call(capsys, monkeypatch, *prune, "trainer.log_every=1")[0] == 2
    assert (run_dir / "training.png").exists()
    for command, wanted in (("evaluate", "no edges.json yet"), ("export", "no usable checkpoint")):
        code, _, err = call(capsys, monkeypatch, command, run_dir)
        assert (code in (1, 2), wanted in err) == (True, True), err
    code, _, err = call(capsys, monkeypatch, *prune, "trainer.learning_rate=0.1", "task.seed=1")
    assert code == 0, err
    assert list_checkpoints(run_dir) == [2]
    again = call(capsys, monkeypatch, *prune, "trainer.learning_rate=0.2", "task.seed=1")
    assert again[0] == 2
    assert "already holds a run" in again[2] or "run of another config" in again[2]


@pytest.mark.parametrize("name", ["edges.json", "circuit.pdf", "checkpoints/step-00000001/x"])
def test_what_was_made_of_a_run_protects_it(tmp_path, name):
    set_up(tmp_path)
    set_up(tmp_path)  # nothing yet
    before = contents(put(tmp_path, name))
    with pytest.raises(ConfigError, match="already holds a run"):
        claim(tmp_path, PruneConfig(run_dir=str(tmp_path)))
    assert contents(tmp_path) == before


def test_prompts_without_a_difference_leave_no_run(tmp_path, capsys, monkeypatch):
    same = dict.fromkeys(("clean", "corrupted"), "1 + 2 = <predict>3</predict>")
    data, run_dir = write_jsonl(tmp_path / "sums.jsonl", same), tmp_path / "run"
    prune = ("prune", "task=custom", f"task.path={data}", "num_edges=60", "trainer.steps=2",
             f"run_dir={run_dir}")  # fmt: skip
    code, _, err = call(capsys, monkeypatch, *prune)
    assert (code, "the same as their clean ones" in err) == (1, True)
    assert [path.name for path in run_dir.iterdir()] == [".lock"]
    assert call(capsys, monkeypatch, *prune, "ablation=zero")[0] == 0


def test_a_run_stopped_in_its_last_step_does_not_go_on_to_what_follows(tmp_path):
    model = wrap_model(random_gpt2())
    pairs = random_pairs(4)
    trainer = Trainer(
        model, pairs, TrainerConfig(steps=2, batch_size=2), target_sparsity=0.5, seed=0,
        ablation=Ablation(model, AblationConfig(), pairs),
    )  # fmt: skip

    def stop_at_the_end(metrics):
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 2"):
        train(trainer, tmp_path, stop_at_the_end, print)
    assert list_checkpoints(tmp_path) == [2]


def test_validation_prompts_that_cannot_be_measured_are_refused_before_training(tmp_path):
    def line(split: str, sum: str) -> dict:
        return {"clean": f"{sum} = <predict>3</predict>", "split": split,
                "corrupted": f"2{sum[1:]} = <predict>4</predict>"}  # fmt: skip

    train = [line("train", f"1 + {i}") for i in range(1, 5)]
    longer = write_jsonl(tmp_path / "longer.jsonl", *train, line("validation", "1 + 1 + 1"))
    misfit = {**line("validation", "1 + 1"), "corrupted": "2 + 1 + 1 = <predict>4</predict>"}
    unusable = write_jsonl(tmp_path / "unusable.jsonl", *train, misfit)
    prune = ("prune", "task=custom", f"run_dir={tmp_path / 'run'}", "num_edges=60",
             "trainer.steps=2", "trainer.batch_size=2")  # fmt: skip
    assert_refused(
        run_cli(*prune, f"task.path={longer}", "ablation=mean"),
        2, "a validation prompt has", "task.max_length=", "ablation.per_position=false",
    )  # fmt: skip
    assert_refused(run_cli(*prune, f"task.path={unusable}"), 1, "none of the 1 examples")
    assert not (tmp_path / "run/checkpoints").exists()
    done = run_cli(*prune, f"task.path={longer}", "ablation=mean", "ablation.per_position=false")
    assert done.returncode == 0, done.stderr


def test_generated_prompts_are_not_named_by_a_file_that_is_gone(tmp_path, capsys, monkeypatch):
    prune = ("prune", *SMALL, f"run_dir={tmp_path / 'run'}", "task.max_length=3")
    code, _, err = call(capsys, monkeypatch, *prune)
    assert code == 1
    assert "can be used. the generated prompts, line 1: " in err
    assert ".new-run" not in err


def test_test_prompts_that_cannot_be_measured_are_found_before_training(
    tmp_path, capsys, monkeypatch
):
    sums = [{"clean": f"1 + {i} = <predict>3</predict>", "split": split,
             "corrupted": f"2 + {i} = <predict>4</predict>"}
            for i, split in enumerate(("train", "train", "validation", "test"), 1)]  # fmt: skip
    malformed = write_jsonl(tmp_path / "malformed.jsonl", *sums, {**sums[3], "clean": "1 + 4 = 5"})
    sums[3]["corrupted"] = "2 + 1 + 1 = <predict>4</predict>"
    misfit = write_jsonl(tmp_path / "misfit.jsonl", *sums)
    prune = ("prune", f"run_dir={tmp_path / 'run'}", "num_edges=60", "trainer.steps=2")
    code, _, err = call(capsys, monkeypatch, *prune, f"task.path={malformed}")
    assert (code, "malformed.jsonl, line 5: field 'clean' needs exactly" in err) == (1, True), err
    assert not (tmp_path / "run/checkpoints").exists()
    code, _, err = call(capsys, monkeypatch, *prune, f"task.path={misfit}")
    assert code == 0, err
    assert "cannot be measured on its test prompts: none of the 1 examples can be used" in err


def test_another_model_on_resuming_is_refused(tmp_path):
    model = shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    arguments = ("prune", *SMALL, "trainer.steps=4", "model=custom", f"model.path={model}",
                 f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert run_cli(*arguments).returncode == 0
    weights = load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"] *= 1.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run_cli(*arguments, "resume=auto"), 2, "the model has changed", str(model))


def test_a_run_goes_on_where_it_and_its_model_and_data_were_moved(tmp_path, capsys, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(EMBEDDED_MODEL, old / "model")
    pair = {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>"}
    write_jsonl(old / "sums.jsonl", *[pair] * 4)

    def prune(place: Path, *more: str) -> tuple[int, str, str]:
        return call(
            capsys, monkeypatch, "prune", "num_edges=60", "trainer.batch_size=4",
            "trainer.steps=4", "model=custom", f"model.path={place / 'model'}",
            "task=custom", f"task.path={place / 'sums.jsonl'}",
            f"run_dir={place / 'run'}", *more,
        )  # fmt: skip

    assert prune(old)[0] == 0
    old.rename(new)
    code, _, err = prune(new, "resume=auto")
    assert code == 0, err
    assert "resuming from step 4 of 4" in err
    assert call(capsys, monkeypatch, "evaluate", str(new / "run"))[0] == 0  # the places are noted
    write_jsonl(new / "sums.jsonl", *[pair] * 5)
    code, _, err = prune(new, "resume=auto")
    assert code == 2
    assert "the data has changed" in err


def limited(size: int):
    """Files may not grow beyond a size: what a full disk does, without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [0, 300])
def test_a_disk_that_is_full_at_the_start(tmp_path, size):
    """Neither settings nor prompts can be written; nothing half-written is left."""
    process = start(
        "prune", *SMALL, "trainer.steps=4", f"run_dir={tmp_path / 'run'}", preexec_fn=limited(size)
    )
    error = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 1
    assert error[-1] == f"edgeprune: {tmp_path / 'run/.new-run/config.yaml'}: File too large"
    left = [path.name for path in (tmp_path / "run").rglob("*")]
    assert set(left) <= {".lock"}


def test_a_disk_that_is_full_says_which_file_of_torch_cannot_be_written(tmp_path):
    circuit = Circuit(CircuitGraph(1, 2, 2, ("embeds",)), frozenset({("a0.h0", "resid_post")}))
    circuit.save(tmp_path / "g.json", "eap_json")
    target = tmp_path / "graph.pt"
    process = start("export", tmp_path / "g.json", f"output={target}", preexec_fn=limited(300))
    error = process.communicate(timeout=120)[1]
    assert (process.returncode, error) == (1, f"edgeprune: {target}: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]


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


def test_text_of_prompts_is_never_markup_in_what_is_said(tmp_path):
    """Neither rich's, nor a terminal's."""
    text = "[bold red]1[/bold red] + \x1b[31m 2 [link=x] \\[ ="
    pair = {"clean": f"{text} <predict>3</predict>",
            "corrupted": f"{text.replace('2', '3')} <predict>4</predict>"}  # fmt: skip
    other = {**pair, "corrupted": f"{text} 5 6 7 8 9 <predict>4</predict>"}  # is left out, and said
    data = write_jsonl(tmp_path / "[red]data[-].jsonl", pair, pair, other)
    done = run_cli("prune", "task=custom", f"task.path='{data}'", "task.name='[green]mine[/]'",
                   "trainer.steps=4", "num_edges=60", f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on [green]mine[/]: 2 pairs" in done.stderr
    assert "[red]data[-].jsonl [without splits]: left out 1 of 3" in done.stderr
    assert "[red]data[-].jsonl [without splits]" in done.stdout
    assert "[bold red]1[/bold red] + \\x1b[31m 2 [link=x]" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lie(path: Path) -> None:
    """A header that claims more than there is."""
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut, lie])
@pytest.mark.parametrize("name", ["masks", "optimizer"])
def test_damaged_checkpoints_are_passed_over_and_said(tmp_path, damage, name):
    run_dir = tmp_path / "run"
    arguments = ("prune", *SMALL, "trainer.steps=12", "trainer.checkpoint_every=4",
                 f"run_dir={run_dir}", "resume=auto")  # fmt: skip
    assert run_cli(*arguments).returncode == 0
    last = run_dir / "checkpoints/step-00000012/masks.safetensors"
    wanted = last.read_bytes()
    for step in (8, 12):
        damage(run_dir / f"checkpoints/step-{step:08d}/{name}.safetensors")
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    for step in (8, 12):
        assert f"step-{step:08d} is damaged: {name}.safetensors was altered or cut" in done.stderr
    assert "passing over it" in done.stderr
    assert "resuming from step 4 of 12" in done.stderr
    assert last.read_bytes() == wanted
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()] == [10, 12]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_said_with_what_to_do(tmp_path, capsys, monkeypatch, error):
    """And what a GPU had learned by then is kept."""
    run_dir, step = tmp_path / "run", Trainer.train_step
    arguments = ("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}")

    def failing(self):
        if self.step == 2:
            raise error
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", failing)
        code, _, err = call(capsys, monkeypatch, *arguments)
    assert code == 1
    assert f"out of memory ({str(error).splitlines()[0]}). Take fewer" in err
    assert "trainer.micro_batch_size" in err
    kept = [path.name for path in (run_dir / "checkpoints").glob("*")]
    assert len(kept) == isinstance(error, torch.OutOfMemoryError)
    assert call(capsys, monkeypatch, *arguments, "resume=auto")[0] == 0


@pytest.mark.parametrize("damage", [b"\xff\xfe\0", b'{"step": "x"}\n', b'{"step": null}\n', b"[]"])
def test_damaged_metrics_do_not_stop_a_run_from_going_on(
    a_run, tmp_path, damage, capsys, monkeypatch
):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    metrics = run_dir / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + damage)
    resume = ("prune", *SMALL, "trainer.steps=4", f"run_dir={run_dir}", "resume=auto")
    code, _, err = call(capsys, monkeypatch, *resume)
    assert code == 0, err
    assert metrics.read_bytes() == whole


def test_a_full_disk_is_said_though_metrics_end_in_half_a_line(tmp_path):
    run_dir = tmp_path / "run"
    limit = 1500  # some lines of metrics, and no checkpoint
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "prune", *SMALL, "trainer.log_every=1",
         "trainer.steps=20", f"run_dir={run_dir}"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert_refused(done, 1, "File too large")
    assert "defect" not in done.stderr
