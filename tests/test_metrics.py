"""Metrics by hand, on a vocabulary of three tokens."""

import math
from dataclasses import replace

import pytest
import torch

from edgeprune.config import OBJECTIVES as CHOICES
from edgeprune.metrics import (
    METRICS,
    OBJECTIVES,
    ExampleMetrics,
    Metrics,
    distance_by_example,
    kl_per_token,
    measure,
)
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


def test_kl_has_the_bits_of_its_formula():
    torch.manual_seed(0)
    reference, logits = 5 * torch.randn(2, 40, 1000)
    logits.requires_grad_()
    log_p, log_q = (x.log_softmax(-1) for x in (reference, logits))
    formula = (log_p.exp() * (log_p - log_q)).sum(-1)
    got = kl_per_token(reference, logits)
    assert torch.equal(got, formula)
    grads = [torch.autograd.grad(kl.square().sum(), logits)[0] for kl in (got, formula)]
    assert torch.equal(*grads)


def test_means_are_over_tokens_and_then_over_examples():
    batch = collate([pair((1,)), pair((1, 2))])
    reference, logits = torch.randn(2, 3, 5)
    first, second, third = kl_per_token(reference, logits).tolist()
    found = distance_by_example(batch, reference, logits)
    assert found.tolist() == pytest.approx([first, (second + third) / 2])


def test_examples_by_hand():
    batch = collate([pair((1,), (1,), (2,)), pair((1, 2), (2,), (0, 1), contrast=1)])
    reference = torch.tensor([[0, LOG3, 0], [0, 9, 0], [0, 0, LOG2]])
    logits = torch.tensor([[0, 0, LOG2], [0, 9, 0], [0, 0, LOG2]])
    full, circuit = measure(batch, reference, reference), measure(batch, reference, logits)
    assert full.correct.tolist() == full.exact_match.tolist() == [True, True]
    # the second: log 2 against log(1 + 1)
    assert full.logit_difference.tolist() == pytest.approx([LOG3, 0], abs=1e-6)
    assert full.probability_difference.tolist() == pytest.approx([3 / 5 - 1 / 5, 0], abs=1e-6)
    assert circuit.correct.tolist() == circuit.exact_match.tolist() == [False, True]
    assert circuit.logit_difference[0].item() == pytest.approx(-LOG2)
    assert circuit.probability_difference[0].item() == pytest.approx(1 / 4 - 1 / 2)
    assert [tokens.tolist() for tokens in circuit.predicted] == [[2], [1, 2]]
    # p = (1/5, 3/5, 1/5), q = (1/4, 1/4, 1/2)
    by_hand = 0.2 * math.log(0.8) + 0.6 * math.log(2.4) + 0.2 * math.log(0.4)
    assert circuit.kl.tolist() == pytest.approx([by_hand, 0], abs=1e-6)


def test_an_answer_that_leaves_the_target_at_another_token_is_right_only_there():
    one = replace(pair((1, 2), (2,), (0,), contrast=1), also_right=((0, 2),))
    batch = collate([pair((1,)), one, one, one])
    logits = torch.eye(3)[[1, 2, 2, 1, 2, 2, 1]]  # predictions: 1; 2 2, 1 2, 2 1
    assert measure(batch, logits, logits).correct.tolist() == [True, True, True, False]


def measure_each(*logits: list[float]) -> list[ExampleMetrics]:
    """One example each, whose answer is token 1 and whose distractor is token 2."""
    batch = collate([pair((1,), (1,), (2,))])
    return [measure(batch, torch.zeros(1, 3), torch.tensor([values])) for values in logits]


def test_examples_without_distractors_do_not_count_where_these_are_needed():
    batch = collate([pair((1,)), pair((1,), (1, 0)), pair((1,), (1,), (2,))])
    logits = torch.tensor([[0.0, 1, 0]] * 3)
    examples = measure(batch, logits, logits)
    assert examples.logit_difference.isnan().tolist() == [True, True, False]
    metrics = Metrics.of(examples, examples, examples)
    assert (metrics.accuracy, metrics.two_way_accuracy, metrics.logit_difference) == (1, 1, 1)


def test_recovered_logit_difference_goes_from_the_empty_circuit_to_the_full_model():
    examples, full, empty = measure_each([0.0, LOG3, 0.0], [0, 3 * LOG3, 0], [0, 0, LOG3])
    recovered = Metrics.of(examples, full, empty).logit_difference_recovered
    assert recovered == pytest.approx(0.5)
    assert math.isnan(Metrics.of(examples, full, full).logit_difference_recovered)


def test_a_tie_counts_half_and_kl_has_a_standard_error():
    examples = ExampleMetrics.concatenate(
        measure_each([0.0, 0.0, 0.0], [0.0, LOG3, 0.0], [0.0, 0.0, LOG3])
    )
    metrics = Metrics.of(examples, examples, examples)
    assert metrics.two_way_accuracy == pytest.approx(0.5)
    kl = math.log(5 / 3) - LOG3 / 3  # of (1, 3, 1) / 5 from three thirds; 0 for the tie
    assert metrics.kl == pytest.approx(2 / 3 * kl)
    assert metrics.kl_standard_error == pytest.approx(kl / 3)


# ------------------------------------------------------------------------------------- objectives


def objective(name: str, batch, reference, logits) -> float:
    return OBJECTIVES[name](batch, torch.tensor(reference), torch.tensor(logits)).item()


def test_the_choices_of_the_setting_are_the_objectives():
    assert set(CHOICES) == set(OBJECTIVES)


def test_objectives_by_hand():
    """One example of one token, and one of two, whose second has two distractors."""
    batch = collate([pair((1,), (1,), (2,)), pair((1, 2), (2,), (0, 1), contrast=1)])
    reference = [[0, LOG3, 0], [0, 0, 0], [0, 0, 0]]
    logits = [[0, 0, LOG2], [0, LOG2, 0], [LOG2, 0, LOG3]]
    # -log p of the targets: of (1, 1, 2) / 4; of (1, 2, 1) / 4 and of (2, 1, 3) / 6
    wanted = (math.log(4) + (LOG2 + LOG2) / 2) / 2
    assert objective("cross_entropy", batch, reference, logits) == pytest.approx(wanted)
    # logit differences: -log 2 and log 3 - log(2 + 1); of the full model: log 3 and -log 2
    wanted = ((LOG2 + LOG3) ** 2 + LOG2**2) / 2
    assert objective("logit_difference", batch, reference, logits) == pytest.approx(wanted)
    wanted = LOG2 / 2
    assert objective("max_logit_difference", batch, reference, logits) == pytest.approx(wanted)
    # (1, 3, 1) / 5 from (1, 1, 2) / 4; thirds from (1, 2, 1) / 4 and from (2, 1, 3) / 6
    kl = [
        0.2 * math.log(0.8) + 0.6 * math.log(2.4) + 0.2 * math.log(0.4),
        (2 * math.log(4 / 3) + math.log(2 / 3)) / 3,
        (math.log(1) + math.log(2) + math.log(2 / 3)) / 3,
    ]
    wanted = (kl[0] + (kl[1] + kl[2]) / 2) / 2
    assert objective("kl", batch, reference, logits) == pytest.approx(wanted, abs=1e-6)


def test_several_answers_and_distractors_count_by_their_summed_probability():
    """Examples have different numbers of them, so batches pad them; one distractor is token 0."""
    batch = collate([pair((1,), (1, 3), (0,)), pair((2,), (2,), (0, 1, 3)), pair((0,), (0,), (3,))])
    logits = [[LOG2, LOG3, 0, 0], [0, 0, LOG3, 0], [LOG3, 0, 0, LOG2]]
    differences = [math.log(4 / 2), 0, math.log(3 / 2)]  # (3 + 1) / 2, 3 / (1 + 1 + 1), 3 / 2
    found = measure(batch, torch.tensor(logits), torch.tensor(logits))
    assert found.logit_difference.tolist() == pytest.approx(differences, abs=1e-6)
    mean = sum(differences) / 3
    zeros = [[0.0] * 4] * 3
    assert objective("max_logit_difference", batch, zeros, logits) == pytest.approx(-mean)
    full = [LOG2, -LOG3, 0]  # with equal logits: 2 answers against 1, 1 against 3, 1 against 1
    wanted = sum((a - b) ** 2 for a, b in zip(differences, full, strict=True)) / 3
    assert objective("logit_difference", batch, zeros, logits) == pytest.approx(wanted)
    p = [(4 - 2) / 7, 0, (3 - 2) / 7]
    assert found.probability_difference.tolist() == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_have_the_gradient_of_their_values(name):
    """In the direction of the gradient, and finite for padded answers and distractors."""
    torch.manual_seed(0)
    batch = collate([pair((1, 2), (2, 3), (0,), 1), pair((4,), (4,), (1, 2, 3))])
    reference, logits = torch.randn(2, 3, 5)
    logits.requires_grad_()
    value = OBJECTIVES[name](batch, reference, logits)
    (gradient,) = torch.autograd.grad(value, logits)
    step = 1e-2 * gradient / gradient.norm()
    up, down = (OBJECTIVES[name](batch, reference, logits.detach() + s) for s in (step, -step))
    assert (up - down).item() / 2e-2 == pytest.approx(gradient.norm().item(), rel=1e-2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.107, "0.107"), (12.34, "12.3"), (1234.5, "1234"), (-0.5, "-0.500"), (1e-9, "0"),
     (3e-6, "0.000003"), (0.0, "0"), (math.inf, "inf"), (math.nan, "–"), (None, "–")],
)  # fmt: skip
def test_a_metric_without_a_fixed_format_shows_three_digits(value, text):
    assert METRICS["kl"].text(value) == text
