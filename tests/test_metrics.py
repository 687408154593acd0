"""Metrics by hand, on a vocabulary of three tokens."""

import math
from dataclasses import replace

import pytest
import torch

from edgeprune.evaluation.evaluate import _summarise
from edgeprune.metrics import kl_per_token, mean_by_example, score
from edgeprune.prompts import Pair, collate

LOG2, LOG3 = math.log(2), math.log(3)


def pair(target, answers=(), distractors=(), contrast=0) -> Pair:
    ids = (0,) * (3 + len(target) - 1)
    return Pair(ids, ids, target, answers, distractors, contrast, "text")


def test_kl_by_hand():
    # p = (1/2, 1/2, 0), q = (1/4, 1/2, 1/4): KL = 1/2 log 2
    reference = torch.tensor([[0.0, 0.0, -1e9]])
    logits = torch.tensor([[0.0, LOG2, 0.0]])
    assert kl_per_token(reference, logits).item() == pytest.approx(LOG2 / 2, abs=1e-6)
    assert kl_per_token(reference, reference).item() == 0
    shifted = kl_per_token(reference, logits + 7)  # logits are known up to a constant
    assert shifted.item() == pytest.approx(LOG2 / 2, abs=1e-6)


def test_means_are_over_tokens_and_then_over_examples():
    batch = collate([pair((1,)), pair((1, 2))])
    assert mean_by_example(torch.tensor([1.0, 2.0, 4.0]), batch).tolist() == [1, 3]


def test_scores_by_hand():
    batch = collate([pair((1,), (1,), (2,)), pair((1, 2), (2,), (0, 1), contrast=1)])
    reference = torch.tensor([[0, LOG3, 0], [0, 9, 0], [0, 0, LOG2]])
    logits = torch.tensor([[0, 0, LOG2], [0, 9, 0], [0, 0, LOG2]])
    full, circuit = score(batch, reference, reference), score(batch, reference, logits)
    assert full.correct.tolist() == [True, True]
    assert full.exact_match.tolist() == [True, True]
    assert full.logit_difference[0].item() == pytest.approx(LOG3)
    # log 2 against log(1 + 1)
    assert full.logit_difference[1].item() == pytest.approx(0, abs=1e-6)
    assert full.probability_difference.tolist() == pytest.approx([3 / 5 - 1 / 5, 0], abs=1e-6)
    assert circuit.correct.tolist() == [False, True]
    assert circuit.exact_match.tolist() == [False, True]
    assert circuit.logit_difference[0].item() == pytest.approx(-LOG2)
    assert circuit.probability_difference[0].item() == pytest.approx(1 / 4 - 1 / 2)
    assert [tokens.tolist() for tokens in circuit.predicted] == [[2], [1, 2]]
    # p = (1/5, 3/5, 1/5), q = (1/4, 1/4, 1/2)
    by_hand = 0.2 * math.log(0.8) + 0.6 * math.log(2.4) + 0.2 * math.log(0.4)
    assert circuit.kl.tolist() == pytest.approx([by_hand, 0], abs=1e-6)


def test_one_wrong_token_of_several_is_wrong():
    batch = collate([pair((1, 2))])
    logits = torch.tensor([[0.0, 1, 0], [0.0, 1, 0]])
    result = score(batch, logits, logits)
    assert result.correct.tolist() == [False]
    assert result.exact_match.tolist() == [True]


def test_any_of_several_answers_is_right():
    batch = collate([pair((1,), (0, 1), (2,))])
    logits = torch.tensor([[2.0, 1, 0]])
    assert score(batch, logits, logits).correct.tolist() == [True]


def test_answers_that_leave_the_target_elsewhere_are_right_there_alone():
    one = replace(pair((1, 2), (2,), (0,), contrast=1), also_right=((0, 2),))
    batch = collate([pair((1,)), one, one, one])
    logits = torch.eye(3)[[1, 2, 2, 1, 2, 2, 1]]  # most likely: 1; 2 2, 1 2, 2 1
    assert score(batch, logits, logits).correct.tolist() == [True, True, True, False]


def test_without_distractors_there_is_no_difference():
    batch = collate([pair((1,)), pair((1,), (1,), (2,))])
    logits = torch.tensor([[0.0, 1, 0], [0.0, 1, 0]])
    assert score(batch, logits, logits).logit_difference.isnan().tolist() == [True, False]


def test_a_difference_is_recovered_on_the_way_from_every_edge_closed_to_the_full_model():
    batch = collate([pair((1,), (1,), (2,))])
    scores = score(batch, *[torch.tensor([[0.0, LOG3, 0.0]])] * 2)
    recovered = _summarise(scores, -LOG3, 3 * LOG3).logit_difference_recovered
    assert recovered == pytest.approx(0.5)
    assert math.isnan(_summarise(scores, LOG3, LOG3).logit_difference_recovered)


def test_a_tie_is_half_right_and_the_mean_has_a_standard_error():
    batch = collate([pair((1,), (1,), (2,))] * 3)
    reference = torch.zeros(3, 3)
    logits = torch.tensor([[0.0, 0, 0], [0, LOG3, 0], [0, 0, LOG3]])
    scores = _summarise(score(batch, reference, logits), 0.0, 1.0)
    assert scores.two_way_accuracy == pytest.approx(0.5)
    apart = math.log(5 / 3) - LOG3 / 3  # of (1, 3, 1) / 5 from three thirds; of a tie 0
    assert scores.kl == pytest.approx(2 / 3 * apart)
    assert scores.kl_standard_error == pytest.approx(apart / 3)
