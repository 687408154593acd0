"""Comparing two models on the same prompts: paired bootstrap intervals and McNemar's test."""

from collections.abc import Sequence
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """A mean difference between two models over prompts, and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: Tensor, b: Tensor, *, level: float = 0.95, num_samples: int = 2000, seed: int = 0
) -> Difference:
    """The mean of a - b over prompts, with a percentile interval from resampled prompts.

    Args:
        a, b: a number per prompt, [prompt] each, of two models on the same prompts.
        level: the interval's coverage, a fraction.
        num_samples: number of times as many prompts are drawn with replacement.
    """
    difference = a.double() - b.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (num_samples, len(difference)), generator=generator)
    means = difference[drawn].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(difference.mean().item(), low, high)


class McNemar(NamedTuple):
    """McNemar's exact test of whether two models are right equally often."""

    only_a: int  # prompts that only the first gets right
    only_b: int
    p: float  # two-sided


def mcnemar(a: Tensor, b: Tensor) -> McNemar:
    """Compare what two models get right on the same prompts; 1 is right and 0 wrong, [prompt] each.

    If both are right equally often, each prompt that only one gets right is as likely to be either
    one's, so the smaller count is at most k with probability sum over i <= k of C(n, i) / 2^n.
    """
    a, b = a > 0.5, b > 0.5
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**n))


def rank_p(value: float, others: Sequence[float], *, higher: bool) -> float:
    """The probability that a value drawn like the others is as extreme, 1 / (1 + others) or more.

    `higher` says which side is extreme.
    """
    beyond = sum(other >= value if higher else other <= value for other in others)
    return (1 + beyond) / (1 + len(others))


def as_dict(value: Difference | McNemar | None) -> dict[str, Any] | None:
    """JSON values."""
    return None if value is None else value._asdict()
