"""What learned methods share: an optimiser, its state, and the check that a step is finite.

To add a method, write a subclass of `Method` in a file of its own, decorated like `Method` itself
(otherwise its `__post_init__` does not run), and enter it in `METHODS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeprune.errors import CheckpointError
from edgeprune.graph import CircuitGraph


@dataclass(kw_only=True, eq=False)
class Method:
    """Produces the gates of an optimisation step and learns from their gradient.

    The trainer runs the circuit in between and knows only the value of the objective.

    Attributes:
        seed: seed of the initial values and of everything that is drawn at random in a step.
        steps: number of optimisation steps of the whole run.
        learning_rate: largest learning rate of what is learned.
        parameters: what is learned, by name; filled by subclasses, like `optimizer`.
    """

    graph: CircuitGraph = field(kw_only=False)
    seed: int
    device: torch.device | str
    steps: int
    learning_rate: float
    parameters: dict[str, Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def gates(self, step: int) -> Tensor:
        """The gates of a training step: [edge] in [0, 1], float32, without gradient history.

        They depend on the parameters, the seed and `step` (the number of steps done) alone, hence
        are the same on every process and in a resumed run.
        """
        raise NotImplementedError

    def update(self, step: int, objective: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        """Do one optimisation step; called once after each `gates(step)`.

        Args:
            objective: scalar; what is minimised, on the step's batch (see `metrics.OBJECTIVES`).
            grad_gates: [edge]; its gradient.

        Returns:
            What is logged: `objective` and then the method's own numbers, of which a progress bar
            shows the first two. All are read from the device at once (`read_finite`).

        Raises FloatingPointError and changes nothing if the loss or the gradient is not finite.
        """
        raise NotImplementedError

    @staticmethod
    def scores(graph: CircuitGraph, state: Mapping[str, Tensor]) -> Tensor:
        """[edge], the scores that a `state_dict()` holds; the highest are most important.

        Raises CheckpointError if the state belongs to another graph or method.
        """
        raise NotImplementedError

    def apply_gradients(self, step: int, warmup_steps: int = 0) -> float:
        """Do a step of the optimiser and clear the gradients; returns the learning rate."""
        factor = learning_rate_factor(step, self.steps, warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.learning_rate * factor

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on: parameters by name, Adam's state as `name/key`."""
        state = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`, bit for bit.

        Raises CheckpointError and changes nothing if it belongs to another graph or method.
        """
        check_shapes(state, {name: tuple(x.shape) for name, x in self.parameters.items()})
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(state[name])
            prefix = f"{name}/"
            for key in (key.removeprefix(prefix) for key in state if key.startswith(prefix)):
                device = "cpu" if key == "step" else parameter.device  # as Adam keeps them
                self.optimizer.state[parameter][key] = state[prefix + key].to(device, copy=True)


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then linear decay to 0 at the end; steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


def read_finite(grad_gates: Tensor, **scalars: Tensor) -> dict[str, float]:
    """Read scalars as floats, waiting for the device once.

    Raises FloatingPointError if the first scalar or the sum of the gradient is not finite.
    """
    *read, gradient = torch.stack([*scalars.values(), grad_gates.sum()]).tolist()
    if not (math.isfinite(read[0]) and math.isfinite(gradient)):
        raise FloatingPointError(f"the loss is {read[0]}, the sum of gradients {gradient}")
    return dict(zip(scalars, read, strict=True))


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the state has tensors of these names and shapes."""
    for name, shape in shapes.items():
        found = list(state[name].shape) if name in state else "missing"
        if found != list(shape):
            wrong = f"{name} is {found}, expected shape {list(shape)}"
            raise CheckpointError(f"the checkpoint is of another graph or method: {wrong}")
