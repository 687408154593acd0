"""Reports over many runs: groups, series, points and spreads by hand, the files, the page."""

import csv
import json
import re
import shutil
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from conftest import call, fake_run, run_cli

from edgeprune.circuit import Circuit
from edgeprune.commands.report_page import spread_text
from edgeprune.drawing.frontier import Curve, Panel, _figure, draw_frontier
from edgeprune.evaluation.report import Run, Spread, group_runs
from edgeprune.graph import CircuitGraph

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))
EDGES = GRAPH.edges


def first(count: int, *others: int) -> Circuit:
    """The graph's first edges, and others by number."""
    return Circuit.from_edges(GRAPH, [*EDGES[:count], *(EDGES[other] for other in others)])


ABLATION = {"kind": "interchange", "per_position": False}


def evaluation(circuit: Circuit, kl: float, accuracy: float = 1.0) -> dict:
    return {
        "edges_sha256": circuit.digest(),
        "ablation": ABLATION,
        "model_sha256": "of the model",
        "data_sha256": "of the data",
        "num_edges": len(circuit),
        "circuit": {"kl": kl, "exact_match": accuracy, "accuracy": accuracy},
        "full": {"kl": 0.0, "exact_match": 1.0, "accuracy": 0.9},
        "corrupted": {"kl": 8.0, "exact_match": 0.1, "accuracy": 0.05},
    }


def a_run(name: str, circuit: Circuit, kl: float | None = None, split="test", **settings) -> Run:
    flat = {"task.name": "ioi", "model.name": "tiny", "ablation.kind": "interchange", **settings}
    evaluations = {} if kl is None else {split: evaluation(circuit, kl)}
    digests = {"model": f"of {flat.get('model.path')}", "data": f"of {flat.get('task.path')}"}
    return Run(name, flat, circuit, evaluations, digests)


# ---------------------------------------------------------------------------------------- by hand


def test_seeds_of_one_size_are_a_point():
    runs = [
        a_run("c", first(4), 0.9, seed=0, sparsity=0.98),
        a_run("b", first(8, 9), 0.3, seed=10, sparsity=0.9),
        a_run("a", first(8, 10), 0.1, seed=2, sparsity=0.9),
    ]
    (group,) = group_runs(runs)
    assert group.title == "ioi in tiny, interchange ablation"
    (series,) = group.series
    assert series.name == ""
    large, small = series.points
    assert [run.name for run in large.runs] == ["a", "b"]  # by seed, as numbers
    assert large.asked == "sparsity 0.9"
    assert large.num_edges == Spread(9, 9, 9)
    assert large.spread("kl") == Spread(0.2, 0.1, 0.3)
    assert small.spread("kl") == Spread(0.9, 0.9, 0.9)
    assert small.stability is None
    stability = large.stability
    assert stability.edge_iou == Spread(8 / 10, 8 / 10, 8 / 10)
    assert stability.consensus == first(8)
    assert sorted(stability.times_kept.values()) == [1, 1, *[2] * 8]
    assert group.reference("corrupted", "kl") == 8
    assert group.reference("full", "accuracy") == 0.9


def test_targets_tell_points_of_one_size_apart():
    runs = [
        a_run("a", first(4), seed=0, sparsity=0.98, **{"trainer.target_sparsity": 0.95}),
        a_run("b", first(5), seed=0, sparsity=0.98, **{"trainer.target_sparsity": 1.0}),
        a_run("c", first(6), seed=0, num_edges=1_234_567, **{"trainer.target_sparsity": 0.9}),
    ]
    (group,) = group_runs(runs)
    assert {point.asked for point in group.series[0].points} == {
        "sparsity 0.98, target_sparsity 0.95",
        "sparsity 0.98, target_sparsity 1.0",
        "num_edges 1234567",
    }


def test_runs_that_differ_otherwise_are_other_series_and_groups():
    base = {"seed": 0, "sparsity": 0.9, "trainer.steps": 10, "run_dir": "x", "tracker.kind": "none"}
    runs = [
        a_run("a", first(4), 0.1, **base),
        a_run("b", first(4), 0.2, **{**base, "trainer.steps": 20, "run_dir": "y"}),
        a_run(
            "c",
            first(4),
            0.3,
            **{
                **base,
                "seed": 1,
                "tracker.kind": "wandb",
                "trainer.cuda_graph": True,
                "trainer.recompute": True,
            },
        ),
        a_run("d", first(4), 0.4, **{**base, "ablation.kind": "zero"}),
        a_run("e", first(4), 0.5, **{**base, "model.name": "other"}),
        a_run("f", Circuit(CircuitGraph(3, 2, 2, ()), frozenset()), 0.6, **base),
    ]
    groups = group_runs(runs)
    assert [sorted(run.name for run in group.runs) for group in groups] == [
        ["e"], ["a", "b", "c"], ["f"], ["d"],
    ]  # fmt: skip
    assert [(s.name, len(s.points[0].runs)) for s in groups[1].series] == [
        ("trainer.steps=10", 2), ("trainer.steps=20", 1),
    ]  # fmt: skip


def test_ones_own_data_and_models_go_by_their_files():
    own = {"task.name": "custom", "model.name": "custom", "model.path": "/m/one"}
    runs = [
        a_run("a", first(4), 0.1, **own, **{"task.path": "/d/sums.jsonl"}),
        a_run("b", first(4), 0.2, **own, **{"task.path": "/d/names.jsonl"}),
        a_run("c", first(4), 0.3, **{**own, "model.path": "/m/two"},
              **{"task.path": "/d/names.jsonl"}),
        a_run("d", first(4), 0.4, **{"task.path": "/d/ioi.jsonl"}),
    ]  # fmt: skip
    assert [group.title.split(",")[0] for group in group_runs(runs)] == [
        "ioi in tiny", "names in one", "names in two", "sums in one",
    ]  # fmt: skip
    elsewhere = a_run("e", first(4), 0.5, **own, **{"task.path": "/e/sums.jsonl"})
    assert [group.task for group in group_runs([runs[0], elsewhere])] == [
        "/d/sums.jsonl", "/e/sums.jsonl",
    ]  # fmt: skip
    moved = replace(elsewhere, digests=runs[0].digests, settings={**elsewhere.settings, "seed": 1})
    (group,) = group_runs([runs[0], moved])
    assert group.title.startswith("sums in one")
    (point,) = group.series[0].points
    assert len(point.runs) == 2
    changed = replace(runs[0], digests={**runs[0].digests, "data": "of other prompts"})
    assert len(group_runs([runs[0], changed])) == 2


def test_a_swept_target_is_a_size_and_by_threshold_sizes_spread():
    runs = [
        a_run(str(edges), first(edges), 0.1, seed=seed, **{"trainer.target_sparsity": 1.05})
        for seed, edges in enumerate((6, 8))
    ]
    (point,) = group_runs(runs)[0].series[0].points
    assert point.asked == "target_sparsity 1.05"
    assert point.num_edges == Spread(7, 6, 8)


def test_the_split_that_most_runs_have_is_shown():
    runs = [
        a_run("a", first(4), 0.1, "validation"),
        a_run("b", first(4), 0.2, "validation", seed=1),
        a_run("c", first(4), 0.3, "test", seed=2),
    ]
    (group,) = group_runs(runs)
    assert group.split == "validation"
    assert group.series[0].points[0].spread("kl").high == 0.2
    (group,) = group_runs(runs, "test")
    assert group.prompts == "test prompts"
    assert group.series[0].points[0].spread("kl") == Spread(0.3, 0.3, 0.3)
    assert group.series[0].points[0].num_evaluated == 1
    (group,) = group_runs(runs, "train")
    assert (group.prompts, group.evaluated) == ("not evaluated on train prompts", False)
    (group,) = group_runs([a_run("a", first(4))])
    assert (group.split, group.prompts) == (None, "not evaluated")
    assert group.series[0].points[0].spread("kl") is None


# -------------------------------------------------------------------------------------- the files


def sweep(folder, task: str = "ioi") -> None:
    """Two sizes, three seeds each, and one run of another model."""
    for count in (12, 6):
        for seed in range(3):
            circuit = first(count, 30 + seed)
            run = fake_run(
                folder / f"e{count + 1}-{seed}", circuit,
                task={"name": task}, ablation=ABLATION, seed=seed, num_edges=count + 1,
            )  # fmt: skip
            kl = (20 - count) / 10 + seed / 10
            text = json.dumps(evaluation(circuit, kl, 1 - kl / 4))
            (run / "evaluation-validation.json").write_text(text)
    empty = Circuit(CircuitGraph(1, 4, 2, ("embeds",)), frozenset())
    other = fake_run(folder / "deep/other", empty, model={"name": "other"}, ablation=ABLATION)
    (other / "evaluation-test.json").write_text(json.dumps(evaluation(empty, 5.0)))


class Page(HTMLParser):
    """Tags, what they fetch, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_where_outputs_are_values_a_report_shows_their_error(tmp_path, capsys, monkeypatch):
    circuit = first(3)
    fake_run(tmp_path / "tracr", circuit, ablation=ABLATION, num_edges=3)
    shown = evaluation(circuit, None)
    shown["circuit"]["error"], shown["corrupted"]["error"] = 0.25, 2.0
    (tmp_path / "tracr/evaluation-test.json").write_text(json.dumps(shown))
    code, out, err = call(capsys, monkeypatch, "report", str(tmp_path))
    assert code == 0, err
    assert "error" in out and "0.25" in out and "KL" not in out
    (row,) = rows(tmp_path / "report/frontier.csv")
    assert (row["error_mean"], row["kl_mean"]) == ("0.25", "")
    assert "error from the full model" in next(tmp_path.glob("report/*.svg")).read_text()


def table_rows(text: str) -> list[list[str]]:
    """Rows of a page's tables, or of tables on the console, as texts."""
    if "</tr>" in text:
        return [re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row) for row in text.split("</tr>")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]


def test_tables_say_what_to_compare_with_and_what_distractors_say(tmp_path, capsys, monkeypatch):
    for seed, kl in enumerate((0.0781, 0.14)):
        run = fake_run(tmp_path / f"{seed}", first(6), ablation=ABLATION, seed=seed, num_edges=6)
        shown = evaluation(first(6), kl, 0.8)
        shown["circuit"] |= {"two_way_accuracy": 0.9, "logit_difference": 2 + seed}
        shown["full"] |= {"two_way_accuracy": 1.0, "logit_difference": 12.34}
        (run / "evaluation-test.json").write_text(json.dumps(shown))
    code, out, err = call(capsys, monkeypatch, "report", str(tmp_path))
    assert code == 0, err
    size = str(GRAPH.num_edges)
    printed = table_rows(out)
    assert ["full model", "", size, "0", "1.000", "0.900", ""] in printed
    assert ["num_edges 6", "2", "6", "0.109", "0.800", "0.800", "1.000"] in printed
    assert ["every edge closed", "", "0", "8.00", "0.100", "0.050", ""] in printed
    page = table_rows((tmp_path / "report/report.html").read_text())
    assert page[0][3:8] == [
        "KL", "exact match", "accuracy", "two-way accuracy", "logit difference",
    ]  # fmt: skip
    assert page[1:4] == [
        ["full model", "", size, "0", "1.000", "0.900", "1.000", "12.3", "", "0.0000"],
        ["num_edges 6", "2", "6", "0.109 (0.078–0.140)", "0.800", "0.800", "0.900",
         "2.50 (2.00–3.00)", "1.000", "0.9016"],
        ["every edge closed", "", "0", "8.00", "0.100", "0.050", "–", "–", "", "1.0000"],
    ]  # fmt: skip
    (row,) = rows(tmp_path / "report/frontier.csv")
    names = ("two_way_accuracy_mean", "logit_difference_low", "logit_difference_high")
    assert [row[name] for name in names] == ["0.9", "2", "3"]


@pytest.mark.parametrize(
    ("spread", "text"),
    [((0.107, 0.0781, 0.14), "0.107 (0.078–0.140)"), ((0.000559, 0.0005, 0.0021),
     "0.000559 (0.000500–0.002100)"), ((12.34, 12.31, 12.33), "12.3"), ((1234.5, 9, 2000),
     "1234 (9–2000)"), ((-0.5, -1, 0), "-0.500 (-1.000–0.000)"), ((1e-9, 0, 1e-9), "0"),
     ((3e-6, 2e-6, 4e-6), "0.000003 (0.000002–0.000004)")],
)  # fmt: skip
def test_a_spread_has_as_many_decimals_as_its_mean(spread, text):
    assert spread_text(Spread(*spread), None, ranges=True) == text


HOSTILE = '<script>alert("x")</script> $\\frac{1}{0}$ & "ioi\''


def test_report_of_a_sweep(tmp_path):
    """In a fresh process: every file, from a task whose name would like to be markup."""
    sweep(tmp_path, HOSTILE)
    done = run_cli("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 runs ->" in done.stdout
    output = tmp_path / "report"
    assert not list(output.glob(".*.tmp"))

    runs = rows(output / "runs.csv")
    assert len(runs) == 7
    assert {row["task"] for row in runs} == {HOSTILE, "ioi"}
    (frontier,) = [row for row in rows(output / "frontier.csv") if row["asked"] == "num_edges 7"]
    assert float(frontier["num_edges"]) == 7
    assert float(frontier["kl_mean"]) == pytest.approx(1.5)
    assert [float(frontier[f"kl_{end}"]) for end in ("low", "high")] == pytest.approx([1.4, 1.6])
    assert float(frontier["edge_iou_mean"]) == pytest.approx(6 / 8)
    assert len(rows(output / "stability.csv")) == 6
    edges = [row for row in rows(output / "edges.csv") if row["asked"] == "num_edges 7"]
    assert [int(row["times_kept"]) for row in edges] == [3] * 6 + [1] * 3

    consensus = sorted((output / "consensus").iterdir())
    assert len(consensus) == 2
    sizes = {len(Circuit.load(folder / "edges.json", GRAPH)) for folder in consensus}
    assert sizes == {12, 6}
    plots = sorted(output.glob("frontier-*"))
    assert [plot.suffix for plot in plots] == [".pdf", ".png", ".svg"] * 2
    magic = {".pdf": b"%PDF", ".png": b"\x89PNG", ".svg": b"<?xml"}
    assert all(plot.read_bytes().startswith(magic[plot.suffix]) for plot in plots)

    text = (output / "report.html").read_text()
    page = Page(text)
    assert page.sources
    assert all(re.match(r"data:image/svg\+xml;base64,", source) for source in page.sources)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text).replace("http-equiv", "")
    assert HOSTILE in "".join(page.text)
    assert "two-way accuracy" not in page.text  # of prompts without distractors
    for folder in consensus:
        assert f"is in consensus/{folder.name}/edges.json." in "".join(page.text)
    assert page.tags.count("img") == 4  # two frontiers, two consensus circuits

    # a consensus circuit can be used as one's own
    done = run_cli("draw", consensus[0], "formats=[dot]", "dangling=true")
    assert "drew" in done.stdout


def test_a_report_of_one_split(tmp_path, capsys, monkeypatch):
    """Six runs have been evaluated on validation prompts, and one of another model on test ones."""
    sweep(tmp_path)

    def report(*arguments) -> tuple[int, str, str]:
        return call(capsys, monkeypatch, "report", tmp_path, *arguments)

    code, out, err = report("split=test")
    assert code == 0, err
    assert "not evaluated on test prompts" in " ".join(out.split())
    assert "ioi in tiny, interchange ablation: no run has been evaluated on test prompts" in err
    assert [plot.suffix for plot in tmp_path.glob("report/*.svg")] == [".svg"]
    assert "not evaluated on test prompts" in (tmp_path / "report/report.html").read_text()
    found = rows(tmp_path / "report/runs.csv")
    assert sorted(row["split"] for row in found) == [""] * 6 + ["test"]
    code, out, err = report("split=validation")
    assert code == 0, err
    assert "ioi in other, interchange ablation: no run has been evaluated on validation" in err
    code, _, err = report("split=tests")
    assert code == 2
    assert "split" in err and "test" in err


def test_runs_that_cannot_be_used_are_named(tmp_path, capsys, monkeypatch):
    sweep(tmp_path)
    (tmp_path / "e13-0/edges.json").unlink()
    (tmp_path / "e13-1/edges.json").write_text('[["a9.h0", "m0"]]')
    (tmp_path / "e13-2/evaluation-validation.json").write_text("{")
    of_another = evaluation(first(6, 33), 1.0)  # of as many edges
    (tmp_path / "e7-0/evaluation-validation.json").write_text(json.dumps(of_another))
    zero = {**evaluation(first(6, 32), 1.0), "ablation": {**ABLATION, "kind": "zero"}}
    (tmp_path / "e7-2/evaluation-validation.json").write_text(json.dumps(zero))
    (tmp_path / "e7-1/config.yaml").write_text("[")
    code, out, err = call(capsys, monkeypatch, "report", tmp_path)
    assert code == 0, err
    assert "4 runs ->" in out
    for wanted in (
        "e13-0 is left out: it has no edges.json yet",
        "e13-1 is left out",
        "e13-2/evaluation-validation.json is passed over: JSONDecodeError",
        "e7-0/evaluation-validation.json is passed over: it is of another circuit",
        "e7-2/evaluation-validation.json is passed over: it is of another ablation",
        "e7-1 is left out",
    ):
        assert wanted in err
    assert [row["kl"] for row in rows(tmp_path / "report/runs.csv")].count("") == 3


def test_a_second_report_leaves_nothing_of_the_first_but_what_was_changed(
    tmp_path, capsys, monkeypatch
):
    sweep(tmp_path / "runs")
    output = tmp_path / "out"

    def files() -> set[str]:
        code, _, err = call(capsys, monkeypatch, "report", tmp_path / "runs", f"output={output}")
        assert code == 0, err
        return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}

    first = files()
    gone = next((output / "consensus").glob("*num_edges-13"))
    kept = next((output / "consensus").glob("*num_edges-7"))
    (kept / "circuit.pdf").write_text("drawn by hand")
    (output / "frontier-mine.png").write_text("drawn by hand")
    for run in (tmp_path / "runs").iterdir():
        if run.name != "deep":
            shutil.rmtree(run)
    second = files()
    assert not gone.exists()
    assert {name for name in second if name.startswith("consensus")} == {
        str((kept / "circuit.pdf").relative_to(output))
    }
    assert second - first == {
        str((kept / "circuit.pdf").relative_to(output)), "frontier-mine.png",
    }  # fmt: skip
    assert len([name for name in second if name.startswith("frontier-")]) == 1 + 3
    assert len(rows(output / "runs.csv")) == 1


def test_evaluations_of_another_model_or_data_are_passed_over(tmp_path, capsys, monkeypatch):
    own = evaluation(first(4), 1.0)
    for name in ("ablation", "model", "data", "both"):
        run = fake_run(tmp_path / name, first(4), ablation=ABLATION)
        others = {f"{what}_sha256": "other" for what in ("model", "data") if name in (what, "both")}
        (run / "evaluation-test.json").write_text(json.dumps({**own, **others}))
    unsaid = {key: value for key, value in own.items() if key != "model_sha256"}
    run = fake_run(tmp_path / "old", first(4), ablation=ABLATION)
    (run / "evaluation-test.json").write_text(json.dumps(unsaid))
    code, _, err = call(capsys, monkeypatch, "report", tmp_path)
    assert code == 0, err
    for wanted in (
        "model/evaluation-test.json is passed over: it is of another model than the run's",
        "data/evaluation-test.json is passed over: it is of another data file than the run's",
        "both/evaluation-test.json is passed over: it is of another model and data file than",
        "old/evaluation-test.json is passed over: KeyError: 'model_sha256'; evaluate it again",
    ):
        assert wanted in err
    found = {row["run"]: row["kl"] for row in rows(tmp_path / "report/runs.csv")}
    assert found == {"ablation": "1.0", "model": "", "data": "", "both": "", "old": ""}


def test_circuits_of_another_size_than_asked_are_left_out(tmp_path, capsys, monkeypatch):
    """A later export leaves them; a clean-up does not count."""
    for name, circuit in (("own", first(6)), ("later", first(20)), ("cleaned", first(4))):
        fake_run(tmp_path / name, circuit, sparsity=0.9)
    fake_run(tmp_path / "any", first(9), trainer={"target_sparsity": 1.05})
    cleanup = {"tolerance": 0.01, "num_edges_before": 6}
    for name in ("later", "cleaned"):  # the first's has been written over since
        origin = json.dumps({"num_edges": 4, "cleanup": cleanup})
        (tmp_path / name / "circuit.json").write_text(origin)
    code, _, err = call(capsys, monkeypatch, "report", tmp_path)
    assert code == 0, err
    assert {row["run"] for row in rows(tmp_path / "report/runs.csv")} == {"own", "cleaned", "any"}
    (said,) = [line for line in err.splitlines() if "left out" in line]
    assert "made with 20 edges, but sparsity=0.9 asks for 6; make that one again" in said


def test_copies_of_a_run_are_said(tmp_path, capsys, monkeypatch):
    for name in ("a", "copy"):
        fake_run(tmp_path / name, first(4), seed=0, num_edges=4)
    fake_run(tmp_path / "b", first(3), seed=0, num_edges=3)
    code, _, err = call(capsys, monkeypatch, "report", tmp_path)
    assert code == 0, err
    (said,) = [line for line in err.splitlines() if "same seed" in line]
    assert "num_edges 4: runs of the same seed count as several seeds (a, copy)" in said


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no finished run below"),
        (lambda folder: folder.write_text("x"), "no such folder"),
    ],
)
def test_without_runs_there_is_one_error(tmp_path, capsys, monkeypatch, make, wanted):
    make(tmp_path / "runs")
    code, _, err = call(capsys, monkeypatch, "report", tmp_path / "runs")
    assert code == 2
    assert err.startswith("edgeprune: ")
    assert wanted in err
    assert not (tmp_path / "runs/report").exists()


# -------------------------------------------------------------------------------------- the plots


@pytest.mark.parametrize("name", ["", "<b> $x_1$ & \\n {} %"])
def test_plots_show_names_as_they_are_and_are_the_same_each_time(tmp_path, name):
    curves = [
        Curve(name, [10, 0], [0.1, 0.0], [0.0, 0.0], [0.2, 0.0]),
        Curve("b", [5], [1], [1], [1]),
    ]
    panels = [
        Panel("KL", curves, [("full", 1.0)], log=True), Panel("accuracy", curves, [], log=False),
    ]  # fmt: skip
    for number in (1, 2):
        for suffix in ("svg", "pdf", "png"):
            path = tmp_path / f"{number}.{suffix}"
            draw_frontier(panels, path, title=name or "t", all_edges=100)
    for suffix in ("svg", "pdf", "png"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    document = xml.dom.minidom.parse(str(tmp_path / "1.svg"))
    comments = [
        node.data for group in document.getElementsByTagName("g") for node in group.childNodes
        if node.nodeType == node.COMMENT_NODE
    ]  # fmt: skip
    if name:  # matplotlib notes the text that it drew as outlines
        assert any("$x_1$" in comment for comment in comments)


def test_a_plot_of_less_than_two_decades_has_labels_between_powers_of_ten():
    panel = Panel("KL", [Curve("", [9, 5], [0.18, 0.9], [0.18, 0.9], [0.18, 0.9])], [], log=True)
    figure = _figure([panel], "t", 100)
    figure.draw_without_rendering()
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert {"0.2", "0.5", "1"} <= set(labels)


def test_a_plot_from_no_edges_to_all_has_room_where_its_points_are():
    """KL divergences of 0 come out a little below it, and sizes may be close to each other."""
    sizes = [5524, 552, 276, 110, 55, 28, 6, 0]
    kl = [-3e-9, 0.0009, 0.001, 2.0, 9.7, 13.8, 14.76, 14.76]
    panel = Panel("KL", [Curve("", sizes, kl, kl, kl)], [("all corrupted", 14.76)], log=True)
    figure = _figure([panel], "t", 5524)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.get_ylim()[0] == 0
    points = ax.transAxes.inverted().transform(
        ax.transData.transform(list(zip(sizes, kl, strict=True)))
    )
    assert 0 < points[-1][0] < 0.1
    assert 0.9 < points[0][0] < 1
    assert max(y for _, y in points) < 1
    ticks = ax.get_xticks()
    assert {0, 5524} < set(ticks) < set(sizes)
    places = ax.transAxes.inverted().transform(
        ax.transData.transform([(x, 1) for x in ticks])
    )[:, 0]  # fmt: skip
    assert abs(places[:-1] - places[1:]).min() >= 0.1


def test_names_of_levels_lie_where_curves_do_not():
    def places(levels: list[float], values: list[float]) -> list[tuple[str, str]]:
        curve = Curve("", [8, 4, 2, 1], values, values, values)
        figure = _figure([Panel("", [curve], [("level", y) for y in levels], log=False)], "t", 9)
        return [(text.get_ha(), text.get_va()) for text in figure.axes[0].texts]

    assert places([0.5], [1, 1, 1, 1]) == [("right", "bottom")]
    assert places([0.5], [0.55, 0.55, 0.2, 0]) == [("left", "bottom")]
    assert places([0.5], [0.55, 0.55, 0.55, 0.55]) == [("right", "top")]
    assert places([0.5], [0.5, 0.5, 0.5, 0.5]) == [("right", "bottom")]  # none is better
    assert places([0.5, 0.5], [1, 1, 1, 1]) == [("right", "bottom"), ("left", "bottom")]
    assert places([0], [1, 1, 1, 0.02]) == [("right", "bottom")]  # not on the axis
