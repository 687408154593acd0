"""Reports over many runs: groups, series, points and spreads by hand; the files; the page."""

import csv
import json
import math
import shutil

import pytest
from conftest import call, fake_run

from edgeprune.circuit import Circuit
from edgeprune.drawing import draw_frontier
from edgeprune.evaluation import report
from edgeprune.evaluation.curve import Curve
from edgeprune.evaluation.report import (
    RunRecord,
    Spread,
    frontier_table,
    group_runs,
    write_report,
)
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import METRICS, Metrics

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))
EDGES = GRAPH.edges
DISTINGUISHING = {"trainer.steps", "ablation.kind", "model.dtype", "seed", "sparsity"}


def first(count: int, *others: int) -> Circuit:
    """The graph's first edges, and others by number."""
    return Circuit.from_edges(GRAPH, [*EDGES[:count], *(EDGES[other] for other in others)])


def evaluation(kl: float, accuracy: float = 1.0, **metrics) -> dict:
    return {
        "circuit": {"kl": kl, "exact_match": accuracy, "accuracy": accuracy, **metrics},
        "full": {"kl": 0.0, "exact_match": 1.0, "accuracy": 0.9},
        "empty": {"kl": 8.0, "exact_match": 0.1, "accuracy": 0.05},
        "head_permuted": None,
    }


def curve(kl: dict[int, float]) -> Curve:
    """Of circuits of these sizes and of all edges."""

    def metrics(kl: float) -> Metrics:
        unknown = dict.fromkeys(METRICS, math.nan)
        return Metrics(unknown | {"kl": kl, "exact_match": 1 - kl / 10, "accuracy": 1 - kl / 10})

    kl = {0: 8.0, **kl, len(EDGES): 0.0}
    return Curve({size: metrics(x) for size, x in kl.items()}, 9, "validation")


def run(
    name: str, circuit: Circuit, kl: float | None = None, split="test", digest=None,
    curve: Curve | None = None, **settings,
) -> RunRecord:  # fmt: skip
    flat = {"task.name": "ioi", "model.name": "tiny", "ablation.kind": "interchange"}
    flat |= {key.replace("__", "."): value for key, value in settings.items()}
    evaluations = {} if kl is None else {split: evaluation(kl)}
    data = digest or f"{flat.get('task.path')} {flat.get('seed')}"
    digests = {"model": f"of {flat.get('model.path')}", "data": data}
    return RunRecord(name, flat, circuit, evaluations, curve, digests, DISTINGUISHING, {})


def test_seeds_of_one_size_are_a_point():
    runs = [
        run("c", first(4), 0.9, seed=0, sparsity=0.98),
        run("b", first(8, 9), 0.3, seed=10, sparsity=0.9),
        run("a", first(8, 10), 0.1, seed=2, sparsity=0.9),
    ]
    (group,) = group_runs(runs)
    assert (group.task, group.model, group.ablation) == ("ioi", "tiny", "interchange")
    assert list(group.series) == [""]
    large, small = group.points
    assert [one.name for one in large.runs] == ["a", "b"]  # by seed, as numbers
    assert large.requested == "sparsity 0.9"
    assert large.spreads["num_edges"] == Spread(9, 9, 9)
    assert large.spreads["kl"] == Spread(0.2, 0.1, 0.3)
    assert large.spreads["edge_iou"] == Spread(8 / 10, 8 / 10, 8 / 10)
    assert small.spreads["kl"] == Spread(0.9, 0.9, 0.9)
    assert small.spreads["edge_iou"] is None
    full, empty = group.baselines().values()
    assert (empty["kl"].mean, full["accuracy"].mean) == (8, 0.9)


def test_a_target_sparsity_is_named_where_it_identifies_a_point():
    runs = [
        run("a", first(4), seed=0, sparsity=0.98, trainer__target_sparsity=0.95),
        run("b", first(5), seed=0, sparsity=0.98, trainer__target_sparsity=1.0),
        run("c", first(6), seed=0, num_edges=1_234_567, trainer__target_sparsity=0.9),
        run("d", first(6), seed=0, trainer__target_sparsity=1.05),
        run("e", first(8), seed=1, trainer__target_sparsity=1.05),
    ]
    (group,) = group_runs(runs)
    points = {point.requested: point for point in group.points}
    assert set(points) == {
        "sparsity 0.98, target_sparsity 0.95",
        "sparsity 0.98, target_sparsity 1.0",
        "num_edges 1234567",
        "target_sparsity 1.05",
    }
    assert points["target_sparsity 1.05"].spreads["num_edges"] == Spread(7, 6, 8)


def test_runs_that_differ_in_other_settings_are_in_other_series_or_groups():
    base = {"seed": 0, "sparsity": 0.9, "trainer__steps": 10, "run_dir": "x"}
    runs = [
        run("a", first(4), 0.1, **base),
        run("b", first(4), 0.2, **{**base, "trainer__steps": 20, "run_dir": "y"}),
        run("c", first(4), 0.3, **{**base, "seed": 1, "tracker__kind": "wandb"}),
        run("d", first(4), 0.4, **{**base, "ablation__kind": "zero"}),
        run("e", first(4), 0.5, **{**base, "model__name": "other"}),
        run("f", Circuit(CircuitGraph(3, 2, 2, ()), frozenset()), 0.6, **base),
    ]
    groups = group_runs(runs)
    names = [{run.name for point in group.points for run in point.runs} for group in groups]
    assert names == [{"e"}, {"a", "b", "c"}, {"f"}, {"d"}]
    found = {name: len(points[0].runs) for name, points in groups[1].series.items()}
    assert found == {"trainer.steps=10": 2, "trainer.steps=20": 1}


def test_custom_models_and_data_are_named_after_files_and_identified_by_digests():
    custom = {"task__name": "custom", "model__name": "custom", "model__path": "/m/one"}
    runs = [
        run("a", first(4), **custom, task__path="/d/sums.jsonl", digest="sums", seed=0),
        run("b", first(4), **custom, task__path="/d/names.jsonl"),
        run("c", first(4), **{**custom, "model__path": "/m/two"}, task__path="/d/names.jsonl"),
    ]
    titles = [(group.task, group.model) for group in group_runs(runs)]
    assert titles == [("names", "one"), ("names", "two"), ("sums", "one")]
    copy = run("d", first(4), **custom, task__path="/e/sums.jsonl", digest="sums", seed=1)
    (group,) = group_runs([runs[0], copy])
    assert len(group.points[0].runs) == 2
    other = run("d", first(4), **custom, task__path="/d/sums.jsonl", digest="other", seed=1)
    (group,) = group_runs([runs[0], other])
    assert set(group.series) == {"task.path=other", "task.path=sums"}
    generated = [run(str(seed), first(4), seed=seed) for seed in range(2)]
    file = run("file", first(4), task__path="/d/ioi.jsonl", digest="of the file", seed=2)
    (group,) = group_runs([*generated, file])
    assert [len(point.runs) for point in group.points] == [2, 1]


def test_the_most_frequent_split_is_shown():
    runs = [
        run("a", first(4), 0.1, "validation"),
        run("b", first(4), 0.2, "validation", seed=1),
        run("c", first(4), 0.3, "test", seed=2),
    ]
    (group,) = group_runs(runs)
    assert group.split == "validation"
    assert group.points[0].spreads["kl"].high == 0.2
    (group,) = group_runs(runs, "test")
    assert group.points[0].spreads["kl"] == Spread(0.3, 0.3, 0.3)
    assert len(group.points[0].evaluations) == 1
    (group,) = group_runs([run("a", first(4))])
    assert (group.split, group.evaluations, group.points[0].spreads["kl"]) == (None, [], None)


def test_tables_have_the_metrics_that_were_measured_between_full_model_and_empty_circuit():
    runs = [run(f"{seed}", first(6), seed=seed, num_edges=6) for seed in range(2)]
    for seed, kl in enumerate((0.0781, 0.14)):
        runs[seed].evaluations["test"] = evaluation(kl, 0.8, logit_difference=2 + seed, error=None)
    (group,) = group_runs(runs)
    assert [row[1:] for row in frontier_table(group, "").rows] == [
        ["", str(GRAPH.num_edges), "0.0000", "0", "1.000", "0.900", "–"],
        ["2", "6", "0.9016", "0.109", "0.800", "0.800", "1.000"],
        ["", "0", "1.0000", "8.00", "0.100", "0.050", "–"],
    ]
    table = frontier_table(group, "", detailed=True)
    assert [(row[4], row[7]) for row in table.rows] == [
        ("0", "–"), ("0.109 (0.0781–0.140)", "2.50 (2.00–3.00)"), ("8.00", "–"),
    ]  # fmt: skip


def rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


STRANGE = '<b>"ioi"</b>, ../ioi'


def test_the_files_of_a_report(tmp_path):
    """Two sizes of three seeds each, of a task with a strange name, and another model."""
    runs = [
        run(f"{count}-{seed}", first(count, 30 + seed), (20 - count) / 10 + seed / 10,
            "validation", curve=curve({3: 4.0 - seed, 10 + seed: 1.0, 30: 0.5}),
            task__name=STRANGE, seed=seed, num_edges=count + 1)
        for count in (12, 6) for seed in range(3)
    ]  # fmt: skip
    empty = Circuit(CircuitGraph(1, 4, 2, ("embeds",)), frozenset())
    runs.append(run("other", empty, 5.0, curve=curve({3: 1.0}), model__name="other"))
    write_report(group_runs(runs), tmp_path)
    found = rows(tmp_path / "runs.csv")
    assert len(found) == 7
    assert {row["task"] for row in found} == {STRANGE, "ioi"}
    edges = [row for row in rows(tmp_path / "edges.csv") if row["asked"] == "num_edges 7"]
    assert [int(row["times_kept"]) for row in edges] == [3] * 6 + [1] * 3
    consensus = [json.loads(p.read_text()) for p in tmp_path.glob("consensus/*/edges.json")]
    assert {len(circuit) for circuit in consensus} == {12, 6}
    plots = [path.suffix for path in tmp_path.glob("frontier-*")]
    assert sorted(plots) == sorted([".pdf", ".png", ".svg"] * 2)

    circuits = 2 if shutil.which("dot") else 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<img") == 2 + circuits  # frontiers and consensus circuits


@pytest.fixture
def drawn(monkeypatch):
    """The panels of every frontier that a report draws."""
    found = []

    def draw(panels, path, **more):
        found.append(panels)
        return draw_frontier(panels, path, **more)

    monkeypatch.setattr(report, "draw_frontier", draw)
    return found


def test_a_frontier_has_a_line_per_series_through_the_curves_of_its_seeds(tmp_path, drawn):
    """The band goes from the lowest to the highest seed, over the sizes that all have."""
    runs = [
        run("a", first(4), curve=curve({3: 4.0, 10: 1.0, 30: 0.5}), seed=0, trainer__steps=9),
        run("b", first(4), curve=curve({3: 2.0, 12: 0.9, 30: 0.1}), seed=1, trainer__steps=9),
        run("c", first(4), curve=None, seed=2, trainer__steps=9),
        run("d", first(4), curve=curve({5: 3.0}), seed=0, trainer__steps=20),
        run("e", first(4), curve=None, seed=0, trainer__steps=30),
    ]
    write_report(group_runs(runs), tmp_path)
    kl = drawn[0][0]
    several, one = sorted(kl.lines, key=lambda line: -len(line.num_edges))
    by_size = dict(zip(several.num_edges, zip(*several[2:], strict=True), strict=True))
    assert by_size == {3: pytest.approx((3, 2, 4)), 30: pytest.approx((0.3, 0.1, 0.5))}
    assert (one.num_edges, one.mid, one.low, one.high) == ([5], [3], [3], [3])
    assert several.name != one.name
    assert (tmp_path / "report.html").read_text().count("<img") >= 1


def test_runs_that_chose_differently_have_lines_of_their_own(tmp_path, drawn):
    runs = [
        run("a", first(4), curve=curve({3: 4.0}), seed=0, max_kl=0.1),
        run("b", first(5), curve=curve({3: 2.0}), seed=1, max_kl=0.1),
        run("c", first(9), curve=curve({3: 1.0}), seed=0, min_exact_match=0.9),
        run("d", first(7), curve=curve({3: 1.5}), seed=0),
    ]
    (group,) = group_runs(runs)
    assert len({point.requested for point in group.points}) == 3
    write_report([group], tmp_path)
    assert sorted(line.mid for line in drawn[0][0].lines) == [[1.0], [1.5], [3.0]]
    assert len({line.name for line in drawn[0][0].lines}) == 3


@pytest.mark.parametrize("damage", ["{", "[]", '{"points": [], "empty": {}}', "\x00", None])
def test_a_run_without_a_usable_curve_is_reported(tmp_path, damage, capsys, monkeypatch):
    folders = [fake_run(tmp_path / name, first(4), num_edges=4, seed=seed)
               for seed, name in enumerate("ab")]  # fmt: skip
    whole = json.dumps(curve({3: 4.0}).to_dict())
    (folders[0] / "curve.json").write_text(whole)
    if damage is not None:
        (folders[1] / "curve.json").write_text(damage)
    code, _, err = call(capsys, monkeypatch, "report", tmp_path)
    assert (code, "curve.json" in err) == (0, damage is not None), err
    assert len(rows(tmp_path / "report/runs.csv")) == 2
    assert len(list((tmp_path / "report").glob("frontier-*.png"))) == 1


def test_runs_without_edges_and_evaluations_have_no_plot(tmp_path):
    write_report(group_runs([run("a", first(0))]), tmp_path)
    assert not list(tmp_path.glob("frontier-*"))
    assert (tmp_path / "report.html").exists()
    assert rows(tmp_path / "edges.csv") == []


def test_command_report_uses_only_evaluations_of_the_run_itself(tmp_path, capsys, monkeypatch):
    """Same circuit, ablation, model and data; a report replaces the one before."""
    ablation = {"kind": "interchange", "per_position": False}
    own = {
        **evaluation(1.0), "edges_sha256": first(4).digest(), "ablation": ablation,
        "model_sha256": "of the model", "data_sha256": "of the data",
    }  # fmt: skip
    others = {
        "own": {}, "circuit": {"edges_sha256": "other"}, "model": {"model_sha256": "other"},
        "data": {"data_sha256": "other"}, "ablation": {"ablation": {"kind": "zero"}},
    }  # fmt: skip
    for seed, (name, changes) in enumerate(others.items()):
        folder = fake_run(tmp_path / name, first(4), ablation=ablation, seed=seed, num_edges=4)
        (folder / "evaluation-test.json").write_text(json.dumps({**own, **changes}))
    for _ in range(2):
        code, _, err = call(capsys, monkeypatch, "report", tmp_path)
        assert code == 0, err
    found = {row["run"]: row["kl"] for row in rows(tmp_path / "report/runs.csv")}
    assert found == {name: "1.0" if name == "own" else "" for name in others}
