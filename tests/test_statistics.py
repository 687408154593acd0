"""Intervals and tests of hypotheses: values worked out by hand, false alarms and power."""

import math
import random

import pytest
import torch

from edgeprune.evaluation.statistics import (
    LEVEL,
    benjamini_hochberg,
    binomial_tail,
    bootstrap_interval,
    cluster_interval,
    gaussian_kernel,
    hsic_test,
    mean_interval,
    rank_p_values,
    sign_test,
)

MAX_FALSE_ALARMS = 0.07
"""Of tests at level .05 whose hypothesis holds."""


def test_binomial_tail_by_hand():
    assert binomial_tail(3, 4, 0.5) == pytest.approx(5 / 16)  # 4 + 1 of 16
    assert binomial_tail(0, 7, 0.2) == pytest.approx(1)
    assert binomial_tail(2, 2, 0.1) == pytest.approx(0.01)
    exact = sum(math.comb(2000, k) for k in range(1030, 2001)) / 2**2000
    assert binomial_tail(1030, 2000, 0.5) == pytest.approx(exact)


def test_sign_test_by_hand():
    assert sign_test(9, 10) == pytest.approx(2 * 11 / 1024)  # 10 + 1 of 1024, on both sides
    assert sign_test(1, 10) == sign_test(9, 10)
    assert sign_test(5, 10) == 1
    assert sign_test(0, 0) == sign_test(0, 0, 0.1) == 1
    assert sign_test(3, 3, 0.1) == pytest.approx(0.6**3 + 0.4**3)  # three wins, or three losses
    assert sign_test(0, 3, 0.1) == pytest.approx(0.6**3 + 0.4**3)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_sign_test_has_its_level_for_any_number_of_prompts(margin):
    chance = 0.5 + margin  # the farthest from one half that the hypothesis allows
    for trials in range(1, 60):
        rejected = [wins for wins in range(trials + 1) if sign_test(wins, trials, margin) <= LEVEL]
        size = sum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
                   for k in rejected)  # fmt: skip
        assert size <= LEVEL


def test_bootstrap_interval_of_a_constant_and_of_few_values():
    assert mean_interval(torch.full((10,), 3.0)) == (3, 3)
    # The mean of two resampled values is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4.
    assert mean_interval(torch.tensor([0.0, 1.0])) == (0, 1)


def test_cluster_interval_resamples_whole_clusters():
    # The first twice, both, or the second twice: means 1, 3/4 or 0.
    assert cluster_interval(torch.tensor([1.0, 1, 0, 1]), ["a", "a", "b", "a"]) == (0, 1)

    def is_clear(seed: int) -> bool:  # of 20 clusters that differ from each other by chance
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(20, 1, generator=generator).expand(20, 10).flatten()
        low, high = cluster_interval(values, [str(i // 10) for i in range(200)])
        return low > 0 or high < 0

    assert sum(map(is_clear, range(200))) / 200 <= 0.1


def test_bootstrap_intervals_cover_the_truth():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        values = torch.randn(60, generator=generator).exp()  # skewed, with mean exp(1/2)
        low, high = bootstrap_interval(lambda rows, v=values: v[rows].mean(-1), 60)
        covered += low <= math.exp(0.5) <= high
    assert 0.86 <= covered / 200 <= 0.99


def test_hsic_by_hand():
    # Two groups of two: both kernels are the same after centring, so the criterion is 1. Of the 24
    # orders, 8 keep the groups.
    groups = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    criterion, p = hsic_test(groups, groups)
    assert criterion == pytest.approx(1)
    assert p == pytest.approx(1 / 3, abs=0.08)
    assert hsic_test(groups, torch.ones(4, 4)) == (0, 1)


def test_gaussian_kernel_by_hand():
    kernel = gaussian_kernel(torch.tensor([[0.0], [2.0]]))  # the median distance is 2
    assert kernel.flatten().tolist() == pytest.approx([1, math.exp(-0.5), math.exp(-0.5), 1])
    assert (gaussian_kernel(torch.zeros(3, 2)) == 1).all()


def test_rank_p_values_by_hand():
    found = rank_p_values(torch.tensor([5.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found.tolist() == [0.25, 0.75, 1.0]


def test_benjamini_hochberg_by_hand():
    # Limits .0125, .025, .0375, .05: .035 is within the third, so all before it are rejected.
    assert benjamini_hochberg([0.035, 0.001, 0.03, 0.9]) == [True, True, True, False]
    assert benjamini_hochberg([0.02, 0.03, 0.04, 0.9]) == [False] * 4
    assert benjamini_hochberg([]) == []


def share_rejected(draw, trials: int) -> float:
    """The share of p values at most .05."""
    return sum(draw(seed) <= 0.05 for seed in range(trials)) / trials


def test_false_alarms_and_power_of_the_sign_test():
    def p_value(seed: int, chance: float) -> float:
        rng = random.Random(seed)
        return sign_test(sum(rng.random() < chance for _ in range(100)), 100, 0.1)

    for chance in (0.5, 0.4, 0.6):
        assert share_rejected(lambda seed, c=chance: p_value(seed, c), 400) <= MAX_FALSE_ALARMS
    assert share_rejected(lambda seed: p_value(seed, 0.8), 100) >= 0.95


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_false_alarms_and_power_of_hsic(strength, monkeypatch):
    monkeypatch.setattr("edgeprune.evaluation.statistics.PERMUTATIONS", 99)

    def p_value(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        answers = torch.randint(5, (50,), generator=generator)
        noise = torch.randn(50, 5, generator=generator)
        left = noise + strength * torch.nn.functional.one_hot(answers, 5) * 2
        kernel = (answers[:, None] == answers).double()
        return hsic_test(gaussian_kernel(left), kernel)[1]

    rejected = share_rejected(p_value, 200)
    assert rejected >= 0.95 if strength else rejected <= MAX_FALSE_ALARMS


def test_false_alarms_and_power_of_ranks_with_correction():
    def any_rejected(seed: int, true: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        effects, reference = (torch.randn(n, generator=generator) for n in (20, 100))
        effects[:true] += 8
        rejected = benjamini_hochberg(rank_p_values(effects, reference))
        return 0.0 if any(rejected[true:] if true == 0 else rejected[:true]) else 1.0

    assert share_rejected(lambda seed: any_rejected(seed, 0), 400) <= MAX_FALSE_ALARMS
    assert share_rejected(lambda seed: any_rejected(seed, 10), 100) >= 0.95


def test_false_alarms_of_the_comparison_with_random_circuits():
    """A circuit as good as a random one of the best tenth: at most so many are better."""

    def p_value(seed: int) -> float:
        rng = random.Random(seed)
        as_good = sum(rng.random() < 0.1 for _ in range(100))
        return 1 - binomial_tail(as_good + 1, 100, 0.1)

    assert share_rejected(p_value, 400) <= MAX_FALSE_ALARMS
