"""Evaluating a circuit next to the full model and the empty circuit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_pairs
from test_micro_model import CIRCUIT, induction_pairs, micro_model

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import ConfigError
from edgeprune.evaluation.evaluate import describe, evaluate, evaluation_table
from edgeprune.metrics import METRICS


def full_circuit(model) -> Circuit:
    return Circuit(model.graph, frozenset(model.graph.edges))


def test_all_edges_are_the_full_model_and_no_edges_the_model_on_corrupted_prompts(model):
    pairs = random_pairs(20)
    result = evaluate(model, full_circuit(model), pairs)
    assert result.circuit.kl == pytest.approx(0, abs=1e-5)
    assert result.circuit.exact_match == result.full.exact_match == 1
    assert result.circuit.logit_difference_recovered == pytest.approx(1, abs=1e-4)
    empty = evaluate(model, Circuit(model.graph, frozenset()), pairs)
    values = empty.to_dict()  # NaN, which equals nothing, is None here
    assert values["circuit"] == values["empty"]
    swapped = [replace(p, clean_ids=p.corrupted_ids, corrupted_ids=p.clean_ids) for p in pairs]
    on_corrupted = evaluate(model, full_circuit(model), swapped).full
    assert empty.empty.logit_difference == pytest.approx(on_corrupted.logit_difference, abs=1e-4)
    assert empty.empty.accuracy == on_corrupted.accuracy


def test_rounding_errors_do_not_make_kl_negative(model, monkeypatch):
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "edgeprune.metrics.kl_per_token",
        lambda reference, _: -1e-9 * torch.rand(len(reference), generator=noise),
    )
    result = evaluate(model, full_circuit(model), random_pairs(20))
    assert (result.circuit.kl, result.worst.kl) == (0, 0)


def test_prompts_without_distractors_do_not_count_for_metrics_that_need_them(model):
    with_distractors, others = random_pairs(6), random_pairs(3, seed=1)
    pairs = [*with_distractors, *(replace(p, answer_ids=(), distractor_ids=()) for p in others)]
    some = Circuit.random(model.graph, 60, seed=0)
    results = [evaluate(model, some, p) for p in (pairs, with_distractors)]
    assert [result.num_with_distractors for result in results] == [6, 6]
    assert [result.num_examples for result in results] == [9, 6]
    for name, metric in METRICS.items():
        if metric.needs_distractors:
            mixed, alone = (result.circuit[name] for result in results)
            assert mixed == pytest.approx(alone, rel=1e-4)


def test_the_worst_example_has_the_largest_kl_and_the_text_of_all_predicted_tokens(model):
    model.tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    some = Circuit.random(model.graph, 200, seed=0)
    pairs = [replace(p, text=str(i)) for i, p in enumerate(random_pairs(12, predicted=3))]
    alone = [evaluate(model, some, [pair]) for pair in pairs]
    worst = max(alone, key=lambda result: result.circuit.kl).worst
    found = evaluate(model, some, pairs, batch_size=5).worst
    assert found.text == worst.text
    assert found.kl == pytest.approx(worst.kl, rel=1e-4)
    for result in alone:
        texts = result.worst.full_prediction, result.worst.circuit_prediction
        assert [len(text.split("|")) for text in texts] == [3, 3]
        assert (texts[0] == texts[1]) == (result.circuit.exact_match == 1)


def test_an_ablation_can_be_named(model):
    pairs, some = random_pairs(20), Circuit.random(model.graph, 60, seed=0)
    found = []
    for kind in ("interchange", "zero", "mean"):
        found.append(evaluate(model, some, pairs, ablation=kind).circuit)
        own = Ablation(model, kind, pairs)
        assert found[-1].kl == evaluate(model, some, pairs, ablation=own).circuit.kl
    assert evaluate(model, some, pairs).circuit.kl == found[0].kl
    assert len({metrics.kl for metrics in found}) == 3
    with pytest.raises(ConfigError, match="noise"):
        evaluate(model, some, pairs, ablation="noise")


def test_batch_size_does_not_change_an_evaluation(model):
    pairs = random_pairs(10, length=5) + random_pairs(13, length=9, predicted=2)
    some = Circuit.random(model.graph, 60, seed=0)
    one, other = (evaluate(model, some, pairs, batch_size=size) for size in (3, 64))
    assert one.circuit.kl == pytest.approx(other.circuit.kl, rel=1e-4)
    assert one.circuit.exact_match == other.circuit.exact_match
    assert one.num_examples == 23


def test_head_permuted_is_the_mean_over_permuted_circuits():
    model, pairs = micro_model(), induction_pairs(20, seed=0)
    true = Circuit.from_edges(model.graph, CIRCUIT)
    result = evaluate(model, true, pairs, head_permuted=3)
    alone = [evaluate(model, true.head_permuted(seed), pairs).circuit.kl for seed in range(3)]
    assert result.head_permuted.kl == pytest.approx(sum(alone) / 3)
    assert evaluate(model, true, pairs).to_dict()["head_permuted"] is None


def test_table_and_description_tell_what_was_measured():
    model, pairs = micro_model(), induction_pairs(20, seed=0)
    true = Circuit.from_edges(model.graph, CIRCUIT)
    result = evaluate(model, true, pairs)
    table = evaluation_table(result, "title")
    labels = {metric.label for metric in METRICS.values()} - {METRICS["error"].label}
    assert {row[0] for row in table.rows} == labels
    assert {len(row) for row in table.rows} == {len(table.columns)} == {4}
    text = describe(result, true)
    for part in (f"5 of {model.graph.num_edges}", "100.0%", "2 of 4 heads", "0 of 2 MLPs"):
        assert part in text
    assert describe(result, Circuit(model.graph, frozenset())).endswith("0 of 2 MLPs.")
    permuted = evaluate(model, true, pairs, head_permuted=3)
    assert f"{permuted.head_permuted.exact_match:.1%}" in describe(permuted, true)
