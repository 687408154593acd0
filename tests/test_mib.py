"""The benchmark's areas: by hand, and against those of its own code."""

import json
from dataclasses import replace

import pytest
from conftest import call, random_gpt2, random_pairs
from test_eap_ig import GPT2, models, pairs  # noqa: F401  (fixtures)

from edgeprune.api.mib import submission_name
from edgeprune.circuit import Circuit
from edgeprune.errors import DataError
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.evaluation.mib import (
    SHARES,
    Areas,
    Recovery,
    mib_areas,
    mib_circuits,
    recovery,
)
from edgeprune.formats import read_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.models.load import wrap_model
from edgeprune.paths import TRACR_MODELS
from edgeprune.scores import EdgeScores

RECORDED = GPT2 / "mib_auc.json"
AREAS = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}


@pytest.mark.skipif(not AREAS, reason="recorded areas are missing")
@pytest.mark.parametrize("name", AREAS)
def test_areas_equal_those_of_the_benchmark_s_code(models, pairs, name):  # noqa: F811
    file, absolute, greedy = name.split("|")
    assert greedy == "greedy=False"
    model, expected = models["tokens"], AREAS[name]
    scores = read_circuit(GPT2 / file, model.graph).scores
    scores = replace(scores, by_magnitude=absolute == "absolute=True")
    found = mib_areas(model, scores, pairs)
    assert found.cpr == pytest.approx(expected["area_under_CPR"], abs=1e-4)
    assert found.cmd == pytest.approx(expected["area_from_1_CMD"], abs=1e-4)
    assert found.faithfulness == pytest.approx(expected["faithfulnesses"], abs=1e-4)
    ranked = (scores.values.abs() if scores.by_magnitude else scores.values).sort(descending=True)
    for share, size, wanted in zip(
        SHARES, found.num_edges, expected["weighted_edge_counts"], strict=True
    ):
        cut = int(share * len(ranked.values))
        is_tied = cut < len(ranked.values) and ranked.values[cut - 1] == ranked.values[cut]
        assert size == wanted or is_tied


def test_areas_by_hand():
    nothing = Areas((0,) * 10, (0.0,) * 9 + (1.0,))
    assert nothing.cpr == pytest.approx(0.25)
    assert nothing.cmd == pytest.approx(0.749)
    overshoots = Areas((0,) * 10, (1.5,) * 10)
    assert overshoots.cpr == pytest.approx(1.5 * 0.999)
    assert overshoots.cmd == pytest.approx(0.5 * 0.999)


def test_dead_ends_are_dropped_in_one_pass():
    graph = CircuitGraph(1, 1, 1, ("embeds",))  # 8 edges, of which .5 keeps 4
    m0_out, input_out = ("m0", "resid_post"), ("embeds", "resid_post")
    top = {("a0.h0", "m0"), ("a0.h0", "resid_post"), m0_out, input_out}
    scores = EdgeScores(graph, [float(edge in top) for edge in graph.edges])
    kept = mib_circuits(scores)[-2]
    assert kept.edge_set == {m0_out, input_out}  # none enters a0; m0 counted as entered by it
    assert kept.without_dangling().edge_set == {input_out}
    assert mib_circuits(scores)[-1] == Circuit(graph, frozenset(graph.edges))


def test_faithfulness_is_the_share_of_the_mean_logit_difference():
    model, prompts = wrap_model(random_gpt2()), random_pairs(6)
    scores = EdgeScores(model.graph, range(model.graph.num_edges))
    found = mib_areas(model, scores, prompts)
    half = evaluate(model, scores.circuit(num_edges=model.graph.num_edges // 2), prompts)
    full, empty = half.full.logit_difference, half.empty.logit_difference
    expected = (half.circuit.logit_difference - empty) / (full - empty)
    assert found.faithfulness[8] == pytest.approx(expected, abs=1e-5)
    assert found.faithfulness[9] == pytest.approx(1, abs=1e-5)
    bare = [replace(pair, distractor_ids=(), answer_ids=()) for pair in prompts]
    with pytest.raises(DataError, match="distractor"):
        mib_areas(model, scores, bare)


def test_the_area_under_the_roc_curve_by_hand():
    graph = CircuitGraph(1, 1, 1, ("embeds",))  # 8 edges: 3 into the head, 2 into m0, 3 out
    values = {("embeds", "resid_post"): 8, ("m0", "resid_post"): 7, ("embeds", "m0"): 6,
              ("a0.h0", "m0"): -5}  # fmt: skip
    scores = EdgeScores(graph, [values.get(edge, 0) for edge in graph.edges], by_magnitude=True)
    inner = Circuit.from_edges(graph, [("embeds", "m0"), ("a0.h0", "m0")])
    found = recovery(scores, inner)
    assert found.auroc == pytest.approx(4 / 6)  # each is above 4 of the 6 others
    # Greedy circuits of 1, 2, 4 and 8 edges have 0, 0, 1 and 2 of the 2 edges, and 1, 1, 2 and 6 of
    # the 6 others: of two, m0's output is a dead end, and of four, the head's.
    assert found.interpbench == pytest.approx(1 / 6 * 0.25 + 4 / 6 * 0.75)
    signed = EdgeScores(graph, scores.values)
    assert recovery(signed, inner).auroc == pytest.approx((4 + 0) / 12)
    tied = EdgeScores(graph, [1.0] * 8)
    assert recovery(tied, inner).auroc == 0.5
    top = Circuit.from_edges(graph, list(values)[:3])
    assert recovery(scores, top) == Recovery(1.0, 1.0)
    for impossible in (Circuit(graph, frozenset()), Circuit(graph, frozenset(graph.edges))):
        with pytest.raises(DataError, match="true circuit"):
            recovery(scores, impossible)


def test_rankings_are_compared_with_the_true_edges_of_compiled_programs(
    tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    settings = ("model=tracr", "model.name=neighbours", "model.path=tracr/neighbours", "task=tracr")
    attribute = ("attribute", *settings, "method=exact", f"run_dir={run}", "sparsity=0.7")
    assert call(capsys, monkeypatch, *attribute)[0] == 0
    code, out, err = call(capsys, monkeypatch, "mib", run)
    assert code == 0, err
    record = json.loads((run / "mib-test.json").read_text())["by |score|"]
    assert f"{record['auroc']:.3f}" in out and "CPR" not in out
    truth = json.loads((TRACR_MODELS / "neighbours/ground_truth_edges.json").read_text())
    edges = tmp_path / "edges.json"
    edges.write_text(json.dumps(truth["edges_patching"]))
    (run / "mib-test.json").unlink()
    assert call(capsys, monkeypatch, "mib", run, f"truth={edges}")[0] == 0
    assert json.loads((run / "mib-test.json").read_text())["by |score|"] == record


@pytest.mark.parametrize(
    ("dataset", "model", "wanted"),
    [
        ("arc_easy", "google/gemma-2-2b", "arc-easy_gemma2"),
        ("arc-easy", "models/Llama-3.1-8B", "arc-easy_llama3"),
        ("copycolors_mcqa", "Qwen/Qwen2.5-0.5B", "mcqa_qwen2.5"),
        ("copycolors-mcqa", "gpt2", "mcqa_gpt2"),
    ],
)
def test_submissions_are_named_as_the_leaderboard_reads_them(dataset, model, wanted):
    assert submission_name(dataset, model) == wanted


def test_the_command_measures_a_graph_file_and_writes_a_submission(tmp_path, capsys, monkeypatch):
    submission = tmp_path / "submission"
    run = tmp_path / "run"
    small = ("task.train=16", "task.validation=8", "task.test=8", f"run_dir={run}")
    settings = ("experiment=ioi", "method=eap", *small)
    assert call(capsys, monkeypatch, "attribute", *settings)[0] == 0
    code, out, err = call(capsys, monkeypatch, "mib", run, f"output={submission}")
    assert code == 0, err
    record = json.loads((run / "mib-test.json").read_text())
    assert record["by score"]["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
    assert f"{record['by |score|']['cpr']:.3f}" in out
    # each folder is a whole submission: one file of scores, or nine circuits
    (importances,) = (submission / "importances/ioi_embedded").iterdir()
    circuits = sorted((submission / "circuits/ioi_embedded").iterdir(), key=lambda p: float(p.stem))
    total = read_circuit(importances).circuit.graph.num_edges
    sizes = [len(read_circuit(path).circuit) for path in circuits]
    limits = [float(path.stem) * total for path in circuits]
    assert len(sizes) == 9 and all(map(float.__le__, map(float, sizes), limits))
    assert read_circuit(importances).scores is not None
    # from the submission alone, the same areas
    args = ("mib", importances, "model=embedded", f"task.path={run}/data.jsonl", "task=custom",
            f"output={submission}")  # fmt: skip
    code, again, err = call(capsys, monkeypatch, *args)
    assert code == 0, err
    assert f"{record['by |score|']['cpr']:.3f}" in again
    assert {path.name for path in (submission / "importances").iterdir()} == {
        "ioi_embedded", "data_embedded",
    }  # fmt: skip
    # learned scores, of which the larger is the stronger, have one ranking, which is measured once
    scores, measured = EdgeScores.load(run / "scores.safetensors"), []
    EdgeScores(scores.graph, scores.values).save(run / "scores.safetensors")

    def counting(*args, **settings):
        measured.append(args)
        return mib_areas(*args, **settings)

    monkeypatch.setattr("edgeprune.api.mib.mib_areas", counting)
    assert call(capsys, monkeypatch, "mib", run)[0] == 0
    record = json.loads((run / "mib-test.json").read_text())
    assert record["by score"] == record["by |score|"]
    assert len(measured) == 1
