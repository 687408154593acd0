"""What learned methods share: schedules, the check for finite numbers, the state of AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from edgeprune.errors import CheckpointError


@dataclass(frozen=True)
class TargetSchedule:
    """Target sparsity: rises from `start` to `target` over `warmup_steps`, then stays.

    Attributes:
        shape: "linear", or "logarithmic": 1 - target falls by the same factor in each step (at once
            if `target` is 1).
    """

    start: float
    target: float
    warmup_steps: int
    shape: str

    def at(self, step: int) -> float:
        """The target of a step; steps count from 0."""
        progress = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.shape == "linear":
            return self.start + (self.target - self.start) * progress
        return 1 - (1 - self.start) ** (1 - progress) * (1 - self.target) ** progress


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then linear decay to 0 at the end; steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


def initial_log_alpha(
    count: int, mean: float, std: float, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """[count], a leaf drawn from N(mean, std), on the CPU and then moved to the device."""
    values = mean + std * torch.randn(count, generator=generator)
    return values.to(device).requires_grad_()


def read_finite(
    grad_gates: Tensor, *, loss: Tensor, distance: Tensor, **others: Tensor
) -> dict[str, float]:
    """Read scalars, waiting for the device once.

    Returns:
        `loss`, `distance` and `others` as floats.

    Raises:
        FloatingPointError: the loss or the sum of the gradient is not finite.
    """
    scalars = {"loss": loss, "distance": distance, **others}
    *read, gradient = torch.stack([*scalars.values(), grad_gates.sum()]).tolist()
    values = dict(zip(scalars, read, strict=True))
    if not (math.isfinite(values["loss"]) and math.isfinite(gradient)):
        raise FloatingPointError(
            f"the loss is {values['loss']} (distance {values['distance']}), and the sum of its "
            f"gradients with respect to the gates {gradient}"
        )
    return values


def state_of(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters by name, and the optimiser's state of each as `name/key`."""
    state = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value
    return state


def load_state(
    parameters: Mapping[str, Tensor], optimizer: Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Copy what `state_of` returned into parameters and optimiser.

    Raises:
        CheckpointError: a parameter is missing or has another shape; nothing was changed.
    """
    check_shapes(state, {name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
            prefix = f"{name}/"
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if found:  # AdamW keeps its count of steps on the CPU
                optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in found.items()
                }


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the state has tensors of these names and shapes."""
    for name, shape in shapes.items():
        found = list(state[name].shape) if name in state else "nothing"
        if found != list(shape):
            raise CheckpointError(
                f"the checkpoint does not fit: {name} is {found}, expected shape {list(shape)}; it "
                "belongs to another graph or another method"
            )
