"""What the trainer needs of a method that learns its scores by gradient descent.

To add a method, write a class with these members in a file of its own. The trainer samples nothing,
owns no parameters and knows no objective beyond the distance of the circuit from the full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from edgeprune.scores import EdgeScores


class Method(Protocol):
    """Produces the gates of an optimisation step and consumes their gradient.

    Constructed with `(graph, *, seed, device, steps, ...)`, where all further settings are explicit
    keyword arguments.
    """

    def gates(self, step: int) -> Tensor:
        """The gates of a training step.

        Args:
            step: number of steps done before this one.

        Returns:
            [edge] in [0, 1], without gradient history. A function of the parameters, the seed and
            `step` alone, hence the same on every process and in a resumed run.
        """
        ...

    def update(self, step: int, distance: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        """Do one optimisation step; called once after each `gates(step)`.

        Args:
            step: as given to `gates`.
            distance: scalar; distance of the circuit from the full model on the batch.
            grad_gates: [edge]; gradient of `distance` with respect to the gates.

        Returns:
            What is logged: `loss` and `distance`, then the method's own numbers, the most
            informative first (a progress bar shows two of them).

        Raises:
            FloatingPointError: the loss or the gradient is not finite; nothing was changed.
        """
        ...

    def scores(self) -> EdgeScores:
        """The current scores; `origin` names the method."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on: parameters, multipliers, optimiser state."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`, to the same bits.

        Raises:
            CheckpointError: the state belongs to another graph or another method.
        """
        ...
