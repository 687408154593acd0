"""Gates held exactly at the target sparsity of every step (trainer=fast)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.methods import hard_concrete
from edgeprune.methods.hard_concrete import BETA, GAMMA, ZETA
from edgeprune.methods.method import Method, read_finite, rising_target

MAX_SHIFT = 64.0
"""Largest shift of log alpha that is tried to reach a sparsity."""
NUM_BISECTIONS = 24
"""Number of bisection steps in the search for that shift."""
NUM_QUADRATURE_POINTS = 16
"""Number of points of the integral over a gate's values."""
MIN_TOTAL_GRADIENT = 0.01
"""Gradients whose absolute values sum to less than this (nats) are not scaled up to unit size."""


@dataclass(kw_only=True, eq=False)
class Held(Method):
    """Minimises the distance at a sparsity that is exactly the target in every step.

    Before each step one number is added to all log alphas, so that the sampled gates have the
    target sparsity; the gradient is projected accordingly (see `project`), to a mean absolute
    value of 1, to which `adam_epsilon` compares.

    Attributes:
        start_sparsity, target_sparsity: target at the start and after the warm-up, in [0, 1].
        sparsity_warmup_steps, warmup: length and shape of its rise, see `rising_target`.
    """

    start_sparsity: float
    target_sparsity: float
    sparsity_warmup_steps: int
    warmup: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shift(0)

    @torch.no_grad()
    def gates(self, step: int) -> Tensor:
        self._sampled = hard_concrete.sample(self.log_alpha, self.noise(step))
        return self._sampled

    def update(self, step: int, distance: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        sparsity = hard_concrete.sparsity(self._sampled)
        read = read_finite(grad_gates, loss=distance, distance=distance, sparsity=sparsity)
        self.log_alpha.grad = project(grad_gates, self.log_alpha.detach())
        learning_rate = self.apply_gradients(step)
        self._shift(step + 1)
        return {**read, "target": self._target(step), "learning_rate": learning_rate}

    def _target(self, step: int) -> float:
        ends = self.start_sparsity, self.target_sparsity
        return rising_target(step, *ends, self.sparsity_warmup_steps, self.warmup)

    @torch.no_grad()
    def _shift(self, step: int) -> None:
        """Bring the gates to the target of the step that comes next."""
        shift = shift_to_sparsity(self.log_alpha, self.noise(step), self._target(step))
        self.log_alpha.add_(shift)


def shift_to_sparsity(log_alpha: Tensor, uniform: Tensor, target: float) -> Tensor:
    """The smallest shift of all log alphas at which the sampled gates have the target sparsity.

    A scalar of either sign, by bisection, hence without waiting for the device. A Newton step would
    be of little use where nearly all gates are 0 or 1.
    """

    def missing(shift: Tensor) -> Tensor:
        return hard_concrete.sparsity(hard_concrete.sample(log_alpha + shift, uniform)) - target

    low, high = log_alpha.new_zeros(()), log_alpha.new_full((), MAX_SHIFT)
    sign = torch.sign(missing(low))
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        reaches = sign * missing(sign * middle) <= 0
        low, high = torch.where(reaches, low, middle), torch.where(reaches, middle, high)
    return sign * high


def mean_slope(log_alpha: Tensor) -> Tensor:
    """Derivative of the expected gate with respect to log alpha; any shape.

    The expected gate is the integral over t from 0 to 1 of P(gate > t).
    """
    n = NUM_QUADRATURE_POINTS
    t = (torch.arange(n, device=log_alpha.device, dtype=log_alpha.dtype) + 0.5) / n
    needed = BETA * torch.logit((t - GAMMA) / (ZETA - GAMMA))  # log alpha + noise at gate = t
    above = torch.sigmoid(log_alpha[..., None] - needed)
    return (above * (1 - above)).mean(-1)


def project(grad_gates: Tensor, log_alpha: Tensor) -> Tensor:
    """Gradient with respect to log alphas whose common shift keeps the sparsity constant.

    With mean slopes instead of the sample's, gates learn in every step, not only when they happen
    to be half open. The Lagrange multiplier of a fixed sparsity, i.e. what one more open gate is
    worth, is subtracted from each gate's gradient.

    Args:
        grad_gates: [edge], gradient of the loss with respect to the gates, in nats.
        log_alpha: [edge].

    Returns:
        [edge]; sums to 0, with a mean absolute value of 1, or less where the absolute values sum to
        less than `MIN_TOTAL_GRADIENT` before scaling.
    """
    slopes = mean_slope(log_alpha)
    price = (grad_gates * slopes).sum() / slopes.sum().clamp(min=torch.finfo(slopes.dtype).tiny)
    gradient = slopes * (grad_gates - price)
    return gradient / gradient.abs().mean().clamp(min=MIN_TOTAL_GRADIENT / len(gradient))
