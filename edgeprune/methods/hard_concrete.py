"""Hard-concrete gates (Louizos, Welling and Kingma 2018, arXiv:1712.01312), as pure functions.

A gate is a number in [0, 1]; 1 carries the clean value, 0 the corrupted one. Its distribution is
set by one number, log alpha: a sigmoid of log alpha plus logistic noise, stretched a little beyond
[0, 1] and clamped, so that exact zeros and ones have positive probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BETA = 2 / 3
"""Temperature."""
GAMMA, ZETA = -0.1, 1.1
"""Stretch limits."""
EPSILON = 1e-6
"""Probabilities and noise stay this far from 0 and 1."""
DETERMINISTIC_SCALE = 0.8
"""Steepness of deterministic gates, as published."""
SEARCH_TOLERANCE = 1e-5
"""Width at which the binary search for a threshold stops, as published."""
LARGEST_SHIFT = 64.0
"""Of log alpha, to reach a sparsity."""
HALVINGS = 24
"""Of the range in which such a shift is sought."""
QUADRATURE = 16
"""Points of an integral over a gate's values."""
FAINT = 0.01
"""Nats; while all gates together matter less than this, none of them has to move."""


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """clamp(sigmoid((log u - log(1 - u) + log alpha) / beta) * (zeta - gamma) + gamma, 0, 1).

    Args:
        log_alpha: any shape.
        uniform: noise of the same shape, in [EPSILON, 1 - EPSILON].
    """
    logistic = torch.log(uniform) - torch.log1p(-uniform)
    concrete = torch.sigmoid((logistic + log_alpha) / BETA)
    return torch.clamp(concrete * (ZETA - GAMMA) + GAMMA, 0, 1)


def shift_to_sparsity(log_alpha: Tensor, uniform: Tensor, target: float) -> Tensor:
    """What to add to all log alphas for gates sampled with this noise to have this sparsity.

    The least of such numbers, by bisection, so without waiting for the device: where nearly all
    gates are 0 or 1, slopes say little.

    Args:
        log_alpha, uniform: see `sample`.
        target: sparsity, in [0, 1].
    """

    def missing(shift: Tensor) -> Tensor:
        return sparsity(sample(log_alpha + shift, uniform)) - target

    short, enough = log_alpha.new_zeros(()), log_alpha.new_full((), LARGEST_SHIFT)
    sign = torch.sign(missing(short))
    for _ in range(HALVINGS):
        middle = (short + enough) / 2
        reaches = sign * missing(sign * middle) <= 0
        short, enough = torch.where(reaches, short, middle), torch.where(reaches, middle, enough)
    return sign * enough


def mean_slope(log_alpha: Tensor) -> Tensor:
    """The derivative of the expected gate by log alpha; any shape.

    The expected gate is the integral over t from 0 to 1 of the probability that a gate is above t.
    """
    t = (
        torch.arange(QUADRATURE, device=log_alpha.device, dtype=log_alpha.dtype) + 0.5
    ) / QUADRATURE
    needed = BETA * torch.logit((t - GAMMA) / (ZETA - GAMMA))  # log alpha and noise for a gate of t
    above = torch.sigmoid(log_alpha[..., None] - needed)
    return (above * (1 - above)).mean(-1)


def project(grad_gates: Tensor, log_alpha: Tensor) -> Tensor:
    """The gradient by log alphas whose shift keeps the gates' sparsity, to scale.

    With mean slopes in place of those of the sample, gates learn in every step, not only where they
    happen to be half open. From each gate's gradient comes off the Lagrange multiplier of a given
    sparsity: what one more open gate is worth.

    Args:
        grad_gates: gradient of the loss by the gates, in nats.
        log_alpha: theirs.

    Returns:
        Numbers with sum 0 and a mean size of 1; less where the plain sizes add up to less than
        `FAINT`.
    """
    slopes = mean_slope(log_alpha)
    price = (grad_gates * slopes).sum() / slopes.sum().clamp(min=torch.finfo(slopes.dtype).tiny)
    gradient = slopes * (grad_gates - price)
    return gradient / gradient.abs().mean().clamp(min=FAINT / len(gradient))


def probability_open(log_alpha: Tensor) -> Tensor:
    """The probability that a sampled gate is not zero."""
    x = (0 - GAMMA) / (ZETA - GAMMA)
    below = torch.sigmoid(BETA * math.log(x / (1 - x)) - log_alpha)
    return 1 - torch.clamp(below, EPSILON, 1 - EPSILON)


def deterministic(log_alpha: Tensor, groups: Sequence[slice]) -> Tensor:
    """Noise-free gates: sigmoid(0.8 log alpha / beta), the smallest of each group set to zero.

    A group loses as many gates as it is expected to have zeros: its size less the sum of the
    probabilities of being open, rounded. Among equals the later ones are set to zero.

    Args:
        log_alpha: [gate].
        groups: which gates are rounded together.
    """
    gates = torch.sigmoid(DETERMINISTIC_SCALE * log_alpha / BETA)
    for group in groups:
        values = log_alpha[group]
        num_zeros = round(len(values) - probability_open(values).sum().item())
        closed = torch.argsort(values, descending=True, stable=True)[len(values) - num_zeros :]
        gates[group.start + closed] = 0
    return gates


def sparsity(gates: Tensor) -> Tensor:
    """1 - mean gate."""
    return 1 - gates.mean()


def search_threshold(gates: Tensor) -> float:
    """The threshold above which as large a share of gates lies as their mean (binary search).

    Turning gates into binary ones at this threshold keeps their sparsity, up to the step that ties
    and single gates make.
    """
    wanted = sparsity(gates).item()
    low, high = 0.0, 1.0
    threshold = 0.5
    while high - low > SEARCH_TOLERANCE:
        threshold = (low + high) / 2
        if (gates <= threshold).float().mean().item() > wanted:
            high = threshold
        else:
            low = threshold
    return threshold
