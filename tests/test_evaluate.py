"""Evaluation of circuits: known values, batching, ablations and metrics of some prompts only."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_pairs

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.evaluate import evaluate


def test_all_edges_are_the_full_model_and_no_edges_the_empty_circuit(model):
    pairs = random_pairs(20)
    whole = Circuit(model.graph, frozenset(model.graph.edges))
    result = evaluate(model, whole, pairs)
    assert result.circuit.kl == pytest.approx(0, abs=1e-5)
    assert result.circuit.exact_match == result.full.exact_match == 1
    assert result.circuit.logit_difference_recovered == pytest.approx(1, abs=1e-4)
    empty = evaluate(model, Circuit(model.graph, frozenset()), pairs)
    metrics = empty.to_dict()  # None in place of NaN, which does not equal itself
    assert metrics["circuit"] == metrics["empty"]
    # under interchange ablation the empty circuit is the full model on the corrupted prompts
    swapped = [replace(p, clean_ids=p.corrupted_ids, corrupted_ids=p.clean_ids) for p in pairs]
    on_corrupted = evaluate(model, whole, swapped).full
    difference = pytest.approx(on_corrupted.logit_difference, abs=1e-4)
    assert empty.empty.logit_difference == difference
    assert empty.empty.accuracy == on_corrupted.accuracy


def test_rounding_gives_no_negative_kl(model, monkeypatch):
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "edgeprune.metrics.kl_per_token",
        lambda reference, _: -1e-9 * torch.rand(len(reference), generator=noise),
    )
    whole = Circuit(model.graph, frozenset(model.graph.edges))
    result = evaluate(model, whole, random_pairs(20))
    assert (result.circuit.kl, result.worst.kl) == (0, 0)


def test_prompts_without_distractors_do_not_count_in_differences(model):
    with_distractors, others = random_pairs(6), random_pairs(3, seed=1)
    pairs = [*with_distractors, *(replace(p, answer_ids=(), distractor_ids=()) for p in others)]
    some = Circuit.random(model.graph, 60, seed=0)
    results = [evaluate(model, some, p) for p in (pairs, with_distractors)]
    assert [result.num_with_distractors for result in results] == [6, 6]
    assert [result.num_examples for result in results] == [9, 6]
    mixed, alone = (result.circuit for result in results)
    for name in ("logit_difference_recovered", "logit_difference", "two_way_accuracy"):
        assert getattr(mixed, name) == pytest.approx(getattr(alone, name), rel=1e-4)


def test_all_predicted_tokens_of_the_least_faithful_example_are_shown(model):
    """The two texts are equal exactly if the example is an exact match."""
    model.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    some = Circuit.random(model.graph, 200, seed=0)
    found = set()
    for pair in random_pairs(12, predicted=3):
        result = evaluate(model, some, [pair])
        texts = result.worst.full_prediction, result.worst.circuit_prediction
        first, second = ([int(token) for token in text.split()] for text in texts)
        assert len(first) == len(second) == 3
        assert (first == second) == (result.circuit.exact_match == 1)
        found.add(first[0] == second[0] and first != second)
    assert found == {False, True}


def test_an_ablation_is_given_by_object_or_name(model):
    pairs = random_pairs(20)
    some = Circuit.random(model.graph, 60, seed=0)

    def measured(**settings) -> dict:
        return evaluate(model, some, pairs, **settings).to_dict()["circuit"]

    kinds = ("interchange", "zero", "mean")
    found = [measured(ablation=kind) for kind in kinds]
    assert found == [measured(ablation=Ablation(model, kind, pairs)) for kind in kinds]
    assert measured() == found[0]
    assert found[0] != found[1] != found[2] != found[0]
    for wrong in ("noise", ["zero"], None):
        with pytest.raises(ValueError):
            measured(ablation=wrong)


def test_numbers_out_of_range_are_refused(model):
    pairs, some = random_pairs(2), Circuit.random(model.graph, 60, seed=0)
    for ablation in ("interchange", "mean"):
        with pytest.raises(ValueError, match="batch_size=0"):
            evaluate(model, some, pairs, ablation=ablation, batch_size=0)
    with pytest.raises(ValueError, match="head_permuted=-1"):
        evaluate(model, some, pairs, head_permuted=-1)


def test_batch_size_does_not_change_an_evaluation(model):
    pairs = random_pairs(10, length=5) + random_pairs(13, length=9, predicted=2)
    some = Circuit.random(model.graph, 60, seed=0)
    one, other = (evaluate(model, some, pairs, batch_size=size) for size in (3, 64))
    assert one.circuit.kl == pytest.approx(other.circuit.kl, rel=1e-4)
    assert one.circuit.exact_match == other.circuit.exact_match
    assert one.num_examples == 23
