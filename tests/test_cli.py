"""Whole commands, each in a fresh process, as people run them."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import assert_refused, call, run_cli, write_jsonl
from safetensors.torch import load_file, save_file

from edgeprune.config import COMMANDS
from edgeprune.help import setting_kinds
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.scale.launch import stop_signals

SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8",
    "trainer.steps=40", "trainer.checkpoint_every=5",
    "trainer.batch_size=4", "num_edges=60", "sparsity=null",
)  # fmt: skip
"""A run of seconds."""
LAST = "checkpoints/step-00000040"


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run that nobody changes."""
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    done = run_cli("prune", *SMALL, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def masks(run_dir) -> list[float]:
    return load_file(run_dir / LAST / "masks.safetensors")["edge_log_alpha"].tolist()


def without_digests(name: str) -> str:
    """A file's name, with DIGEST for the beginnings of SHA-256 in it."""
    return re.sub(r"(?<=-)[0-9a-f]{8}(?=-)", "DIGEST", name)


def read_evaluation(folder, name: str) -> dict:
    """The one evaluation there of this name; in it DIGEST stands for any."""
    found = [p for p in folder.glob("evaluation-*") if f"-{name}.json" in without_digests(p.name)]
    (path,) = found
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------- what is left


def test_a_run_leaves_everything_needed(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "run.json", "data.jsonl", "metrics.jsonl", "checkpoints", "edges.json",
        "circuit.json", "evaluation-validation.json", ".lock", "training.png",
    }  # fmt: skip
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    edges = json.loads((finished / "edges.json").read_text())
    assert len(edges) == 60
    assert all(len(edge) == 2 for edge in edges)
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [10, 20, 30, 40]
    assert {"kl", "sparsity", "target", "loss"} <= steps[0].keys()
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_export_evaluate_and_draw(copied, tmp_path):
    done = run_cli("export", copied, "num_edges=33", f"output={tmp_path / 'e.json'}")
    assert "33 of 5,524 edges" in done.stdout
    assert len(json.loads((tmp_path / "e.json").read_text())) == 33
    done = run_cli("export", copied, "num_edges=33", f"output={tmp_path / 'e.pt'}")
    assert done.returncode == 0, done.stderr
    graph = torch.load(tmp_path / "e.pt", weights_only=True)
    assert graph["cfg"] == {
        "n_layers": 4, "n_heads": 16, "parallel_attn_mlp": False, "d_model": 128,
    }  # fmt: skip
    kept = graph["edges_scores"][graph["edges_in_graph"]]
    assert kept.min() >= graph["edges_scores"][~graph["edges_in_graph"]].max()
    asked_for = json.loads((copied / "edges.json").read_text())
    done = run_cli("export", copied)  # of the size that the run asked for
    assert "60 of 5,524 edges" in done.stdout
    assert json.loads((copied / "edges.json").read_text()) == asked_for
    done = run_cli("export", copied, "num_edges=40", f"output={copied / 'edges.json'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((copied / "circuit.json").read_text())["num_edges"] == 40
    done = run_cli("export", copied, "threshold=true")
    report = json.loads((copied / "circuit.json").read_text())
    assert report["chosen_by"] == "threshold"
    assert f"at threshold {report['edge_threshold']:.4f}" in done.stdout

    done = run_cli("evaluate", copied, "shuffled_circuits=1", "batch_size=3")
    assert "in words: " in done.stdout
    result = json.loads((copied / "evaluation-test.json").read_text())
    assert result["num_examples"] == 8
    assert result["full"]["kl"] == 0
    assert result["corrupted"]["kl"] > result["circuit"]["kl"]
    assert result["shuffled"]["kl"] > 0

    done = run_cli("draw", copied)
    assert done.returncode == 0, done.stderr
    assert (copied / "circuit.pdf").read_bytes().startswith(b"%PDF")
    assert (copied / "circuit.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (copied / "circuit.svg").read_text()
    assert "digraph" in (copied / "circuit.dot").read_text()


def test_what_is_not_the_runs_own_is_measured_apart_from_it(copied):
    """Another task, ablation or circuit leaves the run's own prompts and evaluation alone."""
    assert run_cli("evaluate", copied).returncode == 0
    own = (copied / "evaluation-test.json").read_text()
    done = run_cli("evaluate", copied, "task=greater_than", "task.train=2", "task.validation=2",
                   "task.test=5", "task.seed=3", "ablation=zero")  # fmt: skip
    assert done.returncode == 0, done.stderr
    other = read_evaluation(copied, "greater_than-seed-3-DIGEST-zero-test")
    assert (other["data"], other["num_examples"]) == ("data.jsonl [test]", 5)
    assert other["edges_sha256"] == json.loads(own)["edges_sha256"]
    small = copied / "small.json"
    run_cli("export", copied, "num_edges=40", f"output={small}")
    assert run_cli("evaluate", small).returncode == 0
    other = json.loads((copied / "evaluation-small-json-test.json").read_text())
    assert other["circuit_file"] == str(small)
    assert other["num_edges"] == 40
    assert other["edges_sha256"] != json.loads(own)["edges_sha256"]
    assert (copied / "evaluation-test.json").read_text() == own


def test_another_model_is_measured_apart_from_the_runs_own(copied, tmp_path, capsys, monkeypatch):
    def evaluated(*arguments) -> tuple[list[str], str]:
        before = set(copied.glob("evaluation-*"))
        code, _, err = call(capsys, monkeypatch, "evaluate", copied, "split=validation", *arguments)
        assert code == 0, err
        return [path.name for path in set(copied.glob("evaluation-*")) - before], err

    def content(name: str) -> dict:
        return json.loads((copied / name).read_text())

    own = content("evaluation-validation.json")
    manifest = content("run.json")
    assert own["model_sha256"] == manifest["model"]["sha256"]
    assert own["data_sha256"] == manifest["data"]["sha256"]
    (name,), _ = evaluated("model=embedded", "model.dtype=bfloat16")
    assert without_digests(name) == "evaluation-embedded-dtype-bfloat16-DIGEST-validation.json"
    other = shutil.copytree(EMBEDDED_MODEL, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights = {key: value * 1.1 for key, value in weights.items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    (name,), _ = evaluated("model=custom", f"model.path={other}")
    assert without_digests(name) == "evaluation-other-DIGEST-validation.json"
    assert content(name)["model_sha256"] != own["model_sha256"]
    assert content(name)["circuit"] != own["circuit"]
    assert content("evaluation-validation.json") == own

    manifest["model"]["sha256"] = "0" * 64  # as if the weights had changed in their place
    (copied / "run.json").write_text(json.dumps(manifest))
    (name,), err = evaluated()
    assert without_digests(name) == "evaluation-embedded-DIGEST-validation.json"
    assert "is not the model of the run in" in err


def test_evaluations_of_like_names_have_files_of_their_own(copied, tmp_path, capsys, monkeypatch):
    def evaluated(circuit, *arguments) -> list[str]:
        before = set(copied.glob("evaluation-*"))
        code, _, err = call(capsys, monkeypatch, "evaluate", circuit, *arguments)
        assert code == 0, err
        return [path.name for path in set(copied.glob("evaluation-*")) - before]

    for format, name in (("eap_json", "graph.json"), ("eap_pt", "graph.pt")):
        assert call(capsys, monkeypatch, "export", copied, f"format={format}")[0] == 0
        expected = f"evaluation-{name.replace('.', '-')}-validation.json"
        assert evaluated(copied / name, "split=validation") == [expected]
    for path, line in (("sums", GOOD), ("other/sums", {**GOOD, "split": "test"}), ("more", GOOD)):
        (tmp_path / "other").mkdir(exist_ok=True)
        data = write_jsonl(tmp_path / f"{path}.jsonl", line)
        (found,) = evaluated(copied, "task=custom", f"task.path={data}")
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        assert found == f"evaluation-{data.stem}-{digest[:8]}-test.json"
    (found,) = evaluated(copied, "ablation=mean")
    assert found == "evaluation-mean-test.json"
    (found,) = evaluated(copied, "ablation=mean", "ablation.per_position=false")
    assert found == "evaluation-mean-over-positions-test.json"


def test_a_run_moved_with_its_model_and_data_knows_them(tmp_path, capsys, monkeypatch):
    """By what they are, not by where they lie."""
    there, here = tmp_path / "cluster", tmp_path / "laptop"
    shutil.copytree(EMBEDDED_MODEL, there / "model")
    write_jsonl(there / "sums.jsonl", GOOD)
    prune = ("task=custom", f"task.path={there / 'sums.jsonl'}", "model=custom",
             f"model.path={there / 'model'}", "num_edges=60", "trainer.steps=2")  # fmt: skip
    assert call(capsys, monkeypatch, "prune", *prune, f"run_dir={there / 'run'}")[0] == 0
    there.rename(here)
    code, _, err = call(capsys, monkeypatch, "evaluate", here / "run")
    assert code != 0
    assert f"no folder {there / 'model'}" in err
    (here / "run/evaluation-train.json").unlink(missing_ok=True)
    moved = [argument.replace(str(there), str(here)) for argument in prune[:4]]
    code, _, err = call(capsys, monkeypatch, "evaluate", here / "run", moved[3])
    assert code == 2  # else the run's dtype and the like would be left out
    assert "sets a part of model, which is the run's own here" in err
    code, _, err = call(capsys, monkeypatch, "evaluate", here / "run", "split=test", *moved)
    assert code == 0, err
    assert (here / "run/evaluation-test.json").exists()


def test_without_a_run_an_evaluations_file_names_everything(
    finished, tmp_path, capsys, monkeypatch
):
    edges = shutil.copy(finished / "edges.json", tmp_path / "copy.json")
    sizes = ("task.train=2", "task.validation=2", "task.test=2")
    for settings, name in (
        (("task=ioi", *sizes), "DIGEST-ioi-DIGEST-interchange"),
        (("task=ioi", *sizes, "task.test=3"), "DIGEST-ioi-DIGEST-interchange"),
        (("task=ioi", *sizes, "task.seed=1"), "DIGEST-ioi-seed-1-DIGEST-interchange"),
        (("task=ioi", "ablation=zero", *sizes), "DIGEST-ioi-DIGEST-zero"),
        (("task=ioi_t1", *sizes), "DIGEST-ioi_t1-DIGEST-interchange"),
        (("task=ioi", *sizes, "model.dtype=bfloat16"),
         "dtype-bfloat16-DIGEST-ioi-DIGEST-interchange"),
    ):  # fmt: skip
        before = set(tmp_path.glob("evaluation-*"))
        assert call(capsys, monkeypatch, "evaluate", edges, "model=embedded", *settings)[0] == 0
        (new,) = set(tmp_path.glob("evaluation-*")) - before
        assert without_digests(new.name) == f"evaluation-copy-json-embedded-{name}-test.json"


def test_a_circuit_cut_from_an_exported_graph_is_the_one_cut_from_the_run(
    copied, tmp_path, capsys, monkeypatch
):
    def export(source, *arguments) -> None:
        code, _, err = call(capsys, monkeypatch, "export", source, *arguments)
        assert code == 0, err

    export(copied, "num_edges=110", f"output={tmp_path / 'whole.json'}")
    for format, name in (("eap_json", "g.json"), ("eap_pt", "g.pt")):
        export(copied, f"format={format}", f"output={tmp_path / name}")
        export(tmp_path / name, "num_edges=110", f"output={tmp_path / 'cut.json'}")
        assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()


def test_results_are_written_though_nobody_reads(copied):
    """As in `edgeprune evaluate RUN | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "edgeprune", "evaluate", copied]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((copied / "evaluation-test.json").read_text())["num_examples"]


def test_an_evaluation_that_cannot_be_written_is_shown_all_the_same(
    finished, tmp_path, capsys, monkeypatch
):
    from edgeprune.commands import evaluate

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "write_json", full)
    target = tmp_path / "evaluation.json"
    code, out, err = call(capsys, monkeypatch, "evaluate", finished, f"output={target}")
    assert "two way accuracy" in out
    assert "in words: " in out
    assert code == 1
    assert f"{target}: No space left on device; `edgeprune evaluate` writes elsewhere" in err


def test_an_evaluation_that_cannot_be_printed_is_written_all_the_same(
    finished, tmp_path, capsys, monkeypatch
):
    from edgeprune.commands import evaluate

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "_print_evaluation", full)
    target = tmp_path / "evaluation.json"
    assert call(capsys, monkeypatch, "evaluate", finished, f"output={target}")[0] == 1
    assert json.loads(target.read_text())["num_examples"] == 8


def test_what_a_terminals_encoding_lacks_is_shown_as_its_number(finished, tmp_path):
    pair = {key: text.replace("=", "😀 =") for key, text in GOOD.items()}
    data = write_jsonl(tmp_path / "sums.jsonl", pair)
    done = run_cli("evaluate", finished, "task=custom", f"task.path={data}",
                   f"output={tmp_path / 'e.json'}", PYTHONIOENCODING="latin-1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on '1 + 2 \\U0001f600 = <predict>" in done.stdout


@pytest.mark.parametrize("output", [".", "/", "/dev/null", "run.json/x/evaluation.json"])
def test_where_no_evaluation_can_be_written_is_said_before_one_is_made(
    finished, output, capsys, monkeypatch
):
    monkeypatch.chdir(finished)
    code, out, err = call(capsys, monkeypatch, "evaluate", finished, f"output={output}")
    assert (code, out, f"output={output}: " in err) == (2, "", True), err


def test_evaluate_and_draw_a_bare_edges_json(finished, tmp_path):
    edges = shutil.copy(finished / "edges.json", tmp_path / "edges.json")
    done = run_cli("evaluate", edges, "model=embedded", "task=ioi_t1", "task.test=5",
                   "task.train=3", "task.validation=3", "ablation=mean")  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = read_evaluation(tmp_path, "embedded-DIGEST-ioi_t1-DIGEST-mean-test")
    assert written["num_examples"] == 5
    assert run_cli("draw", edges, "formats=[dot]").returncode == 0
    assert_refused(run_cli("evaluate", edges), 2, "is of no run, or of several", "model=embedded")


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations_node_gates_and_ones_own_data(tmp_path, ablation):
    """The example of the data format: arithmetic of our own, without splits and distractors."""
    data = write_jsonl(
        tmp_path / "sums.jsonl",
        *(
            {"clean": f"{a} + {b} = <predict>{a + b}</predict>",
             "corrupted": f"{a} + {b + 1} = <predict>{a + b + 1}</predict>"}
            for a in range(1, 4) for b in range(1, 5)
        ),
    )  # fmt: skip
    done = run_cli("prune", *SMALL[4:], "task=custom", f"task.path={data}", f"ablation={ablation}",
                   "trainer.node_gates=true", f"run_dir={tmp_path / 'run'}",
                   "trainer.steps=20")  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["node_sparsity"] is not None
    assert json.loads((tmp_path / "run/evaluation-validation.json").read_text())["num_examples"]


def test_changed_prompts_are_not_taken_for_the_runs_own(tmp_path, capsys, monkeypatch):
    run_dir, data = tmp_path / "run", write_jsonl(tmp_path / "sums.jsonl", GOOD)
    own = ("task=custom", f"task.path={data}")
    prune = ("prune", *own, "num_edges=60", "trainer.steps=2", f"run_dir={run_dir}")
    assert call(capsys, monkeypatch, *prune)[0] == 0
    assert call(capsys, monkeypatch, "evaluate", run_dir)[0] == 0
    names = ("evaluation-test.json", "edges.json", "circuit.json")
    before = [(run_dir / name).read_text() for name in names]
    original = data.read_text()
    write_jsonl(data, GOOD, {**GOOD, "clean": "2 + 3 = <predict>5</predict>"})
    for command in (("evaluate", run_dir), ("export", run_dir, "cleanup=0.01")):
        code, _, err = call(capsys, monkeypatch, *command)
        assert code == 2
        assert f"{data} has changed since the run in {run_dir} began" in err
        assert f"edgeprune evaluate {run_dir} task=custom task.path={data}" in err
    code, _, err = call(capsys, monkeypatch, "evaluate", run_dir, *own)  # as the message says
    assert code == 0, err
    (written,) = run_dir.glob("evaluation-sums-*-test.json")
    assert json.loads(written.read_text())["num_examples"] == 2
    assert [(run_dir / name).read_text() for name in names] == before
    data.unlink()
    code, _, err = call(capsys, monkeypatch, "evaluate", run_dir)
    assert (code, f"{data} is gone, which had the prompts of the run" in err) == (2, True)
    data.write_text(original)
    assert call(capsys, monkeypatch, "export", run_dir, "cleanup=0.01")[0] == 0
    assert call(capsys, monkeypatch, "evaluate", run_dir)[0] == 0


def test_prompts_that_are_not_held_out_are_said(tmp_path, capsys, monkeypatch):
    """A file without splits is measured on its training prompts."""
    run_dir, data = tmp_path / "run", write_jsonl(tmp_path / "sums.jsonl", GOOD)
    prune = ("prune", "task=custom", f"task.path={data}", "num_edges=60", "trainer.steps=2")
    for command, split in (
        ((*prune, f"run_dir={run_dir}"), "validation"), (("evaluate", run_dir), "test"),
    ):  # fmt: skip
        code, out, err = call(capsys, monkeypatch, *command)
        assert code == 0, err
        assert err.count("those measured are training prompts, not held out") == 1
        assert "sums.jsonl [without splits]" in out
        assert json.loads((run_dir / f"evaluation-{split}.json").read_text())["training_prompts"]
    other = write_jsonl(tmp_path / "other.jsonl", {**GOOD, "clean": "2 + 2 = <predict>4</predict>"})
    code, _, err = call(
        capsys, monkeypatch, "evaluate", run_dir, "task=custom", f"task.path={other}"
    )
    assert (code, "training prompts" in err) == (0, False)
    assert call(capsys, monkeypatch, "report", tmp_path)[0] == 0
    page = (tmp_path / "report/report.html").read_text()
    assert "test prompts, training prompts among them" in page

    lines = [GOOD | {"split": split} for split in ("train", "validation")]
    data = write_jsonl(tmp_path / "split.jsonl", *lines)
    code, _, err = call(
        capsys, monkeypatch, "prune", "task=custom", f"task.path={data}", "num_edges=60",
        "trainer.steps=2", f"run_dir={tmp_path / 'held'}",
    )  # fmt: skip
    assert (code, "training prompts, not" in err) == (0, False)
    evaluation = json.loads((tmp_path / "held/evaluation-validation.json").read_text())
    assert evaluation["training_prompts"] is False


def test_how_many_prompts_have_distractors_is_said(finished, tmp_path):
    sums = [{"clean": f"{a} + 2 = <predict>{a + 2}</predict>", "corrupted":
             f"{a} + 3 = <predict>{a + 3}</predict>"} for a in range(1, 6)]  # fmt: skip
    for record in sums[:2]:
        record["distractor"] = "9"
    data = write_jsonl(tmp_path / "sums.jsonl", *sums)
    output = tmp_path / "evaluation.json"
    evaluate = ("evaluate", finished, "task=custom", f"output={output}")
    done = run_cli(*evaluate, f"task.path={data}")
    assert "5 prompts" in done.stdout
    assert "two way accuracy (2 prompts)" in done.stdout
    assert "exact match (" not in done.stdout
    assert json.loads(output.read_text())["num_with_distractors"] == 2
    done = run_cli(*evaluate, f"task.path={write_jsonl(tmp_path / 'all.jsonl', *sums[:2])}")
    assert "two way accuracy  " in done.stdout


def test_prepare_is_seeded_and_of_the_sizes_asked_for(tmp_path):
    texts = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        done = run_cli("prepare", "task=induction", "task.train=7", "task.test=3",
                       "task.validation=2", f"output={path}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    splits = [json.loads(line)["split"] for line in texts[0].splitlines()]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [7, 2, 3]


def test_multirun_and_wandb_without_a_key(tmp_path):
    done = run_cli(
        "prune", *SMALL, "seed=0,1", "--multirun", "trainer.steps=20", "tracker=wandb",
        f"run_dir={tmp_path}/seed-${{seed}}",
        WANDB_API_KEY="", HOME=str(tmp_path), WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert (tmp_path / f"seed-{seed}" / "edges.json").exists()
        assert list((tmp_path / f"seed-{seed}" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["ablation=zero,mean", "run_dir=run"], "another run of this sweep goes to run, too"),
        (["num_edges=null", "sparsity=0.9,2"], "sparsity=2.0 is out of range"),
        (["task.train=4,-1"], "task.train=-1 must be 0 or more"),
    ],
)
def test_a_sweep_of_which_a_run_is_refused_runs_none(
    settings, wanted, tmp_path, capsys, monkeypatch
):
    from edgeprune.commands import prune

    got = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "prune", got.append)
    code, _, err = call(capsys, monkeypatch, "prune", *SMALL, *settings, "--multirun")
    assert (code, got) == (2, [])
    assert wanted in err


@pytest.mark.parametrize(
    "argument", ["sparsity=0.9,", "trainer.steps=(3", "run_dir=x-${seed", "seed=1,,2"]
)
def test_an_argument_that_cannot_be_read_is_named(argument, capsys, monkeypatch):
    for more in ([], ["--multirun"]):
        code, _, err = call(capsys, monkeypatch, "prune", argument, *more)
        assert code == 2
        assert err.startswith(f"edgeprune: '{argument}' cannot be read: values of a sweep")
        assert "expecting" not in err


def test_a_signal_stops_a_whole_sweep_and_an_error_does_not(tmp_path, capsys, monkeypatch):
    from edgeprune.commands import prune
    from edgeprune.runs.run import Interrupted

    begun = []

    def fake(config):
        begun.append((config.sparsity, config.seed, config.run_dir))
        if config.seed == 1:
            raise ValueError("seed 1 is no good")
        if config.sparsity == 0.95:
            raise Interrupted(signal.SIGTERM, 3, tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "prune", fake)
    sweep = ("prune", "--multirun", "sparsity=0.9,0.95,0.98", "seed=0,1,2")
    code, _, err = call(capsys, monkeypatch, *sweep)
    assert code == 128 + signal.SIGTERM
    assert [run[:2] for run in begun] == [(0.9, 0), (0.9, 1), (0.9, 2), (0.95, 0)]
    assert len({run_dir for *_, run_dir in begun}) == 4
    messages = [line for line in err.splitlines() if line.startswith("edgeprune: ")]
    assert len(messages) == 2
    assert "seed 1 is no good" in messages[0]
    assert "stopped by SIGTERM after step 3" in messages[1]


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("run_dir=pp/a=b", "pp/a=b"),
        ("run_dir=é/東 (1), 98 % [x]: {y}", "é/東 (1), 98 % [x]: {y}"),
        ("run_dir=it's \\", "it's \\"),
        ("run_dir=a\\b's\\'", "a\\b's\\'"),
        ("run_dir='quoted, too'", "quoted, too"),
        ('run_dir="it\'s, too"', "it's, too"),
        ("run_dir=~/x", os.path.expanduser("~/x")),
        ("run_dir=~other", "~other"),
        ("run_dir=s-${seed}", "s-0"),
        ("run_dir=007", "007"),
        ("task.path=/data/my (1).jsonl", "/data/my (1).jsonl"),
        ("task.path=null", None),
    ],
)
def test_text_is_text(argument, wanted, capsys, monkeypatch):
    from edgeprune.commands import prune

    got = []
    monkeypatch.setattr(prune, "prune", got.append)
    code, _, err = call(capsys, monkeypatch, "prune", "experiment=ioi", argument)
    assert code == 0, err
    (config,) = got
    assert (config.task.path if argument.startswith("task") else config.run_dir) == wanted


def test_the_default_run_directory_says_any_where_no_size_is_asked_for(capsys, monkeypatch):
    from edgeprune.commands import prune

    got = []
    monkeypatch.setattr(prune, "prune", got.append)
    for size in ("sparsity=0.9", "num_edges=40"):
        assert call(capsys, monkeypatch, "prune", size)[0] == 0
    own = ("task.path=a,b/sums.jsonl", "model.path=org/model")
    assert call(capsys, monkeypatch, "prune", *own, "sparsity=0.9")[0] == 0
    assert call(capsys, monkeypatch, "prune", "experiment=smollm2/ioi", own[1])[0] == 0
    assert [config.run_dir for config in got] == [
        "runs/ioi-embedded/sparsity-0.9-edges-any-seed-0",
        "runs/ioi-embedded/sparsity-any-edges-40-seed-0",
        "runs/sums-model/sparsity-0.9-edges-any-seed-0",
        "runs/ioi-smollm2/sparsity-0.95-edges-any-seed-0",
    ]
    assert (got[2].task.name, got[2].model.name) == ("custom", "custom")
    assert got[3].model.path == "org/model"


def test_in_a_sweep_commas_part_values(tmp_path, capsys, monkeypatch):
    from edgeprune.commands import prune

    got = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "prune", got.append)
    arguments = ("model=custom", "model.path=a/b", "run_dir=~/x,y/z", "--multirun")
    code, _, err = call(capsys, monkeypatch, "prune", "experiment=ioi", *arguments)
    assert code == 0, err
    home = os.path.expanduser("~/x")
    assert [(c.model.path, c.run_dir) for c in got] == [("a/b", home), ("a/b", "y/z")]


def test_a_list_of_one_needs_no_brackets(tmp_path, capsys, monkeypatch):
    from edgeprune.commands import draw

    got = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "draw", got.append)
    (tmp_path / "a=b").mkdir()
    assert call(capsys, monkeypatch, "draw", "a=b", "formats=png", "title=IOI, 98 % (x)")[0] == 0
    assert call(capsys, monkeypatch, "draw", "a=b", "formats=png,svg")[0] == 0
    assert call(capsys, monkeypatch, "draw", "a=b", "formats=[dot]")[0] == 0
    assert [config.formats for config in got] == [["png"], ["png", "svg"], ["dot"]]
    assert {config.circuit for config in got} == {"a=b"}
    assert got[0].title == "IOI, 98 % (x)"
    code, _, err = call(capsys, monkeypatch, "draw", "a=b", "checkpoint=x")
    assert code == 2
    assert "'a'" not in err


def test_a_current_directory_that_is_gone_is_said(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, _, err = call(capsys, monkeypatch, "draw", "x")
    assert (code, "the current directory is gone; change to one that is there" in err) == (1, True)


@pytest.mark.parametrize("columns", ["0", ""])
def test_a_width_of_0_is_none(columns, finished, tmp_path):
    done = run_cli("draw", finished, f"output={tmp_path / 'x'}", "formats=dot", COLUMNS=columns)
    assert "drew " in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["report", "RUN"]])
def test_an_output_that_is_full_is_said_in_a_line(arguments, copied):
    arguments = [str(copied) if argument == "RUN" else argument for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgeprune", *arguments], stdout=full,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    message = "edgeprune: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_setting(command):
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert f"usage: edgeprune {command}" in done.stdout
    for name in setting_kinds(command):
        line = rf"^  {re.escape(name)}=.*\n +\w"  # with its default; and a text below
        assert re.search(line, done.stdout, re.MULTILINE), name


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "edgeprune", "prune", "--help"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "trainer.sparsity_warmup_steps=null" in done.stdout
    assert "torch" not in done.stderr
    assert run_cli().returncode == 2


def test_help_may_be_cut_short():
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has enough
    command = [sys.executable, "-m", "edgeprune", "prune", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, number):
    run_dir = tmp_path / "run"
    arguments = ("prune", *SMALL, f"run_dir={run_dir}", "resume=auto")
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *arguments], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints/step-00000005").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    message = process.communicate(timeout=120)[1]
    assert not (run_dir / LAST).exists(), "it was over before it was stopped"
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name} after step" in message
        assert "Traceback" not in message

    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert masks(run_dir) == masks(finished)
    for name in ("metrics.jsonl", "edges.json"):
        assert (run_dir / name).read_text() == (finished / name).read_text()


def test_a_hangup_is_not_heard_under_nohup():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_full_disk_loses_nothing(copied, finished):
    for step in range(10, 41, 5):
        shutil.rmtree(copied / f"checkpoints/step-{step:08d}")
    before = {p: p.read_bytes() for p in (copied / "checkpoints").rglob("*") if p.is_file()}
    arguments = ["prune", *SMALL, f"run_dir={copied}", "resume=auto"]
    limit = 30_000  # the gates of 5,524 edges fit, the optimiser's two moments do not
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", *arguments],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert_refused(done, 1, "cannot save the checkpoint of step 10", "resume=auto")
    after = {p: p.read_bytes() for p in (copied / "checkpoints").rglob("*") if p.is_file()}
    assert after == before
    assert run_cli(*arguments).returncode == 0
    assert masks(copied) == masks(finished)


def test_a_truncated_checkpoint(copied, finished):
    path = copied / LAST / "masks.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(
        run_cli("export", copied, "checkpoint=40"), 1, "step-00000040 is damaged", "altered or cut"
    )
    done = run_cli("prune", *SMALL, f"run_dir={copied}", "resume=auto")  # from step 35
    assert done.returncode == 0, done.stderr
    assert "resuming from step 35" in done.stderr
    assert masks(copied) == masks(finished)


def test_a_run_directory_of_another_run(copied):
    again = ("prune", *SMALL, f"run_dir={copied}")
    assert_refused(run_cli(*again), 2, "already holds a run", "resume=auto", "overwrite=true")
    assert_refused(
        run_cli(*again, "resume=auto", "trainer.learning_rate=0.3"),
        2, "run of another config", "trainer.learning_rate: 2.0 there, 0.3 here",
    )  # fmt: skip
    with (copied / "data.jsonl").open("a") as file:
        file.write("\n")
    assert_refused(run_cli(*again, "resume=auto"), 2, "the data has changed")
    manifest = copied / "run.json"
    manifest.write_text(manifest.read_text()[:-100])
    assert_refused(run_cli(*again, "resume=auto"), 2, "cannot read", "run.json")


# ---------------------------------------------------------------------------------- bad input

GOOD = {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>"}


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([GOOD, "{not json"], ["data.jsonl, line 2: not JSON"]),
        ([GOOD, "", "[1]"], ["data.jsonl, line 3: got a list"]),
        ([GOOD, {**GOOD, "clean": "1 + 2 = 3"}], ["line 2", "exactly one <predict>...</predict>"]),
        ([{**GOOD, "clean": "1 + 2 =<predict></predict>"}], ["line 1", "nothing between"]),
        ([{**GOOD, "corrupted": "1 + 4 + 2 = <predict>5</predict>"}],
         ["none of the 1 examples can be used", "unequal lengths: 6 and 9"]),
        ([{**GOOD, "split": "dev"}], ["line 1", "unknown split 'dev'", "train, validation, test"]),
        ([{**GOOD, "split": "test"}], ["no line of split 'train'; it has test"]),
        ([], ["holds no lines"]),
    ],
)  # fmt: skip
def test_bad_data(tmp_path, lines, wanted, capsys, monkeypatch):
    """In this process, since only the message differs; the exit is that of a real command."""
    from edgeprune.__main__ import main

    monkeypatch.setattr(sys, "argv", sys.argv)
    data = write_jsonl(tmp_path / "data.jsonl", *lines)
    with pytest.raises(SystemExit) as stop:
        main(["prune", "task=custom", f"task.path={data}", "sparsity=0.9", f"run_dir={tmp_path}/r"])
    assert stop.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("edgeprune: ")
    for text in wanted:
        assert text in last


def test_examples_left_out_are_said_once(finished, tmp_path, capsys, monkeypatch):
    unequal = {**GOOD, "corrupted": "1 + 4 + 2 = <predict>5</predict>"}
    data = write_jsonl(tmp_path / "data.jsonl", GOOD, unequal)
    evaluate = ("evaluate", finished, "task=custom", f"task.path={data}")
    for _ in range(2):  # Python shows the same warning once
        code, _, err = call(capsys, monkeypatch, *evaluate, f"output={tmp_path / 'e.json'}")
        assert code == 0, err
        lines = [line for line in err.splitlines() if "left out 1 of 2 examples" in line]
        assert len(lines) == 1
        assert lines[0].startswith("data.jsonl [without splits]: left out")


def test_a_missing_data_file_and_an_unknown_model_type(tmp_path):
    prune = ("prune", "task=custom", "sparsity=0.9", f"run_dir={tmp_path / 'run'}")
    missing = tmp_path / "missing.jsonl"
    assert_refused(run_cli(*prune, f"task.path={missing}"), 1, f"no data file {missing}")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    assert_refused(
        run_cli(*prune, f"task.path={missing}", "model=custom", f"model.path={bert}"),
        1, "model type 'bert'", "is not supported; supported: gemma, gemma2, gemma3_text, gpt2",
    )  # fmt: skip
    # what failed before it began does not stand in the way
    data = write_jsonl(tmp_path / "missing.jsonl", GOOD)
    done = run_cli(*prune, f"task.path={data}", "trainer.steps=10")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["prun"], ["unknown command 'prun'; did you mean 'prune'"]),
        (["prune", "+sparcity=0.5"], ["unknown setting 'sparcity'", "'sparsity'"]),
        (["prune", "++trainer.stepz=3"], ["unknown setting 'trainer.stepz'", "'trainer.steps'"]),
        (["prune", "sparsity=0.5", "trainer.init_mean=inf"], ["init_mean=inf must be a finite"]),
        (["prune", "trainer.stepz=3"], ["unknown setting 'trainer.stepz'", "'trainer.steps'"]),
        (["prune", "steps=3"], ["unknown setting 'steps'; did you mean 'trainer.steps'"]),
        (["prune", "task=iio"], ["no task 'iio'; choose", "ioi"]),
        (
            ["prune", "model=gpt2-medium"],
            [
                "no model 'gpt2-medium'; choose codellama, ",
                "tracr; model=custom model.path=... takes",
            ],
        ),
        (["prune", "model=/a/b.c"], ["no model '/a/b.c'; choose codellama, "]),
        (["prune", "experiment=tracr/x"], ["no experiment 'tracr/x'; choose ", "tracr/reverse"]),
        (
            ["evaluate", "runs", "split=test", "model.dtype=bfloat16"],
            ["model.dtype=... sets a part of model, which is the run's own", "model=NAME"],
        ),
        (
            ["evaluate", "runs", "model=gpt2", "model.dtype=bfloat16", "ablation.kind=zero"],
            ["ablation.kind=... sets a part of ablation", "give ablation=NAME as well"],
        ),
        (["prune", "trainer.steps=few"], ["few", "Integer"]),
        (["prune", "experiment=ioi", "sparsity=1.5"], ["sparsity=1.5 is out of range"]),
        (["prune", "sparsity=0.95", "num_edges=5"], ["sparsity=0.95 and num_edges=5", "only one"]),
        (["prune"], ["nothing says how sparse", "sparsity="]),
        (["evaluate", "runs", "batch_size=0"], ["batch_size=0 must be at least 1"]),
        (["evaluate", "runs", "shuffled_circuits=-1"], ["shuffled_circuits=-1 must be 0 or more"]),
        (
            ["prune", "sparsity=0.9", "trainer.weight_decay=-1"],
            ["trainer.weight_decay=-1.0 must be 0 or more"],
        ),
        (
            ["prune", "experiment=ioi", "trainer.steps=5", "trainer.lr_warmup_steps=6"],
            ["trainer.lr_warmup_steps=6 must lie between 0 and trainer.steps=5"],
        ),
        (
            ["prune", "experiment=ioi", "trainer=paper", "trainer.steps=40"],
            ["and trainer.steps=40; with trainer.lr_warmup_steps=null it follows from the steps"],
        ),
        (
            ["prune", "experiment=ioi", "overwrite=true", "resume=auto"],
            ["overwrite=true throws away what resume=auto would go on from"],
        ),
        (
            ["prune", "experiment=ioi", "model.fused=true"],
            ["model.fused=true is for bfloat16, got model.dtype=float32"],
        ),
        (
            [
                "prune",
                "experiment=ioi",
                "model.fused=true",
                "model.dtype=bfloat16",
                "launcher.shard=true",
            ],
            ["launcher.shard=true and model.fused=true do not go together"],
        ),
        (["prune", "experiment=ioi", "task.train=0"], ["task.train=0: gates are learned on 1"]),
        (["prune", "experiment=ioi", "task.test=-1"], ["task.test=-1 must be 0 or more"]),
        (
            ["prune", "experiment=ioi", "task.max_length=0"],
            ["task.max_length=0 must be at least 1, or null"],
        ),
        (["prepare", "task.validation=-2"], ["task.validation=-2 must be 0 or more"]),
        (["evaluate", "x", "task=ioi", "task.train=-2"], ["task.train=-2 must be 0 or more"]),
        (["prune", "model=tracr", "task=tracr", "sparsity=0.5"], ["say which: model.name=reverse"]),
        (["prune", "experiment"], ["unexpected argument 'experiment'"]),
        (["prune", "--multrun"], ["unknown flag '--multrun'; did you mean '--multirun'?"]),
        (["export", "nowhere", "sparsity=0.9,0.95", "-m"], ["a sweep (--multirun) is of prune"]),
        (["prune", "-m", "--cfg=job"], ["Only one of --run, --multirun, --cfg"]),
        (["prune", "trainer=null"], ["trainer=null: choose default, fast, paper"]),
        (["evaluate", "nowhere", "model=null"], ["model=null: choose", "or leave it out"]),
        (["export"], ["give one path: edgeprune export PATH"]),
        (
            ["export", "nowhere", "num_edges=3", "threshold=true"],
            ["threshold=true finds the size itself; leave out sparsity= or num_edges="],
        ),
        (["export", "nowhere"], ["nowhere is no run directory"]),
        (["draw", "nowhere"], ["no such file or directory: nowhere"]),
        (["evaluate", "nowhere"], ["no such file or directory: nowhere"]),
    ],
)
def test_wrong_usage(arguments, wanted):
    assert_refused(run_cli(*arguments), 2, *wanted)


def test_a_file_of_ones_own_is_asked_for_and_needs_no_preparing(tmp_path, capsys, monkeypatch):
    def refused(*arguments) -> str:
        code, _, err = call(capsys, monkeypatch, *arguments)
        assert code == 2
        assert not list(tmp_path.iterdir())
        return err

    message = "task.path is missing: task=custom takes a file of your own; give task.path=FILE"
    assert message in refused("prune", "task=custom", "sparsity=0.9", f"run_dir={tmp_path / 'r'}")
    output = f"output={tmp_path / 'x.jsonl'}"
    assert message in refused("evaluate", "nowhere", "task=custom")
    for task in ("task=custom", "task=ioi"):
        err = refused("prepare", task, "task.path=my.jsonl", output)
        assert "prepare writes the prompts of one of the project's tasks, such as task=ioi" in err
        assert "needs no preparing: give prune task=custom task.path=my.jsonl" in err
    assert "give prune task=custom task.path=FILE" in refused("prepare", "task=custom", output)


def test_without_dot_everything_but_the_picture_works(copied, tmp_path):
    (tmp_path / "bin").mkdir()
    result = run_cli("draw", copied, PATH=str(tmp_path / "bin"))
    assert_refused(result, 1, "the program `dot` is not on this machine", "apt")
    assert run_cli("draw", copied, "formats=[dot]", PATH=str(tmp_path / "bin")).returncode == 0
    assert "digraph" in (copied / "circuit.dot").read_text()
    run_cli("export", copied, "num_edges=9", f"output={tmp_path / 'b.json'}")
    done = run_cli("compare", copied, tmp_path / "b.json", f"output={tmp_path / 'both'}",
                   PATH=str(tmp_path / "bin"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the program `dot` is not on this machine" in done.stderr
    assert "digraph" in (tmp_path / "both/comparison.dot").read_text()
    assert "comparison.dot" in (tmp_path / "both/.compare.json").read_text()


def test_edges_of_another_model_are_refused(copied):
    (copied / "edges.json").write_text('[["a9.h0", "resid_post"]]')
    assert_refused(run_cli("evaluate", copied), 1, "a9.h0", "edges.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(copied, tmp_path):
    copied.chmod(0o555)
    try:
        assert_refused(run_cli("export", copied), 1, "Permission denied")
    finally:
        copied.chmod(0o755)
