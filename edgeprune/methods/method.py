"""What learned methods share: a log alpha per edge, AdamW and its schedule, and the saved state.

To add a method, write a subclass of `Method` in a file of its own and enter it in `METHODS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgeprune.errors import CheckpointError
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete
from edgeprune.scores import EdgeScores


@dataclass(kw_only=True, eq=False)
class Method:
    """Produces the gates of an optimisation step and learns from their gradient.

    The trainer runs the circuit in between and knows only its distance from the full model.

    Attributes:
        seed: seed of the initial values and of the noise of every step.
        steps: number of optimisation steps of the whole run.
        learning_rate: peak learning rate of log alpha.
        lr_warmup_steps: steps of linear warm-up of all learning rates, which then fall to 0.
        weight_decay, adam_epsilon: AdamW's.
        init_mean, init_std: log alphas start at N(init_mean, init_std).
    """

    graph: CircuitGraph = field(kw_only=False)
    seed: int
    device: torch.device | str
    steps: int
    learning_rate: float
    lr_warmup_steps: int
    weight_decay: float = 0.0
    adam_epsilon: float
    init_mean: float
    init_std: float

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.log_alpha = self.new_log_alpha(self.graph.num_edges)
        self.parameters = {"edge_log_alpha": self.log_alpha}
        settings = {"eps": self.adam_epsilon, "weight_decay": self.weight_decay}
        self.optimizer = torch.optim.AdamW([self.log_alpha], self.learning_rate, **settings)

    def gates(self, step: int) -> Tensor:
        """The gates of a training step: [edge] in [0, 1], float32, without gradient history.

        They depend on the parameters, the seed and `step` (the number of steps done) alone, hence
        are the same on every process and in a resumed run.
        """
        raise NotImplementedError

    def update(self, step: int, distance: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        """Do one optimisation step; called once after each `gates(step)`.

        Args:
            distance: scalar; distance of the circuit from the full model on the batch.
            grad_gates: [edge]; its gradient.

        Returns:
            What is logged: `loss`, `distance` and then the method's own numbers, of which a
            progress bar shows the first two. All are read from the device at once (`read_finite`).

        Raises FloatingPointError and changes nothing if the loss or the gradient is not finite.
        """
        raise NotImplementedError

    def new_log_alpha(self, count: int) -> Tensor:
        """[count], a leaf; drawn on the CPU and then moved to the device."""
        values = self.init_mean + self.init_std * torch.randn(count, generator=self._generator)
        return values.to(self.device).requires_grad_()

    def noise(self, step: int) -> Tensor:
        """[edge], uniform noise for a step's gates."""
        count = self.graph.num_edges
        return hard_concrete.uniform_noise(self.seed, step, (count,), self.log_alpha.device)[0]

    def apply_gradients(self, step: int) -> float:
        """Do a step of AdamW and clear the gradients; returns the learning rate of log alpha."""
        factor = learning_rate_factor(step, self.steps, self.lr_warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.learning_rate * factor

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on: parameters by name, AdamW's state as `name/key`."""
        state = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`, bit for bit.

        Raises CheckpointError and changes nothing if it belongs to another graph or method.
        """
        check_shapes(state, {name: x.shape for name, x in self.parameters.items()})
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(state[name])
            prefix = f"{name}/"
            for key in (key.removeprefix(prefix) for key in state if key.startswith(prefix)):
                device = "cpu" if key == "step" else parameter.device  # as AdamW keeps them
                self.optimizer.state[parameter][key] = state[prefix + key].to(device, copy=True)


def rising_target(step: int, start: float, end: float, warmup_steps: int, shape: str) -> float:
    """The target sparsity of a step: rises over `warmup_steps`, then stays; steps count from 0.

    `shape` is "linear", or "logarithmic": 1 - target falls by the same factor in each step (at once
    if `end` is 1).
    """
    progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if shape == "linear":
        return start + (end - start) * progress
    return 1 - (1 - start) ** (1 - progress) * (1 - end) ** progress


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then linear decay to 0 at the end; steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


def read_finite(grad_gates: Tensor, **scalars: Tensor) -> dict[str, float]:
    """Read scalars as floats, waiting for the device once.

    Raises FloatingPointError if the scalar `loss` or the sum of the gradient is not finite.
    """
    *read, gradient = torch.stack([*scalars.values(), grad_gates.sum()]).tolist()
    values = dict(zip(scalars, read, strict=True))
    if not (math.isfinite(values["loss"]) and math.isfinite(gradient)):
        raise FloatingPointError(f"the loss is {values['loss']}, the sum of gradients {gradient}")
    return values


def scores_from_state(
    graph: CircuitGraph, state: Mapping[str, Tensor], origin: Mapping[str, Any]
) -> EdgeScores:
    """Scores from `Method.state_dict()`: the log odds of p = sigmoid(log alpha), i.e. log alpha.

    With node gates p is multiplied by sigmoid(log alpha of the writer). Raises CheckpointError if
    the state does not fit the graph.
    """
    log_alpha = log_alphas(graph, state)
    if "node" not in log_alpha:
        return EdgeScores(graph, log_alpha["edge"], origin=origin)
    edge, node = (logsigmoid(x.double()) for x in log_alpha.values())
    log_p = edge + node[torch.tensor(graph.edge_writers())]
    return EdgeScores(graph, log_p - torch.log(-torch.expm1(log_p)), origin=origin)


def log_alphas(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; float32 on the CPU."""
    shapes = {"edge_log_alpha": (graph.num_edges,)}
    if "node_log_alpha" in state:
        shapes["node_log_alpha"] = (graph.num_writers,)
    check_shapes(state, shapes)
    return {name.removesuffix("_log_alpha"): state[name].detach().cpu() for name in shapes}


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the state has tensors of these names and shapes."""
    for name, shape in shapes.items():
        found = list(state[name].shape) if name in state else "missing"
        if found != list(shape):
            wrong = f"{name} is {found}, expected shape {list(shape)}"
            raise CheckpointError(f"the checkpoint is of another graph or method: {wrong}")
