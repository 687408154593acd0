"""The sparsity constraint, and the schedules of its target and of learning rates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.config import TrainerConfig, Warmup

MAX_OPEN = 2.0
"""Times as many open gates as the circuit has edges, at the end of a run that went well."""


class SparsityConstraint(nn.Module):
    """lambda_1 (s - t) + lambda_2 (s - t)^2, with multipliers that are maximised.

    A Lagrangian relaxation of s = t (Bhaskar et al. 2024, arXiv:2406.16778); both multipliers start
    at 0 and lambda_1 may turn negative.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lambda_1 = nn.Parameter(torch.zeros(()))
        self.lambda_2 = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        excess = sparsity - target
        return self.lambda_1 * excess + self.lambda_2 * excess**2


def scheduled_target(
    step: int, start: float, target: float, warmup_steps: int, shape: Warmup
) -> float:
    """The target sparsity of a step: from `start` to `target` over `warmup_steps`.

    Logarithmic: 1 - t falls by the same factor each step (at once if the target is 1).
    """
    progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if shape is Warmup.linear:
        return start + (target - start) * progress
    return 1 - (1 - start) ** (1 - progress) * (1 - target) ** progress


def unfinished(sparsity: float, asked: float) -> str | None:
    """What to tell people whose gates are not yet about as sparse as the circuit cut from them.

    Args:
        sparsity: of the last step's gates.
        asked: of the circuit.
    """
    if 1 - sparsity <= MAX_OPEN * (1 - asked):
        return None
    return (
        f"the gates have only become {sparsity:.1%} sparse, so a circuit that is {asked:.1%} "
        "sparse leaves out what they rely on; take more steps, or the settings of trainer=fast"
    )


def learning_rate_factor(step: int, config: TrainerConfig) -> float:
    """Linear warm-up to 1, then linear decay to 0 at the end; step counts from 0."""
    if step < config.lr_warmup:
        return (step + 1) / config.lr_warmup
    return (config.steps - step) / max(1, config.steps - config.lr_warmup)
