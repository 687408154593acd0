"""Hard-concrete gates (Louizos, Welling and Kingma 2018, arXiv:1712.01312), as pure functions.

A gate is a number in [0, 1]; 1 carries the clean value, 0 the corrupted one. One number, log alpha,
sets its distribution: a sigmoid of log alpha plus logistic noise, stretched slightly beyond [0, 1]
and clamped, so that exact zeros and ones have positive probability.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

BETA = 2 / 3  # temperature of the distribution
GAMMA, ZETA = -0.1, 1.1  # limits to which the sigmoid is stretched before clamping
EPSILON = 1e-6  # probabilities and noise are kept this far from 0 and 1
DETERMINISTIC_SCALE = 0.8  # steepness of deterministic gates, as published
SEARCH_TOLERANCE = 1e-5  # width at which the search for a threshold stops, as published


@lru_cache(maxsize=1)
def uniform_noise(
    seed: int, step: int, counts: tuple[int, ...], device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """The noise of one training step: one tensor in [EPSILON, 1 - EPSILON] per count.

    It depends on seed and step alone, not on the device, the number of processes or earlier draws.
    The tensors are cached: do not change them.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    low, high = EPSILON, 1 - EPSILON
    noise = (torch.rand(n, generator=generator) * (high - low) + low for n in counts)
    return tuple(x.to(device, non_blocking=True) for x in noise)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """clamp(sigmoid((log u - log(1 - u) + log alpha) / beta) * (zeta - gamma) + gamma, 0, 1)."""
    logistic = torch.log(uniform) - torch.log1p(-uniform)
    concrete = torch.sigmoid((logistic + log_alpha) / BETA)
    return torch.clamp(concrete * (ZETA - GAMMA) + GAMMA, 0, 1)


def probability_open(log_alpha: Tensor) -> Tensor:
    """The probability that a sampled gate is not zero."""
    below = torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha)
    return 1 - torch.clamp(below, EPSILON, 1 - EPSILON)


def deterministic(log_alpha: Tensor, groups: Sequence[slice]) -> Tensor:
    """Noise-free gates, [gate]: sigmoid(0.8 log alpha / beta), the smallest per group set to zero.

    The number of zeros in a group is its expected number, rounded: the group's size minus the sum
    of the probabilities of being open. Among equal gates the later ones are set to zero.
    """
    gates = torch.sigmoid(DETERMINISTIC_SCALE * log_alpha / BETA)
    for group in groups:
        values = log_alpha[group]
        num_zeros = round(len(values) - probability_open(values).sum().item())
        zeros = torch.argsort(values, descending=True, stable=True)[len(values) - num_zeros :]
        gates[group.start + zeros] = 0
    return gates


def sparsity(gates: Tensor) -> Tensor:
    """1 - mean gate."""
    return 1 - gates.mean()


def search_threshold(gates: Tensor) -> float:
    """The threshold at which binary gates (gate > threshold) are as sparse as the gates."""
    wanted = sparsity(gates).item()
    low, high = 0.0, 1.0
    while high - low > SEARCH_TOLERANCE:
        threshold = (low + high) / 2
        is_sparser = (gates <= threshold).float().mean().item() > wanted
        low, high = (low, threshold) if is_sparser else (threshold, high)
    return threshold
