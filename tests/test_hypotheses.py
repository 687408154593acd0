"""Tests of circuits where the truth is known: the micro model and compiled programs."""

import json
import random
from itertools import pairwise

import pytest
import torch
from conftest import call, random_pairs, run_cli
from test_micro_model import CIRCUIT, induction_pairs, micro_model
from test_tracr import ABLATIONS, read_pairs, true_edges

from edgeprune import load_model
from edgeprune.api import learn_again as repeating
from edgeprune.api.prune import learn
from edgeprune.circuit import Circuit
from edgeprune.config import TestConfig as SceptConfig
from edgeprune.errors import ConfigError, DataError
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.compare import overlap
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.evaluation.finding import findings_table, in_words
from edgeprune.evaluation.hypotheses import (
    completeness,
    equivalence,
    independence,
    minimality,
    necessity,
    sufficiency,
)
from edgeprune.evaluation.random_circuits import RandomPaths
from edgeprune.evaluation.sceptic import all_findings, curve, node_circuit, num_circuits
from edgeprune.evaluation.specificity import Specificity, specificity
from edgeprune.evaluation.stability import other_templates, stability
from edgeprune.graph import CircuitGraph
from edgeprune.paths import TRACR_MODELS
from edgeprune.scores import EdgeScores

NUM_RANDOM = 40
"""With fewer than 29 random circuits there is no verdict."""


@pytest.fixture(scope="module")
def bench() -> Bench:
    """The micro model on prompts of its task."""
    return Bench(micro_model(), induction_pairs(40, seed=3))


@pytest.fixture(scope="module")
def true(bench) -> Circuit:
    return Circuit.from_edges(bench.graph, CIRCUIT)


def with_superfluous(circuit: Circuit, number: int = 10) -> Circuit:
    """The circuit with more edges, all others but one if there are fewer."""
    rest = [edge for edge in circuit.graph.edges if edge not in circuit]
    more = random.Random(0).sample(rest, min(number, len(rest) - 1))
    return circuit | Circuit.from_edges(circuit.graph, more)


def without(circuit: Circuit, edge) -> Circuit:
    return circuit - Circuit.from_edges(circuit.graph, [edge])


def verdicts(bench: Bench, circuit: Circuit) -> dict[str, bool | None]:
    found = all_findings(bench, circuit, num_random=NUM_RANDOM)
    return {each.name: each.holds for each in found if each.holds is not None}


# ------------------------------------------------------------------------------- the truth


def test_the_true_circuit_of_the_micro_model_passes_every_test(bench, true):
    found = verdicts(bench, true)
    assert len(found) == 6
    assert all(found.values()), found


@pytest.mark.parametrize("edge", sorted(CIRCUIT))
def test_a_missing_edge_is_noticed(bench, true, edge):
    circuit = without(true, edge)
    (own,) = bench.measure([circuit])
    is_sufficient = sufficiency(bench, circuit, own, NUM_RANDOM).holds
    assert not (is_sufficient and completeness(bench, circuit, own).holds)
    assert not equivalence(bench, own).holds


def test_superfluous_edges_are_noticed(bench, true):
    circuit = with_superfluous(true)
    (own,) = bench.measure([circuit])
    found = minimality(bench, circuit, own, 100)
    assert not found.holds
    needed = {(writer, reader) for writer, reader, *_, is_needed in found.details["effects"]
              if is_needed}  # fmt: skip
    assert needed == CIRCUIT


def test_random_circuits_are_rarely_sufficient(bench):
    """False alarms: they are no better than others of their kind."""
    paths = RandomPaths(bench.graph)
    circuits = [paths.circuit(8, seed=1000 + number) for number in range(100)]
    found = [
        sufficiency(bench, circuit, own, 100).holds
        for circuit, own in zip(circuits, bench.measure(circuits), strict=True)
    ]
    assert sum(found) <= 7


def test_too_few_random_circuits_give_no_verdict(bench, true):
    (own,) = bench.measure([true])
    few = (sufficiency(bench, true, own, 28), necessity(bench, true, 28),
           minimality(bench, true, own, 18))  # fmt: skip
    assert [each.holds for each in few] == [None] * 3
    assert sufficiency(bench, true, own, 29).holds


def test_what_is_left_out_is_noticed(bench, true):
    """Without a circuit, the rest is the full model, which knows the answer."""
    nothing = true - true
    assert not independence(bench, nothing).holds
    assert necessity(bench, nothing).holds is False
    assert independence(bench, true).holds


def test_necessity_does_not_apply_if_every_path_goes_through_the_circuit(bench):
    into_output = [edge for edge in bench.graph.edges if edge[1] == "resid_post"]
    found = necessity(bench, Circuit.from_edges(bench.graph, into_output), NUM_RANDOM)
    assert found.holds is None and found.p is None


def test_necessity_names_the_single_edge_that_does_most_damage(bench, true):
    scores = EdgeScores(bench.graph, torch.tensor(true.mask()).double())
    found = necessity(bench, with_superfluous(true), NUM_RANDOM, scores=scores)
    measured = {(writer, reader): x for writer, reader, x in found.details["edges"]}
    assert {*true.edges} <= {*measured}
    alone = bench.measure([without(bench.whole, edge) for edge in measured])
    damage = [bench.distance(each).mean().item() for each in alone]
    assert [*measured.values()] == pytest.approx(damage)
    assert " → ".join(max(measured, key=measured.get)) in found.words


def test_independence_does_not_apply_to_a_single_prompt(bench, true):
    assert independence(Bench(bench.model, bench.pairs[:1]), true).holds is None


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["brackets", "reverse", "xproportion"])
def test_circuits_of_compiled_programs(name, ablation):
    choice, wanted = true_edges(TRACR_MODELS / name, ablation)
    model = load_model(TRACR_MODELS / name)
    pairs = random.Random(0).sample(list(read_pairs(model, **choice)), 40)
    bench = Bench(model, pairs, ablation)
    true = Circuit.from_edges(model.graph, wanted[0])
    found = verdicts(bench, true)
    assert all(found.values()), found
    for circuit in (without(true, edge) for edge in (true.edges[0], true.edges[-1])):
        (own,) = bench.measure([circuit])
        is_sufficient = sufficiency(bench, circuit, own, NUM_RANDOM).holds
        assert not (is_sufficient and completeness(bench, circuit, own).holds)
    larger = with_superfluous(true)
    (own,) = bench.measure([larger])
    assert not minimality(bench, larger, own, NUM_RANDOM).holds


def test_completeness_removes_heads_by_kind(bench, true):
    """Without its induction head an incomplete circuit does what the full model does without it."""
    idle = [("tok_embeds", "a1.h1.q"), ("a1.h1", "resid_post")]  # writes noise that nothing reads
    incomplete = without(true, ("a0.h1", "a1.h0.k")) | Circuit.from_edges(bench.graph, idle)
    (own,) = bench.measure([incomplete])
    labels = {"a1.h0": ["induction", "any"], "a1.h1": ["idle", "any"], "a0.h0": ["not in it"]}
    found = completeness(bench, incomplete, own, labels=labels).details
    assert found["kind_sets"] == {"any": ["a1.h0", "a1.h1"], "idle": ["a1.h1"],
                                  "induction": ["a1.h0"]}  # fmt: skip
    assert found["kinds"]["idle"] == pytest.approx(found["none"], abs=1e-3)
    assert found["kinds"]["induction"] < 0.01 < 0.2 < found["none"]


# ------------------------------------------------------------------------------- the bench


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_a_bench_measures_what_evaluate_does(model, ablation):
    """Also with dangling edges, and with circuits that differ in these alone."""
    pairs = random_pairs(11)
    bench = Bench(model, pairs, ablation, batch_size=4)
    circuits = [Circuit.random(model.graph, size, seed=0) for size in (20, 60, 60, 200)]
    circuits.append(circuits[-1].without_dangling())
    for circuit, found in zip(circuits, bench.measure(circuits), strict=True):
        wanted = evaluate(model, circuit, pairs, ablation=ablation).circuit
        summary = bench.summary(found)
        assert summary["distance"] == pytest.approx(wanted.kl, rel=1e-3, abs=1e-6)
        assert summary["exact_match"] == wanted.exact_match
        recovered = wanted.logit_difference_recovered
        assert summary["recovered"] == pytest.approx(recovered, rel=1e-3, abs=1e-5)


def test_progress_is_reported_for_every_circuit(bench, true):
    seen = []
    bench.listener = seen.append
    some = [Circuit.random(bench.graph, size, seed=7) for size in range(5, 30)]
    bench.measure([*some, true, true])
    bench.listener = None
    assert sum(seen) == pytest.approx(27)
    assert num_circuits(true, 40, has_scores=True) > num_circuits(true, 20, has_scores=False) > 100


def test_the_curve_ends_at_the_full_model_and_its_area_is_a_mean_over_the_logarithm(bench, true):
    ranks = torch.tensor([float(edge in true) for edge in bench.graph.edges])
    found = curve(bench, EdgeScores(bench.graph, ranks)).details
    points = found["points"]
    assert (points[0]["num_edges"], points[-1]["num_edges"]) == (1, bench.graph.num_edges)
    assert points[-1]["recovered"] == pytest.approx(1)
    for point in points:
        in_order = [point[key] for key in ("median", "quantile_90", "worst")]
        assert in_order == sorted(in_order)
        low, high = point["mean_interval"]
        assert low <= point["mean"] <= high
    logs = torch.tensor([float(point["num_edges"]) for point in points]).log()
    area = torch.trapezoid(torch.tensor([point["mean"] for point in points]), logs)
    wanted = area / (logs[-1] - logs[0])
    assert found["areas"]["distance"] == pytest.approx(wanted.item(), rel=1e-4)


# ------------------------------------------------------------------------------- random circuits


@pytest.mark.parametrize("embedding_writers", [("tok_embeds", "pos_embeds"), ()])
def test_random_circuits_are_connected_and_of_the_size_asked_for(embedding_writers):
    graph = CircuitGraph(4, 6, 3, embedding_writers)
    for size in (5, 40, 200):
        found = [RandomPaths(graph).circuit(size, seed) for seed in range(5)]
        assert len({circuit.edge_set for circuit in found}) == 5
        for circuit in found:
            assert len(circuit) == len(circuit.without_dangling()) == size


def test_paths_lead_from_an_embedding_to_the_output():
    graph = CircuitGraph(3, 2, 1, ("embeds",))
    rng = random.Random(0)
    for _ in range(100):
        path = RandomPaths(graph).path(rng)
        assert path[0][1] == "resid_post"
        assert path[-1][0] == "embeds"
        for (writer, _), (_, reader) in pairwise(path):
            assert writer in graph.nodes_fed_by(reader)


def test_excluded_edges_are_avoided_and_a_graph_may_have_too_few():
    graph = CircuitGraph(1, 2, 2, ("embeds",))
    excluded = {("embeds", "resid_post"), ("a0.h0", "resid_post")}
    circuit = RandomPaths(graph, excluded).circuit(graph.num_edges, seed=0)
    assert not circuit.edge_set & excluded
    assert len(circuit) == graph.num_edges - len(excluded)


def test_the_circuit_of_nodes_has_every_edge_between_them(bench, true):
    found = node_circuit(true)
    assert true.edge_set < found.edge_set
    assert found.nodes == true.nodes
    assert ("tok_embeds", "resid_post") in found
    assert ("tok_embeds", "a0.h0.q") not in found


# ------------------------------------------------------------------------------- specificity


def test_only_the_circuit_that_does_the_task_is_specific(bench, true):
    other = Circuit.from_edges(
        bench.graph, [("tok_embeds", "m0"), ("m0", "resid_post"), ("pos_embeds", "resid_post")]
    )
    found = specificity({"own": true, "other": other}, {"own": bench})
    assert found.findings[0].holds
    on, without = found.matrices().values()
    assert on[0] == [1]
    assert without[1][0] == 1 > without[0][0]
    assert not specificity({"own": other, "other": true}, {"own": bench}).findings[0].holds
    assert not specificity({"own": true, "other": true}, {"own": bench}).findings[0].holds
    assert found.tables()[0].rows == [["own", "1.000"], ["other", f"{on[1][0]:.3f}"]]
    record = json.loads(
        json.dumps({"cells": found.cells, "findings": [each.to_dict() for each in found.findings]})
    )
    assert Specificity.from_dict(record).matrices() == found.matrices()


# ------------------------------------------------------------------------------- stability


def test_equal_scores_are_stable_and_random_ones_agree_by_chance(bench, true):
    ranks = torch.tensor([float(edge in true) for edge in bench.graph.edges])
    same = stability(bench, true, [EdgeScores(bench.graph, ranks)] * 3, "seeds")
    assert same.holds
    assert {row["lowest"] for row in same.details["sizes"]} == {1}
    assert same.details["frequencies"] == {3: 5, 2: 0, 1: 0}
    assert {*map(tuple, same.details["consensus"]["edges"])} == CIRCUIT
    assert same.details["consensus"]["distance"] == same.details["distance"]
    noise = torch.rand(20, bench.graph.num_edges, generator=torch.Generator().manual_seed(0))
    scores = [EdgeScores(bench.graph, row) for row in noise]
    other = stability(bench, true, scores, "seeds")
    assert not other.holds
    for row in other.details["sizes"][-6:]:
        assert row["jaccard"] == pytest.approx(row["by_chance"], abs=0.05)


def test_stability_compares_pairs_at_the_circuits_size(bench, true):
    first, second = (
        EdgeScores(bench.graph, torch.arange(bench.graph.num_edges).roll(shift)) for shift in (0, 2)
    )
    found = stability(bench, true, [first, second], "seeds")
    wanted = overlap(first.circuit(num_edges=5), second.circuit(num_edges=5))["edge_iou"]
    (row,) = (row for row in found.details["sizes"] if row["num_edges"] == 5)
    assert row["lowest"] == row["highest"] == row["jaccard"] == wanted
    assert wanted == 3 / 7


def test_circuits_are_compared_on_prompts_of_other_templates(bench, true):
    broken = without(true, ("a0.h1", "a1.h0.k"))
    half = {pair: "ab"[index % 2] for index, pair in enumerate(bench.pairs)}
    same = other_templates(bench, [true, true], [{"a"}, {"b"}], half)
    assert same.holds and same.interval == (0, 0)
    worse = other_templates(bench, [broken, true], [set(), {"a", "b"}], half)
    of_broken, of_true = map(bench.distance, bench.measure([broken, true]))
    assert not worse.holds
    assert worse.details["distance"] == pytest.approx(of_broken.mean().item())
    assert worse.details["distance_known"] == pytest.approx(of_true.mean().item())
    means = [(of_broken - of_true)[start::2].mean().item() for start in (0, 1)]
    assert worse.interval == pytest.approx(sorted(means))  # each template twice, at the extremes
    new = half | dict.fromkeys(bench.pairs[1::4], "c")  # to both, so there is nothing to compare
    assert other_templates(bench, [true, true], [{"a"}, {"b"}], new).holds
    with pytest.raises(DataError, match="templates"):
        other_templates(bench, [true, true], [{"a", "b"}, {"a", "b"}], new)


# ------------------------------------------------------------------------------- words, commands


def test_table_and_words_name_every_test_and_what_fails(bench, true):
    found = all_findings(bench, with_superfluous(true), num_random=NUM_RANDOM)
    assert [row[0] for row in findings_table(found, "").rows] == [each.name for each in found]
    words = in_words(found)
    assert "Failed: minimality." in words
    for each in found:
        assert each.words in words
        json.dumps(each.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "value", ["bootstrap", "seeds:1", "bootstrap:x", "prompts:3", "templates:1"]
)
def test_repeat_is_checked(value):
    with pytest.raises(ConfigError, match="repeat"):
        SceptConfig(circuits=["runs/a"], repeat=value)


SMALL = ("experiment=ioi", "trainer.steps=3", "trainer.batch_size=4", "task.train=8",
         "task.validation=4", "task.test=6", "num_edges=30")  # fmt: skip
PROGRAM = ("experiment=tracr/reverse", "trainer=every_size", "trainer.steps=3", "cleanup=null",
           "num_edges=9")  # fmt: skip


@pytest.mark.usefixtures("without_pictures")
def test_runs_are_tested_from_the_command_line(tmp_path, capsys, monkeypatch):
    def command(*arguments: object) -> str:
        code, out, err = call(capsys, monkeypatch, *arguments)
        assert code == 0, err
        return out

    run, other = tmp_path / "a", tmp_path / "b"
    for seed, place in enumerate((run, other)):
        command("prune", *PROGRAM, f"seed={seed}", f"run_dir={place}")
    few = ("prompts=4", "random_circuits=3", "repeat=bootstrap:2")
    done = run_cli("test", run, *few)  # in a fresh process
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "test.json").read_text())
    assert [each["name"] for each in result["findings"]][-1] == "stability"
    assert result["words"] in done.stdout
    assert (result["num_prompts"], result["num_random"]) == (4, 3)
    assert (run / "test.png").read_bytes().startswith(b"\x89PNG")
    kept = {path: path.read_bytes() for path in (run / "repeats").iterdir()}
    assert len(kept) == 2
    next(iter(kept)).unlink()  # is learned again, as it was; the other is not
    out = command("test", run, *few, f"output={tmp_path / 'folder'}")
    assert {path: path.read_bytes() for path in (run / "repeats").iterdir()} == kept
    assert result["words"] in out
    assert json.loads((tmp_path / "folder/test.json").read_text()) == result
    command("test", run, other, "prompts=4")
    cells = json.loads((tmp_path / "specificity/test.json").read_text())["cells"]
    names = {(cell["circuit"], cell["prompts"]) for cell in cells}
    assert names == {(a, b) for a in "ab" for b in "ab"}
    assert (tmp_path / "specificity/test.png").exists()
    command("report", tmp_path)
    assert [*(tmp_path / "report").glob("specificity*.svg")]
    assert "Specificity" in (tmp_path / "report/report.html").read_text()
    command("export", other, "num_edges=8")
    command("report", tmp_path)
    assert not [*(tmp_path / "report").glob("specificity*.svg")]
    code, _, err = call(capsys, monkeypatch, "test", run, "repeat=seeds:x")
    assert (code, "repeat" in err) == (2, True)


@pytest.mark.usefixtures("without_pictures")
def test_a_run_is_learned_again_from_halves_of_its_templates(tmp_path, capsys, monkeypatch):
    run, few = tmp_path / "run", ("prompts=6", "random_circuits=2", "repeat=templates:2")
    assert call(capsys, monkeypatch, "prune", *SMALL, f"run_dir={run}")[0] == 0
    learned = []

    def listening(model, pairs, *rest, **settings):
        learned.append(pairs)
        return learn(model, pairs, *rest, **settings)

    monkeypatch.setattr(repeating, "learn", listening)
    code, _, err = call(capsys, monkeypatch, "test", run, *few)
    assert code == 0, err
    records = [json.loads(line) for line in (run / "data.jsonl").read_text().splitlines()]
    template = {record["clean"]: record["template"] for record in records}
    first, second = ({template[pair.text] for pair in pairs} for pairs in learned)
    assert not first & second
    assert sum(map(len, learned)) == 8
    found = json.loads((run / "test.json").read_text())["findings"]
    assert [each["name"] for each in found][-2:] == ["stability", "other templates"]
