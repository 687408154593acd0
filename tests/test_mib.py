"""The benchmark's areas: by hand, and against those of its own code."""

import json
from dataclasses import replace

import pytest
from conftest import call, random_gpt2, random_pairs
from test_eap_ig import GPT2, models, pairs  # noqa: F401  (fixtures)

from edgeprune.circuit import Circuit
from edgeprune.errors import DataError
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.evaluation.mib import SHARES, Areas, mib_areas, mib_circuits
from edgeprune.formats import read_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.models.load import wrap_model
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


def test_the_command_measures_a_graph_file_and_writes_a_submission(tmp_path, capsys, monkeypatch):
    submission = tmp_path / "ioi"
    run = tmp_path / "run"
    small = ("task.train=16", "task.validation=8", "task.test=8", f"run_dir={run}")
    settings = ("experiment=ioi", "method=eap", "metric=logit_difference", *small)
    assert call(capsys, monkeypatch, "attribute", *settings)[0] == 0
    code, out, err = call(capsys, monkeypatch, "mib", run, f"output={submission}")
    assert code == 0, err
    record = json.loads((run / "mib-test.json").read_text())
    assert record["by score"]["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
    assert f"{record['by |score|']['cpr']:.3f}" in out
    assert len(list((submission / "circuits").iterdir())) == 9
    file = read_circuit(submission / "importances.json")
    assert file.scores is not None
    # from the submission alone, the same areas
    args = ("mib", submission / "importances.json", "model=embedded", f"task.path={run}/data.jsonl")
    code, again, err = call(capsys, monkeypatch, *args)
    assert code == 0, err
    assert f"{record['by |score|']['cpr']:.3f}" in again
