"""Whole commands, most of them in a fresh process, as people run them."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_refused, call, run_cli, write_jsonl
from safetensors.torch import load_file, save_file

from edgeprune.commands.help import setting_names
from edgeprune.config import COMMANDS, ReportConfig, from_dict
from edgeprune.errors import ConfigError, Interrupted
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.training import progress

SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8",
    "trainer.steps=40", "trainer.checkpoint_every=5",
    "trainer.batch_size=4", "num_edges=60",
)  # fmt: skip
"""A run of seconds."""

pytestmark = pytest.mark.usefixtures("without_pictures")

GOOD = {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>"}


@pytest.fixture(scope="session")
def printed(tmp_path_factory):
    """A finished run, and what was printed meanwhile."""
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    done = run_cli("prune", *SMALL, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir, done


@pytest.fixture(scope="session")
def finished(printed):
    """A finished run that no test changes."""
    return printed[0]


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command in this process; it has to succeed. Returns its output and errors."""

    def run(*arguments: object) -> tuple[str, str]:
        code, out, err = call(capsys, monkeypatch, *arguments)
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a command in this process that has to be refused. Returns its last message."""

    def run(*arguments: object, code: int = 2) -> str:
        got, _, err = call(capsys, monkeypatch, *arguments)
        assert got == code, err
        last = err.strip().splitlines()[-1]
        assert last.startswith("edgeprune: "), err
        assert "Traceback" not in err
        return last

    return run


@pytest.fixture
def composed(monkeypatch, command):
    """The settings with which `prune` would run."""
    from edgeprune.commands import prune

    def run(*arguments: object) -> list:
        got = []
        with monkeypatch.context() as patch:
            patch.setattr(prune, "prune", got.append)
            command("prune", *arguments)
        return got

    return run


# ------------------------------------------------------------------------------------------ heads


def test_heads_of_a_run_are_named_in_it_and_shown_by_other_commands(copied, command, tmp_path):
    done = run_cli("heads", copied, "prompts=8", "random_prompts=4", "length=10")
    assert done.returncode == 0, done.stderr
    assert "S-inhibition" in done.stdout
    found = json.loads((copied / "heads.json").read_text())
    assert found["model_sha256"] == json.loads((copied / "run.json").read_text())["model"]["sha256"]
    names = {(score["name"], score["prompts"]) for score in found["scores"]}
    assert {("induction", "random tokens"), ("induction", "ioi"), ("name mover", "ioi")} <= names
    lines = (copied / "heads.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 16 * len(found["scores"])
    assert (copied / "heads.png").read_bytes().startswith(b"\x89PNG")
    found["labels"] = {f"a{layer}.h{head}": ["induction"] for layer in range(4)
                       for head in range(16)}  # fmt: skip
    (copied / "heads.json").write_text(json.dumps(found))
    command("draw", copied, "formats=[dot]", "dangling=true")
    assert "induction" in (copied / "circuit.dot").read_text()
    other = shutil.copytree(copied, tmp_path / "other")
    command("compare", copied, other, f"output={tmp_path / 'comparison'}", "formats=[dot]")
    compared = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    kinds = compared["kinds_of_heads"]["induction"]
    assert kinds["model"] == 64 > kinds["all"] == kinds["circuits"]["other"] > 0
    (copied / "heads.json").write_text("{")
    assert "heads.json" in command("draw", copied, "formats=[dot]")[1]


def test_heads_need_no_run(command, refused, tmp_path):
    few = ("random_prompts=2", "length=5", "prompts=4", "task.test=4", "task.train=0")
    output = tmp_path / "heads"
    command("heads", "model=embedded", "task=greater_than", *few, f"output={output}")
    found = json.loads((output / "heads.json").read_text())
    assert {score["prompts"] for score in found["scores"]} == {"random tokens", "greater_than"}
    data = write_jsonl(tmp_path / "sums.jsonl", GOOD)  # without the names that the task marks
    command("heads", "model=embedded", "task=ioi", f"task.path={data}", *few, f"output={output}")
    assert "model=" in refused("heads", "task=ioi")


def test_ablating_a_run_s_heads_and_circuit(copied, command, refused, tmp_path):
    output = tmp_path / "ablation.json"
    few = ("prompts=8", "random_sets=3", f"output={output}")
    done = run_cli("ablate", copied, "heads=name_mover:3", "generate=2", *few)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert len(found["ablated"]["nodes"]) == len(found["low_scoring"]["nodes"]) == 3
    assert len(found["random"]) == 3
    assert {"kl", "accuracy", "answers"} < found["ablated"].keys()
    by_layer = [sorted(node.split(".")[0] for node in found[key]["nodes"])
                for key in ("ablated", "low_scoring")]  # fmt: skip
    assert by_layer[0] == by_layer[1]
    circuit, rest = [], []
    for nodes, complement in ((circuit, "false"), (rest, "true")):
        for kind in ("interchange", "mean"):
            command("ablate", copied, f"circuit={copied}", f"complement={complement}",
                    f"ablation={kind}", *few)  # fmt: skip
            found = json.loads(output.read_text())
            nodes[:] = found["ablated"]["nodes"]
        assert found["low_scoring"] is None
    assert len(circuit) + len(rest) == 4 * 17
    command("ablate", copied, "nodes=a0.h1,m2", *few)
    assert json.loads(output.read_text())["ablated"]["nodes"] == ["a0.h1", "m2"]
    assert "KIND:N" in refused("ablate", copied, "heads=induction")
    assert "nodes=" in refused("ablate", copied, "heads=a0.h1")
    known = tmp_path / "heads"
    command("heads", copied, "prompts=4", "random_prompts=2", "length=5", f"output={known}")
    scores = f"scores={known / 'heads.json'}"
    command("ablate", copied, "heads=first_token:2", scores, *few)
    taken = f"output={known / 'heads.json'}"
    assert taken in refused("ablate", copied, "heads=first_token:2", scores, taken)
    (known / "heads.json").write_text("{}")
    assert "heads.json" in refused("ablate", copied, "heads=first_token:2", scores, *few)
    assert "previous_token" in refused("ablate", copied, "heads=inductoin:3", *few)
    assert "a0.h16" in refused("ablate", copied, "nodes=[a0.h16]", *few)
    assert "nodes=" in refused("ablate", copied)
    assert "run directory" in refused("ablate", copied, "nodes=[m0]", f"output={copied / 'x.json'}")


# ---------------------------------------------------------------------------------------- results


def test_a_run_leaves_everything_needed(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "run.json", "data.jsonl", "metrics.jsonl", "checkpoints", "edges.json",
        "circuit.json", "scores.safetensors", "evaluation-validation.json", ".lock", "training.png",
        "curve.json", "curve.png", "page.html", "snapshots.safetensors",
    }  # fmt: skip
    for picture in ("training.png", "curve.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    edges = json.loads((finished / "edges.json").read_text())
    circuit = json.loads((finished / "circuit.json").read_text())
    assert len(edges) == 60
    assert circuit["edges"] == edges
    assert circuit["origin"]["model"]["sha256"]
    assert load_file(finished / "scores.safetensors")["scores"].shape == (5524,)
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [*range(1, 41)]
    assert {*steps[0]} == {"step", "kl", "num_edges", "learning_rate"}
    curve = json.loads((finished / "curve.json").read_text())
    sizes = [point["num_edges"] for point in curve["points"]]
    assert sizes == sorted(sizes) and sizes[0] < 60 < sizes[-1] == 5524
    assert (curve["num_examples"], curve["prompts"]) == (8, "validation")
    assert curve["points"][-1]["kl"] == 0 < curve["points"][0]["kl"]
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_prune_prints_little_where_there_is_no_terminal(printed):
    _, done = printed
    assert len(done.stderr.splitlines()) <= 16
    assert len(done.stdout.splitlines()) <= 30  # a table with a row per size, and a few sentences


def test_export_evaluate_and_draw(copied, tmp_path, command):
    command("export", copied, "num_edges=33", f"output={tmp_path / 'e.json'}")
    assert len(json.loads((tmp_path / "e.json").read_text())) == 33
    command("export", copied, "num_edges=33", f"output={tmp_path / 'e.pt'}")
    graph = torch.load(tmp_path / "e.pt", weights_only=True)
    assert graph["cfg"]["d_model"] == 128
    kept = graph["edges_scores"][graph["edges_in_graph"]]
    assert kept.min() >= graph["edges_scores"][~graph["edges_in_graph"]].max()
    as_asked = (copied / "edges.json").read_text()
    command("export", copied, "num_edges=40")
    assert json.loads((copied / "circuit.json").read_text())["num_edges"] == 40
    command("export", copied)
    assert (copied / "edges.json").read_text() == as_asked
    command("draw", copied, "num_edges=20", "formats=[dot]", f"output={tmp_path / 'small'}")
    assert "digraph" in (tmp_path / "small.dot").read_text()
    command("evaluate", copied, "head_permuted=1", "batch_size=3")
    result = json.loads((copied / "evaluation-test.json").read_text())
    assert result["num_examples"] == 8
    assert result["full"]["kl"] == 0
    assert result["empty"]["kl"] > result["circuit"]["kl"]
    assert result["head_permuted"]["kl"] > 0
    command("draw", copied)
    assert (copied / "circuit.pdf").read_bytes().startswith(b"%PDF")
    assert (copied / "circuit.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (copied / "circuit.svg").read_text()
    assert "digraph" in (copied / "circuit.dot").read_text()


def test_a_circuit_cut_from_an_exported_graph_equals_one_cut_from_the_run(
    copied, tmp_path, command, refused
):
    command("export", copied, "num_edges=110", f"output={tmp_path / 'whole.json'}")
    for format, name in (("eap_json", "g.json"), ("eap_pt", "g.pt")):
        command("export", copied, f"format={format}", f"output={tmp_path / name}")
        command("export", tmp_path / name, "num_edges=110", f"output={tmp_path / 'cut.json'}")
        assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()
    for given in ("cleanup=0", "checkpoint=0"):
        refused("export", tmp_path / name, "num_edges=9", given, f"output={tmp_path / 'no.json'}")
    assert not (tmp_path / "no.json").exists()
    command("compare", copied, tmp_path / "cut.json", "formats=[dot]", f"output={tmp_path / 'c'}")
    command("export", tmp_path / "c/union", f"output={tmp_path / 'union.json'}")
    both = [json.loads((copied / "edges.json").read_text())]
    both.append(json.loads((tmp_path / "cut.json").read_text()))
    union = json.loads((tmp_path / "union.json").read_text())
    assert set(map(tuple, union)) == {tuple(edge) for edges in both for edge in edges}
    marks = tmp_path / "marks.json"  # whose scores only tell the edges of the circuit from others
    command("export", tmp_path / "union.json", f"output={marks}", "format=eap_json",
            "model=embedded")  # fmt: skip
    _, err = command("export", marks, "num_edges=9", f"output={tmp_path / 'cut.json'}")
    assert f"{len(union)} edges have the same score" in err


def test_only_measurements_of_the_runs_own_circuit_prompts_and_model_go_into_the_run(
    copied, tmp_path, command, refused, monkeypatch
):
    command("evaluate", copied)
    own = (copied / "evaluation-test.json").read_text()
    before = set(copied.iterdir())
    sizes = ("task.train=2", "task.validation=2", "task.test=5")
    for other in (
        ("task=greater_than", *sizes),
        ("ablation=zero",),
        ("model=embedded", "model.dtype=bfloat16"),
    ):
        command("evaluate", copied, *other)
        assert (copied / "evaluation-test.json").read_text() == own
        output = tmp_path / "other.json"
        command("evaluate", copied, *other, f"output={output}")
        written = json.loads(output.read_text())
        assert written["edges_sha256"] == json.loads(own)["edges_sha256"]
        assert written["circuit"] != json.loads(own)["circuit"]
    command("mib", copied, *other)
    assert str(copied) in refused("test", copied, *other, "repeat=seeds:2")
    command("export", copied, "num_edges=9", "format=eap_json")
    before.add(copied / "graph.json")
    monkeypatch.chdir(tmp_path)
    command("tokens", copied / "graph.json", "prompts=2")
    assert (tmp_path / "tokens/tokens.json").exists()
    command("heads", copied, "task=greater_than", *sizes, "random_prompts=2", "length=5")
    assert (tmp_path / "heads/heads.json").exists()
    assert set(copied.iterdir()) == before


def test_a_bare_list_of_edges_needs_its_model_and_task(finished, tmp_path, command, refused):
    edges = shutil.copy(finished / "edges.json", tmp_path / "edges.json")
    assert "model=" in refused("evaluate", edges)
    assert "task=" in refused("evaluate", edges, "model=embedded")
    assert "model=" in refused("draw", edges, "formats=[dot]", code=1)
    sizes = ("task.train=3", "task.validation=3", "task.test=5")
    output = tmp_path / "e.json"
    command("evaluate", edges, "model=embedded", "task=ioi_t1", *sizes, "ablation=mean",
            f"output={output}")  # fmt: skip
    assert json.loads(output.read_text())["num_examples"] == 5
    command("draw", edges, "formats=[dot]", "model=embedded")
    assert "digraph" in (tmp_path / "circuit.dot").read_text()


def test_a_self_describing_circuit_needs_nothing_else(copied, tmp_path, command):
    command("evaluate", copied)
    circuit = tmp_path / "mine.json"
    command("export", copied, "format=circuit", f"output={circuit}")
    command("evaluate", circuit, f"output={tmp_path / 'e.json'}")
    own = json.loads((copied / "evaluation-test.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["circuit"] == own["circuit"]
    shutil.rmtree(copied)  # prompts that were generated are generated again
    command("evaluate", circuit, f"output={tmp_path / 'e.json'}")
    assert json.loads((tmp_path / "e.json").read_text())["circuit"] == own["circuit"]


def test_a_moved_run_is_evaluated_with_model_and_data_given(tmp_path, command, refused):
    there, here = tmp_path / "cluster", tmp_path / "laptop"
    shutil.copytree(EMBEDDED_MODEL, there / "model")
    write_jsonl(there / "sums.jsonl", GOOD)
    command("prune", f"task.path={there / 'sums.jsonl'}", f"model.path={there / 'model'}",
            "num_edges=60", "trainer.steps=2", f"run_dir={there / 'run'}")  # fmt: skip
    there.rename(here)
    assert str(there / "model") in refused("evaluate", here / "run", code=1)
    command("evaluate", here / "run", f"model.path={here / 'model'}",
            f"task.path={here / 'sums.jsonl'}")  # fmt: skip
    assert (here / "run/evaluation-test.json").exists()


def test_changed_prompts_are_not_the_runs_own(tmp_path, command, refused):
    run_dir, data = tmp_path / "run", write_jsonl(tmp_path / "sums.jsonl", GOOD)
    command("prune", f"task.path={data}", "num_edges=60", "trainer.steps=2", f"run_dir={run_dir}")
    command("evaluate", run_dir)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    original = data.read_text()
    write_jsonl(data, GOOD, {**GOOD, "clean": "2 + 3 = <predict>5</predict>"})
    for arguments in (("evaluate", run_dir), ("export", run_dir, "cleanup=0.01")):
        assert str(data) in refused(*arguments)
    output = tmp_path / "e.json"
    command("evaluate", run_dir, f"task.path={data}", f"output={output}")
    assert json.loads(output.read_text())["num_examples"] == 2
    data.unlink()
    assert str(data) in refused("evaluate", run_dir)
    assert {p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()} == before
    data.write_text(original)
    command("export", run_dir, "cleanup=0.01")


def test_prompts_that_are_not_held_out_are_marked(tmp_path, command):
    data = write_jsonl(tmp_path / "sums.jsonl", GOOD)
    prune = ("prune", "num_edges=60", "trainer.steps=2")
    command(*prune, f"task.path={data}", f"run_dir={tmp_path / 'run'}")
    _, err = command("evaluate", tmp_path / "run")
    assert "training prompts" in err
    for split in ("validation", "test"):
        evaluation = json.loads((tmp_path / f"run/evaluation-{split}.json").read_text())
        assert evaluation["training_prompts"] is True
    lines = [GOOD | {"split": split} for split in ("train", "validation")]
    data = write_jsonl(tmp_path / "split.jsonl", *lines)
    command(*prune, f"task.path={data}", f"run_dir={tmp_path / 'held'}")
    evaluation = json.loads((tmp_path / "held/evaluation-validation.json").read_text())
    assert evaluation["training_prompts"] is False
    data = write_jsonl(tmp_path / "train.jsonl", *[GOOD | {"split": s} for s in ("train", "test")])
    _, err = command(*prune, f"task.path={data}", f"run_dir={tmp_path / 'train'}")
    assert "'validation'" in err
    evaluation = json.loads((tmp_path / "train/evaluation-train.json").read_text())
    assert evaluation["training_prompts"] is True


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations_node_gates_and_own_data(tmp_path, ablation, command):
    """Arithmetic, without splits and distractors."""
    data = write_jsonl(
        tmp_path / "sums.jsonl",
        *(
            {"clean": f"{a} + {b} = <predict>{a + b}</predict>",
             "corrupted": f"{a} + {b + 1} = <predict>{a + b + 1}</predict>"}
            for a in range(1, 4) for b in range(1, 5)
        ),
    )  # fmt: skip
    command("prune", "num_edges=60", f"task.path={data}", f"ablation={ablation}",
            "trainer=paper", "trainer.node_gates=true", "trainer.steps=20",
            "trainer.lr_warmup_steps=2", "trainer.sparsity_warmup_steps=10",
            f"run_dir={tmp_path / 'run'}")  # fmt: skip
    line = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["node_sparsity"] is not None
    assert json.loads((tmp_path / "run/evaluation-validation.json").read_text())["num_examples"]
    as_asked = (tmp_path / "run/edges.json").read_text()
    assert len(json.loads(as_asked)) == 60
    command("export", tmp_path / "run", "threshold=true")
    circuit = json.loads((tmp_path / "run/circuit.json").read_text())
    assert circuit["origin"]["chosen_by"] == "threshold"
    assert 0 < circuit["origin"]["edge_threshold"] < 1
    command("export", tmp_path / "run", "min_exact_match=0.5")
    command("export", tmp_path / "run")
    assert (tmp_path / "run/edges.json").read_text() == as_asked


def test_edges_of_another_model_are_refused(copied, refused):
    (copied / "circuit.json").unlink()
    (copied / "edges.json").write_text('[["a9.h0", "resid_post"]]')
    assert "a9.h0" in refused("evaluate", copied, code=1)


def test_prepare_is_seeded_and_of_the_sizes_asked_for(tmp_path, command):
    texts = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        command("prepare", "task=induction", "task.train=7", "task.test=3", "task.validation=2",
                f"output={path}")  # fmt: skip
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    splits = [json.loads(line)["split"] for line in texts[0].splitlines()]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [7, 2, 3]


# ----------------------------------------------------------------------------- choosing a circuit


def choice_of(run_dir) -> tuple[int, str]:
    """Number of edges, and how they were chosen."""
    circuit = json.loads((run_dir / "circuit.json").read_text())
    assert circuit["edges"] == json.loads((run_dir / "edges.json").read_text())
    return circuit["num_edges"], circuit["origin"]["chosen_by"]


@pytest.mark.parametrize("given", ["max_kl=4.0", "min_exact_match=0.5", None])
def test_a_circuit_is_chosen_by_how_good_it_is(finished, copied, tmp_path, given, command):
    """As the run asks, or later from the scores of another: the same circuit, to 10 % of its size
    where the sizes measured before differ."""
    run_dir = tmp_path / "chosen"
    more = ["num_edges=null", *([given] if given else [])]
    command("prune", *SMALL, *more, f"run_dir={run_dir}")
    size, chosen_by = choice_of(run_dir)
    assert 0 < size < 5524
    evaluation = json.loads((run_dir / "evaluation-validation.json").read_text())
    if given is None:  # a share of the empty circuit's KL
        metric, sign, limit = "kl", 1, 0.05 * evaluation["empty"]["kl"]
    else:
        assert chosen_by == given
        name, limit = given.split("=")
        metric, sign = {"max_kl": ("kl", 1), "min_exact_match": ("exact_match", -1)}[name]
    assert sign * evaluation["circuit"][metric] <= sign * float(limit)
    points = json.loads((run_dir / "curve.json").read_text())["points"]
    good = {point["num_edges"]: sign * point[metric] <= sign * float(limit) for point in points}
    assert good[size] and all(good[larger] for larger in good if larger > size)
    assert not good[max(smaller for smaller in good if smaller < size)]
    before = (run_dir / "edges.json").read_text()
    command("export", run_dir)  # as it asked for
    assert (run_dir / "edges.json").read_text() == before
    if given is None:
        return
    command("export", copied, given)
    found, chosen_by = choice_of(copied)
    assert size / 1.1 <= found <= 1.1 * size and chosen_by == given
    (copied / "curve.json").unlink()  # it is measured again
    command("export", copied, given, "checkpoint=40")
    assert choice_of(copied) == (size, given)
    assert (copied / "edges.json").read_text() == before
    command("export", copied)
    assert (copied / "edges.json").read_text() == (finished / "edges.json").read_text()


def test_a_circuit_that_nothing_but_all_edges_can_be(copied, command):
    _, err = command("export", copied, "max_kl=1e-9")
    assert choice_of(copied) == (5524, "max_kl=1e-09")
    assert "max_kl" in err


@pytest.mark.parametrize(("given", "size"), [("sparsity=0.75", 1381), ("num_edges=0", 0)])
def test_a_size_that_is_asked_for_is_kept_exactly(copied, tmp_path, given, size, command):
    few = (*SMALL, "num_edges=null", "trainer.steps=2")
    command("prune", *few, given, f"run_dir={tmp_path / 'chosen'}")
    assert choice_of(tmp_path / "chosen")[0] == size
    _, err = command("export", copied, given)
    assert choice_of(copied)[0] == size
    assert ("a path from the input" in err) == (size == 0)


def test_a_threshold_needs_gates(finished, tmp_path, refused):
    output = tmp_path / "e.json"
    message = refused("export", finished, "threshold=true", f"output={output}")
    assert "threshold=true" in message and "num_edges=" in message
    assert not output.exists()


def test_a_model_that_outputs_values_has_no_kl(tmp_path, command, refused, monkeypatch):
    monkeypatch.undo()  # its curve is drawn
    run_dir = tmp_path / "run"
    prune = ("prune", "experiment=tracr/neighbours", "trainer.steps=10", f"run_dir={run_dir}")
    assert "max_kl=0.1" in refused(*prune, "max_kl=0.1")
    assert not run_dir.exists()
    command(*prune, "trainer=every_size", "cleanup=null")
    evaluation = json.loads((run_dir / "evaluation-validation.json").read_text())
    assert evaluation["circuit"]["error"] <= 0.05 * evaluation["empty"]["error"]
    curve = json.loads((run_dir / "curve.json").read_text())
    assert (curve["points"][-1]["kl"], curve["points"][-1]["error"]) == (None, 0)
    assert (run_dir / "curve.png").exists()
    assert "max_kl=0.1" in refused("export", run_dir, "max_kl=0.1")


@pytest.mark.parametrize("given", [(), ("max_kl=0.1",), ("min_exact_match=0.9",)])
def test_the_published_method_needs_a_target_before_it_trains(tmp_path, given, refused):
    run_dir = tmp_path / "run"
    prune = ("prune", "trainer=paper", "trainer.batch_size=4", *given, f"run_dir={run_dir}")
    assert "trainer.target_sparsity=" in refused(*prune)
    assert not run_dir.exists()


def test_the_published_method_with_a_target_has_a_threshold(tmp_path, command):
    command("prune", "experiment=ioi", "trainer=paper", "trainer.steps=4", "task.train=8",
            "trainer.lr_warmup_steps=1", "trainer.sparsity_warmup_steps=2", "task.validation=4",
            "trainer.target_sparsity=0.5", "trainer.batch_size=4",
            f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert choice_of(tmp_path / "run")[1] == "threshold"


def test_an_objective_that_does_not_apply_is_refused_before_training(tmp_path, refused):
    data, run_dir = write_jsonl(tmp_path / "sums.jsonl", GOOD), tmp_path / "run"
    own = ("prune", f"task.path={data}", f"run_dir={run_dir}")
    assert "logit_difference" in refused(*own, "trainer.objective=logit_difference")
    program = ("prune", "experiment=tracr/neighbours", f"run_dir={run_dir}")
    assert "cross_entropy" in refused(*program, "trainer.objective=cross_entropy")
    assert not run_dir.exists()


# ----------------------------------------------------------------------------------------- output


def test_results_are_written_though_nobody_reads(copied):
    """As in `edgeprune evaluate RUN | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "edgeprune", "evaluate", copied]
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert json.loads((copied / "evaluation-test.json").read_text())["num_examples"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["report", "RUNS"]])
def test_a_full_output_is_one_error(arguments, copied):
    arguments = [str(copied.parent) if argument == "RUNS" else argument for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgeprune", *arguments], stdout=full,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgeprune: ")
    assert os.strerror(errno.ENOSPC) in last


def test_characters_that_the_terminal_lacks_are_escaped(finished, tmp_path):
    pair = {key: text.replace("=", "😀 =") for key, text in GOOD.items()}
    data = write_jsonl(tmp_path / "sums.jsonl", pair)
    done = run_cli("evaluate", finished, f"task.path={data}", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "\\U0001f600" in done.stdout


def test_text_of_prompts_is_never_markup(tmp_path, command):
    """Neither rich's nor a terminal's."""
    text = "[bold red]1[/bold red] + \x1b[31m 2 [link=x] \\[ ="
    pair = {"clean": f"{text} <predict>3</predict>",
            "corrupted": f"{text.replace('2', '3')} <predict>4</predict>"}  # fmt: skip
    other = {**pair, "corrupted": f"{text} 5 6 7 8 9 <predict>4</predict>"}  # left out
    data = write_jsonl(tmp_path / "[red]data[-].jsonl", pair, pair, other)
    run_dir = tmp_path / "run"
    out, err = command("prune", f"task.path='{data}'", "trainer.steps=4", "num_edges=60",
                       f"run_dir={run_dir}")  # fmt: skip
    assert "skipped 1 of 3" in err
    assert "[red]data[-].jsonl, line 3" in err
    shown = command("evaluate", run_dir)
    assert "[red]data[-].jsonl [without splits]" in shown[0]
    assert "[bold red]1[/bold red] + \\x1b[31m 2 [link=x]" in shown[0]
    assert "\x1b" not in "".join((out, err, *shown))


def test_without_dot_everything_but_the_picture_works(
    copied, tmp_path, command, refused, monkeypatch
):
    command("export", copied, "num_edges=9", f"output={tmp_path / 'b.json'}")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "dot" in refused("draw", copied, code=1)
    assert "digraph" in (copied / "circuit.dot").read_text()
    command("compare", copied, tmp_path / "b.json", f"output={tmp_path / 'both'}")
    assert "digraph" in (tmp_path / "both/comparison.dot").read_text()


# ------------------------------------------------------------------------------- help, arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_setting(command, capsys, monkeypatch):
    trainers = ("every_size", "paper", "tracr") if command == "prune" else ("every_size",)
    described = set()
    for trainer in trainers:
        code, out, _ = call(capsys, monkeypatch, command, f"trainer={trainer}", "--help")
        assert code == 0
        described |= set(re.findall(r"^  ([\w.]+)=.*\n +\w", out, re.MULTILINE))
    groups = {name for name in setting_names(command) if f"{name}." in str(setting_names(command))}
    assert setting_names(command) - groups - described <= {"trainer.method", "experiment"}


def test_help_of_a_trainer_shows_its_values(capsys, monkeypatch):
    _, out, _ = call(capsys, monkeypatch, "prune", "trainer=paper", "--help")
    assert "trainer.steps=3000" in out
    assert "trainer.edge_price" not in out


def test_help_imports_nothing_heavy_and_may_be_cut_short():
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has enough
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "edgeprune", "prune", "--help"],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 0
    assert not re.search(r"\| +(torch|transformers|hydra)$", done.stderr, re.MULTILINE)
    assert run_cli().returncode == 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["prun"], ["'prun'", "'prune'"]),
        (["prune", "+sparcity=0.5"], ["'sparcity'", "'sparsity'"]),
        (["prune", "trainer.stepz=3"], ["'trainer.stepz'", "'trainer.steps'"]),
        (["prune", "steps=3"], ["'steps'", "'trainer.steps'"]),
        (["prune", "experiment"], ["'experiment'"]),
        (["prune", "task=iio"], ["'iio'", "ioi"]),
        (["prune", "model=gpt2-medium"], ["'gpt2-medium'", "model=custom model.path="]),
        (["prune", "experiment=tracr/x"], ["'tracr/x'", "tracr/reverse"]),
        (["prune", "trainer.steps=few"], ["few", "Integer"]),
        (["prune", "sparsity=0.9,"], ["sparsity=0.9,"]),
        (["prune", "trainer=paper", "trainer.init_mean=inf"], ["trainer.init_mean=inf"]),
        (["prune", "experiment=ioi", "sparsity=1.5"], ["sparsity=1.5"]),
        (["prune", "sparsity=0.95", "num_edges=5"], ["sparsity=0.95", "num_edges=5"]),
        (["prune", "max_kl=0.5", "min_exact_match=0.9"], ["max_kl=0.5", "min_exact_match=0.9"]),
        (["prune", "sparsity=0.95", "max_kl=0.5"], ["sparsity=0.95", "max_kl=0.5"]),
        (["prune", "max_kl=0"], ["max_kl=0"]),
        (["prune", "min_exact_match=95"], ["min_exact_match=95"]),
        (["prune", "trainer=fast"], ["fast", "every_size"]),
        (["prune", "trainer.objective=loss"], ["trainer.objective=loss", "cross_entropy"]),
        (["prune", "trainer.temperature=0"], ["trainer.temperature=0"]),
        (["prune", "trainer.smallest=2"], ["trainer.smallest=2"]),
        (["prune", "trainer=paper", "trainer.weight_decay=-1"], ["trainer.weight_decay=-1"]),
        (["prune", "experiment=ioi", "trainer=paper", "trainer.steps=40"],
         ["trainer.lr_warmup_steps=200", "trainer.steps=40"]),
        (["prune", "experiment=ioi", "overwrite=true", "resume=auto"],
         ["overwrite=true", "resume=auto"]),
        (["prune", "experiment=ioi", "model.fused=true"], ["model.fused=true", "float32"]),
        (["prune", "experiment=ioi", "trainer.method=lagrangian"], ["trainer.method=lagrangian"]),
        (["prune", "trainer=paper", "trainer.warmup=logarithmic",
          "trainer.target_node_sparsity=1.5"], ["1.5"]),
        (["prune", "experiment=ioi", "launcher.shard=true", "cleanup=0.1"],
         ["launcher.shard=true", "cleanup="]),
        (["attribute", "experiment=ioi", "launcher.shard=true", "cleanup=0"],
         ["launcher.shard=true", "cleanup="]),
        (["prune", "experiment=ioi", "task.train=0"], ["task.train=0"]),
        (["prune", "experiment=ioi", "run_dir="], ["run_dir"]),
        (["prune", "task=custom", "sparsity=0.9"], ["task.path"]),
        (["prune", "model=tracr", "task=tracr", "sparsity=0.5"], ["model.name=reverse"]),
        (["prepare", "task.validation=-2"], ["task.validation=-2"]),
        (["prune", "num_edges", "=", "3"], ["spaces"]),
        (["prune", "trainer=paper", "sparsity=0.9", "start=x"], ["start=", "trainer=every_size"]),
        (["prune", "--verbose"], ["--verbose"]),
        (["report", "runs", "--trainer.steps=3"], ["--trainer.steps=3"]),
        (["prune", "--cfg", "jobs"], ["'jobs'"]),
        (["prune", "--config-name"], ["--config-name"]),
        (["prune", "--config-dir", "nowhere", "--cfg", "job"], ["nowhere"]),
        (["prune", "--cfg", "job", "--multirun"], ["--multirun"]),
        (["prune", "run_dir=r/a=${seed}", "seed=0,1", "-m"], ["'='", '\'run_dir="r/a=${seed}"\'']),
        (["prune", "run_dir=$x#1"], ["'run_dir=\"$x#1\"'"]),
        (["evaluate", "runs", "batch_size=0"], ["batch_size=0"]),
        (["evaluate", "runs", "head_permuted=-1"], ["head_permuted=-1"]),
        (["export"], ["edgeprune export PATH"]),
        (["export", "x", "num_edges=3", "threshold=true"], ["threshold=true", "num_edges"]),
        (["export", "x", "max_kl=3", "threshold=true"], ["threshold=true", "max_kl"]),
        (["export", "x", "max_kl=3", "min_exact_match=0.5"], ["max_kl=3", "min_exact_match=0.5"]),
        (["export", "x", "sparsity=0.9,0.95", "-m"], ["--multirun"]),
        (["export", "nowhere"], ["nowhere"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["compare", "nowhere"], ["nowhere"]),
        (["test", "x", "launcher.processes=2"], ["launcher.processes=2", "repeat="]),
        (["report", "nowhere"], ["nowhere"]),
    ],
)  # fmt: skip
def test_wrong_usage(arguments, wanted, refused):
    message = refused(*arguments)
    for text in wanted:
        assert text in message


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([GOOD, "{not json"], "line 2"),
        ([GOOD, "", "[1]"], "line 3"),
        ([GOOD, {**GOOD, "clean": "1 + 2 = 3"}], "<predict>"),
        ([{**GOOD, "corrupted": "1 + 4 + 2 = <predict>5</predict>"}], "6 and 9"),
        ([{**GOOD, "split": "dev"}], "'dev'"),
        ([{**GOOD, "split": "test"}], "'train'"),
        ([], "data.jsonl"),
    ],
)
def test_bad_data(tmp_path, lines, wanted, refused):
    data = write_jsonl(tmp_path / "data.jsonl", *lines)
    prune = ("prune", f"task.path={data}", "sparsity=0.9", f"run_dir={tmp_path / 'r'}")
    assert wanted in refused(*prune, code=1)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("spaced", "joined"),
    [
        (["--cfg", "job"], ["--cfg=job"]),
        (["-c", "job"], ["--cfg=job"]),
        (["--cfg", "job", "--package", "trainer"], ["-c=job", "-p=trainer"]),
        (["--info", "defaults"], ["--info=defaults"]),
        (["-i", "searchpath"], ["--info=searchpath"]),
        (["--config-name", "own", "--config-dir", "DIR", "--cfg", "job", "--resolve"],
         ["-cn=own", "-cd=DIR", "-c=job", "--resolve"]),
    ],
)  # fmt: skip
def test_flags_of_hydra_take_their_value_after_a_space(spaced, joined, tmp_path):
    own = "defaults: [prune, _self_]\nrun_dir: of-${seed}\nseed: 5\n"
    (tmp_path / "own.yaml").write_text(own)
    shown = []
    for arguments in ([*spaced, "num_edges=77"], ["num_edges=77", *joined]):
        done = run_cli("prune", *(a.replace("DIR", str(tmp_path)) for a in arguments))
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert shown[0] == shown[1]
    contents = {
        "trainer": "# @package trainer", "own": "run_dir: of-5", "defaults": "prune_schema",
        "searchpath": "structured://",
    }  # fmt: skip
    for flag, content in contents.items():
        assert flag not in spaced or content in shown[0]


def test_what_hydra_shows_needs_no_path(command):
    assert "num_edges: null" in command("export", "--cfg", "job")[0]
    assert "hydra" in command("evaluate", "--hydra-help")[0].lower()
    assert "complete" in command("prune", "-sc", "install=bash")[0]


def test_a_quoted_value_may_contain_what_the_grammar_uses(composed):
    configs = composed('run_dir="r/a=${seed}, (b)"', "seed=0,1", "--multirun")
    assert [config.run_dir for config in configs] == ["r/a=0, (b)", "r/a=1, (b)"]


def test_paths_may_have_any_name(tmp_path, monkeypatch, command, finished):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b", "circuit", "it's \\ here", "é 東 (1), 98 % [x]: {y}"):
        shutil.copytree(finished, tmp_path / name)
        command("draw", name, "formats=[dot]")
        assert (tmp_path / name / "circuit.dot").exists()


def test_default_run_directories_and_own_paths(composed):
    own = ("task.path=data/sums.jsonl", "model.path=org/model", "sparsity=0.9")
    configs = [
        *composed("sparsity=0.9"), *composed("seed=1"), *composed(*own),
        *composed("experiment=smollm2/ioi", own[1]), *composed("trainer=paper", "sparsity=0.9"),
    ]  # fmt: skip
    assert len({config.run_dir for config in configs}) == 5
    assert (configs[2].task.name, configs[2].model.name) == ("custom", "custom")
    assert "sums" in configs[2].run_dir
    assert "model" in configs[2].run_dir
    assert (configs[3].model.name, configs[3].model.path) == ("smollm2", "org/model")


def test_an_experiment_file_may_set_any_setting(tmp_path, composed):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\nrun_dir: runs/mine\nsparsity: 0.5\ntrainer:\n  steps: 7\n"
    )
    for flags in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        (config,) = composed(*flags, "experiment=mine")
        assert (config.run_dir, config.sparsity, config.trainer.steps) == ("runs/mine", 0.5, 7)
    (config,) = composed(*flags, "experiment=mine", "run_dir=runs/other")
    assert config.run_dir == "runs/other"


def test_a_file_of_any_group_may_set_run_dir(tmp_path, composed):
    for group in ("launcher", "model", "tracker"):
        (tmp_path / group).mkdir()
        text = f"# @package _global_\nrun_dir: runs/{group}\nmodel: {{path: embedded}}\n"
        (tmp_path / group / "mine.yaml").write_text(text)
        (config,) = composed("--config-dir", tmp_path, f"{group}=mine")
        assert config.run_dir == f"runs/{group}"


def test_processes_of_a_run_get_its_own_experiment_file(tmp_path, monkeypatch, command, composed):
    from edgeprune.commands import run

    started = []
    monkeypatch.setattr(run, "launch_processes", lambda name, count, given: started.append(given))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nrun_dir: runs/mine\n")
    place = f"hydra.searchpath=[{tmp_path}]"
    for known in (["--config-dir", tmp_path], [place]):
        processes = ("launcher=accelerate", "launcher.processes=2")
        command("prune", *known, "experiment=mine", "seed=3,4", *processes, "-m")
        (one,), (two,) = (composed(*given) for given in started[-2:])
        assert (one.run_dir, one.seed, two.seed) == ("runs/mine", 3, 4)


# ------------------------------------------------------------------------------------------ paths


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch, composed):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\nrun_dir: ~/x\nmodel: {path: ~/m}\ntask: {path: ~/t.jsonl}\n"
    )
    model, task = "model.path=~/m", "task.path=~/t.jsonl"
    configs = [
        *composed(model, task, "run_dir=~/x"),
        *composed(model, task, "run_dir='~/x'"),
        *composed("--config-dir=~/conf", "experiment=mine"),
        *composed(model, "task.path=~/t.jsonl,~/u.jsonl", "run_dir=~/x-${seed}", "seed=0", "-m",
                  "run_dir='~/${title:custom,${task.path}}'")[:1],
    ]  # fmt: skip
    for config in configs[:3]:
        assert config.run_dir == str(tmp_path / "x")
    assert configs[3].run_dir.startswith(f"{tmp_path}/")
    for config in configs:
        assert config.model.path == str(tmp_path / "m")
        assert config.task.path == str(tmp_path / "t.jsonl")
    (config,) = composed("model.path='org/model~/x'", "task.name='~'")
    assert (config.model.path, config.task.name) == ("org/model~/x", "~")


def test_an_output_and_an_input_may_begin_with_a_tilde(finished, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(finished, tmp_path / "run")
    command("export", "~/run", "num_edges=5", "output=~/e.json")
    command("compare", "~/run", "~/e.json", "output=~/both", "formats=[dot]", "model=embedded")
    assert (tmp_path / "both/comparison.json").exists()


def test_names_that_are_not_utf8_are_refused_before_any_work(
    finished, tmp_path, monkeypatch, refused
):
    name = "caf\udce9"  # the byte E9, which is é in Latin-1
    (tmp_path / name).mkdir()
    before = set(tmp_path.rglob("*"))
    for arguments in (
        ("prune", f"run_dir={tmp_path}/{name}"),
        ("prune", f"run_dir='{tmp_path}/{name}'"),
        ("prune", f"model.path={name}"),
        ("export", finished, f"output={tmp_path}/{name}/e.json"),
        ("draw", tmp_path / name),
    ):
        assert "UTF-8" in refused(*arguments)
    monkeypatch.chdir(tmp_path / name)
    assert "UTF-8" in refused("prune", *SMALL, "run_dir=run")
    assert "UTF-8" in refused("export", finished, "output=e.json")
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="UTF-8"):
        from_dict(ReportConfig, {"folder": name})


def test_a_report_leaves_out_runs_whose_names_are_not_utf8(finished, tmp_path, command):
    shutil.copytree(finished, tmp_path / "caf\udce9/run")
    shutil.copytree(finished, tmp_path / "cafés/run")
    _, err = command("report", tmp_path)
    assert "UTF-8" in err and "cafés" not in err
    assert (tmp_path / "report/report.html").exists()


def test_a_locale_without_utf8_changes_no_file(finished, tmp_path):
    """Python's UTF-8 mode is off; the terminal has ASCII alone."""
    runs, ascii = tmp_path / "円", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shutil.copytree(finished, runs / "é")
    for arguments in (["report", runs], ["export", runs / "é", "num_edges=7"]):
        done = run_cli(*arguments, **ascii)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and r"\u5186" in done.stdout
    page = (runs / "report/report.html").read_text("utf-8")
    assert "円" in page
    assert len(json.loads((runs / "é/edges.json").read_text())) == 7
    assert_refused(run_cli("report", tmp_path / "東", **ascii), 2, r"\u6771")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_file_system_in_memory_may_hold_runs_and_outputs(command):
    with TemporaryDirectory(dir="/dev/shm") as scratch:
        command("prune", *SMALL, "trainer.steps=2", f"run_dir={scratch}/run")
        command("export", f"{scratch}/run", "num_edges=5", f"output={scratch}/e.json")
        assert len(json.loads(Path(scratch, "e.json").read_text())) == 5


# ----------------------------------------------------------------------------------------- sweeps


def test_multirun_and_wandb_without_a_key(tmp_path):
    (tmp_path / ".netrc").mkdir()  # cannot be read
    done = run_cli(
        "prune", *SMALL, "seed=0,1", "--multirun", "trainer.steps=2", "tracker=wandb",
        f"run_dir={tmp_path}/seed-${{seed}}",
        WANDB_API_KEY="", HOME=str(tmp_path), WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert (tmp_path / f"seed-{seed}" / "edges.json").exists()
        assert list((tmp_path / f"seed-{seed}" / "wandb").glob("offline-run-*"))


def test_the_time_left_is_estimated_from_less_than_one_unit(monkeypatch):
    shown, clock = [], [0.0]

    @contextmanager
    def record(total, unit):
        yield lambda done, status: shown.append((done, status))

    monkeypatch.setattr(progress, "progress", record)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    with progress.counting(10, "circuit") as add:
        add(0)
        clock[0] = 60.0
        for number in [0.1] * 100:
            add(number)
    assert shown[:2] == [(0, ""), (0, "about 99 minutes left")]  # a tenth takes a minute
    assert shown[-1][0] == 10


@pytest.mark.parametrize(
    ("content", "mode"), [(None, "offline"), ("machine api.wandb.ai password x", None)]
)
def test_a_file_of_keys_that_cannot_be_read_is_none(content, mode, tmp_path, monkeypatch):
    started, netrc = [], tmp_path / ".netrc"
    netrc.mkdir() if content is None else netrc.write_text(content)
    wandb = SimpleNamespace(
        init=lambda **given: started.append(given) or SimpleNamespace(finish=lambda code: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with progress.open_tracker("project", tmp_path, {}):
        pass
    assert [given["mode"] for given in started] == [mode]


@pytest.mark.parametrize(
    "settings",
    [
        ["ablation=zero,mean", "run_dir=run"],
        ["num_edges=null", "sparsity=0.9,2"],
        ["task.train=4,-1"],
    ],
)
def test_a_sweep_with_an_invalid_run_starts_none(settings, tmp_path, monkeypatch, refused):
    from edgeprune.commands import prune

    got = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "prune", got.append)
    refused("prune", *SMALL, *settings, "--multirun")
    assert got == []


def test_a_signal_stops_a_whole_sweep_and_an_error_does_not(tmp_path, capsys, monkeypatch):
    from edgeprune.commands import prune

    begun = []

    def fake(config):
        begun.append((config.task.name, config.seed))
        if config.seed == 1:
            raise ValueError("seed 1 fails")
        if config.task.name == "induction":
            raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "prune", fake)
    sweep = ("prune", "--multirun", "task=ioi,induction,greater_than", "seed=0,1,2")
    code, _, err = call(capsys, monkeypatch, *sweep)
    assert code == 128 + signal.SIGTERM
    assert begun == [("ioi", 0), ("ioi", 1), ("ioi", 2), ("induction", 0)]
    messages = [line for line in err.splitlines() if line.startswith("edgeprune: ")]
    assert len(messages) == 3
    assert "seed 1 fails" in messages[0] and "seed-1" in messages[0]
    assert "SIGTERM" in messages[1] and "induction" in messages[1]
    assert all(name in messages[2] for name in ("2 of 4", "seed-1", "induction"))


def test_a_failure_in_a_sweep_is_reported_before_the_next_run_starts(tmp_path, capsys, monkeypatch):
    from edgeprune.commands import prune

    reported = {}

    def fake(config):
        reported[config.seed] = capsys.readouterr().err
        if config.seed < 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"file-{config.seed}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "prune", fake)
    code, _, _ = call(capsys, monkeypatch, "prune", "-m", "seed=0,1,2", "run_dir=of-${seed}")
    assert code == 1
    assert reported[0] == ""
    for seed in (0, 1):
        (line,) = reported[seed + 1].splitlines()
        assert line.startswith(f"edgeprune: of-{seed}: file-{seed}")


LAUNCHER = '''
import multiprocessing

from hydra.core.config_store import ConfigStore
from hydra.core.utils import run_job, setup_globals
from hydra.plugins.launcher import Launcher


class ProcessLauncher(Launcher):
    """Each job in a process of its own, which sends back what Hydra's run_job returns."""

    def setup(self, *, hydra_context, task_function, config):
        self.context, self.function, self.config = hydra_context, task_function, config

    def job(self, overrides):
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        done = run_job(hydra_context=self.context, task_function=self.function, config=config,
                       job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir")
        self.sending.send(done)

    def launch(self, job_overrides, initial_job_idx):
        setup_globals()
        results, fork = [], multiprocessing.get_context("fork")
        for overrides in job_overrides:
            receiving, self.sending = fork.Pipe(duplex=False)
            process = fork.Process(target=self.job, args=[overrides])
            process.start()
            results.append(receiving.recv())
            process.join()
        return results


ConfigStore.instance().store(
    group="hydra/launcher", name="processes",
    node={"_target_": "hydra_plugins.processes.ProcessLauncher"},
)
'''


def has_joblib() -> bool:
    with suppress(ImportError):
        return find_spec("hydra_plugins.hydra_joblib_launcher") is not None
    return False


@pytest.mark.parametrize(
    "launcher",
    [
        "processes",
        pytest.param("joblib", marks=pytest.mark.skipif(
            not has_joblib(), reason="pip install hydra-joblib-launcher")),
    ],
)  # fmt: skip
def test_failures_in_other_processes_are_reported_and_counted(launcher, tmp_path):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/processes.py").write_text(LAUNCHER)
    write_jsonl(tmp_path / "good.jsonl", GOOD)
    write_jsonl(tmp_path / "bad.jsonl", GOOD, "{not json")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_cli(
        "prune", f"task.path={tmp_path}/none.jsonl,{tmp_path}/bad.jsonl,{tmp_path}/good.jsonl",
        "num_edges=60", "trainer.steps=2", f"hydra/launcher={launcher}", "--multirun",
        f"run_dir='{tmp_path}/of-${{title:custom,${{task.path}}}}'",
        f"hydra.sweep.dir={tmp_path}/sweep",
        PYTHONPATH=os.pathsep.join(paths),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("edgeprune: ")]
    for name in ("none.jsonl", "bad.jsonl"):
        assert any(name in line.split(": ")[1] for line in lines), done.stderr
    assert not any("good" in line for line in lines)
    assert len(list(tmp_path.rglob("edges.json"))) == 1


def test_another_model_than_the_runs_is_named(copied, tmp_path, command):
    other = shutil.copytree(EMBEDDED_MODEL, tmp_path / "other")
    weights = {k: v * 1.1 for k, v in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    before = set(copied.iterdir())
    command("evaluate", copied, f"model.path={other}")
    assert set(copied.iterdir()) == before
    manifest = json.loads((copied / "run.json").read_text())
    manifest["model"]["sha256"] = "0" * 64  # as if the weights had changed in their place
    (copied / "run.json").write_text(json.dumps(manifest))
    circuit = json.loads((copied / "circuit.json").read_text())
    circuit["origin"]["model"]["sha256"] = "0" * 64
    (copied / "circuit.json").write_text(json.dumps(circuit))
    _, err = command("evaluate", copied)
    assert "differs" in err
