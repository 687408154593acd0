"""Intervals and tests of hypotheses: exact formulas and resampling, deterministic given a seed."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.05
"""Level of all tests: the largest p value at which a hypothesis is rejected."""
RESAMPLES = 2000
"""Number of bootstrap samples of an interval."""
PERMUTATIONS = 499
"""Number of permutations of a test: the smallest p value is 1 / 500."""


def bootstrap_interval(statistic: Callable[[Tensor], Tensor], count: int) -> tuple[float, float]:
    """95 % percentile interval of a statistic over resampled examples (Efron 1979).

    Args:
        statistic: maps indices of examples, [resample, count], to values, [resample].
        count: number of examples.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(count, (RESAMPLES, count), generator=generator)
    tails = torch.tensor([LEVEL / 2, 1 - LEVEL / 2], dtype=torch.float64)
    low, high = statistic(rows).double().quantile(tails).tolist()
    return low, high


def mean_interval(values: Tensor) -> tuple[float, float]:
    """`bootstrap_interval` of the mean of [example]."""
    return bootstrap_interval(lambda rows: values[rows].mean(-1), len(values))


def cluster_interval(values: Tensor, clusters: Sequence[str]) -> tuple[float, float]:
    """`bootstrap_interval` of the mean of [example], with whole clusters of examples resampled.

    For statements about clusters, whose examples are not independent of each other. `clusters` has
    the name of each example's cluster.
    """
    numbers = {name: number for number, name in enumerate(sorted({*clusters}))}
    index = torch.tensor([numbers[name] for name in clusters])
    sums = values.new_zeros(len(numbers)).index_add(0, index, values)  # [cluster]
    counts = index.bincount()
    return bootstrap_interval(lambda rows: sums[rows].sum(-1) / counts[rows].sum(-1), len(sums))


class Difference(NamedTuple):
    """A mean difference between two models over prompts, and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(a: Tensor, b: Tensor) -> Difference:
    """The mean of a - b over prompts, [prompt] each, and its interval."""
    difference = a.double() - b.double()
    return Difference(difference.mean().item(), *mean_interval(difference))


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """P(X >= successes) for X ~ Binomial(trials, chance), 0 < chance < 1; exact."""
    return min(1.0, sum(_binomial(k, trials, chance) for k in range(successes, trials + 1)))


def _binomial(k: int, n: int, p: float) -> float:
    """P(X = k), through logarithms, since the coefficients overflow."""
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))


def sign_test(wins: int, trials: int, margin: float = 0.0) -> float:
    """P value of the hypothesis that a win's probability is within `margin` of one half.

    The probability that wins or losses are at least as many as the more frequent of them, if a win
    has probability 1/2 + margin; exact. Leave ties out of `trials`. The p value of no trials is 1.
    """
    most = max(wins, trials - wins)
    return min(1.0, sum(binomial_tail(most, trials, 0.5 + m) for m in (margin, -margin)))


class McNemar(NamedTuple):
    """McNemar's exact test of whether two models are right equally often."""

    only_a: int  # prompts that only the first gets right
    only_b: int
    p: float  # two-sided


def mcnemar(a: Tensor, b: Tensor) -> McNemar:
    """Compare what two models get right on the same prompts; 1 is right and 0 wrong, [prompt] each.

    If both are right equally often, a prompt that only one of them gets right is as likely to be
    the first's as the second's. So this is the sign test of these prompts.
    """
    a, b = a > 0.5, b > 0.5
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_a, only_b, sign_test(only_a, only_a + only_b))


def hsic_test(kernel_a: Tensor, kernel_b: Tensor) -> tuple[float, float]:
    """Test whether two quantities are independent, by permutations.

    The Hilbert-Schmidt independence criterion, tr(K H L H) / n^2 with H = I - 1/n (Gretton et al.
    2005), is 0 if nothing in the one can be predicted from the other.

    Args:
        kernel_a, kernel_b: [example, example], symmetric positive semi-definite kernels.

    Returns:
        The criterion, normalised to [0, 1] by that of each kernel with itself (0 if one of the
        quantities is constant), and the p value.
    """
    count = len(kernel_a)
    a, b = (_centred(kernel.double()) for kernel in (kernel_a, kernel_b))
    scale = (a.norm() * b.norm()).item()
    if scale <= 1e-12 * count**2:
        return 0.0, 1.0
    generator = torch.Generator().manual_seed(0)
    observed, as_large = (a * b).sum().item() / scale, 0
    for _ in range(PERMUTATIONS):
        order = torch.randperm(count, generator=generator)
        as_large += (a * b[order][:, order]).sum().item() / scale >= observed - 1e-12
    return observed, (1 + as_large) / (1 + PERMUTATIONS)


def _centred(kernel: Tensor) -> Tensor:
    """H K H."""
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def gaussian_kernel(values: Tensor) -> Tensor:
    """exp(-d^2 / (2 m^2)) of vectors [example, feature], with m their median distance > 0."""
    distances = torch.cdist(values.double(), values.double())
    positive = distances[distances > 0]
    if not len(positive):
        return torch.ones_like(distances)
    return torch.exp(-distances.square() / (2 * positive.median().square()))


def rank_p_values(values: Tensor, reference: Tensor) -> Tensor:
    """P values of the hypothesis that each value was drawn in the same way as the reference.

    (1 + number of reference values at least as large) / (1 + number of reference values), [value].
    """
    at_least = (reference >= values[:, None]).sum(-1)
    return (1 + at_least).double() / (1 + len(reference))


def benjamini_hochberg(p_values: Sequence[float] | Tensor) -> list[bool]:
    """Which hypotheses to reject, so that the expected share of false rejections is at most `LEVEL`
    (Benjamini and Hochberg 1995).
    """
    p_values = torch.as_tensor(p_values, dtype=torch.float64)
    order, number = p_values.argsort(), len(p_values)
    limits = LEVEL * torch.arange(1, number + 1, dtype=torch.float64) / number
    within = (p_values[order] <= limits + 1e-12).nonzero()
    rejected = torch.zeros(number, dtype=torch.bool)
    if len(within):
        rejected[order[: int(within[-1]) + 1]] = True
    return rejected.tolist()
