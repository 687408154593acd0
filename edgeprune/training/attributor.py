"""The attributor, which takes the place of the trainer for methods that do not learn."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from edgeprune.errors import TrainingError
from edgeprune.methods.attribution import Attribution
from edgeprune.methods.method import check_shapes
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.checkpoint import Checkpoint
from edgeprune.training.trainer import StepMetrics

NUM_CHECKPOINTS = 20
"""Number of checkpoints of a run, at most."""


@dataclass(eq=False)
class Attributor:
    """Does one step of an attribution after another, see `trainer.Stepper`.

    Attributes:
        objective: name of what edges are to lower.
        step: number of steps done.
        values: [edge], float64, the scores so far.
    """

    attribution: Attribution
    objective: str
    step: int = field(default=0, init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_edges = self.attribution.model.graph.num_edges
        self.values = torch.zeros(num_edges, dtype=torch.float64)

    @property
    def steps(self) -> int:
        return self.attribution.num_steps

    @property
    def checkpoint_every(self) -> int:
        return -(-self.steps // NUM_CHECKPOINTS)

    @property
    def world(self) -> World:
        return self.attribution.world

    def train_step(self) -> StepMetrics:
        """Do one step; raises TrainingError and changes nothing if a result is not finite."""
        try:
            do_step = partial(self.attribution.step, self.step, self.values)
            value = self.world.run(self.attribution.model, do_step)
        except FloatingPointError as error:
            raise TrainingError(f"step {self.step + 1}: {error}; use model.dtype=float32") from None
        self.step += 1
        return StepMetrics(self.step, self.objective, value, {})

    def scores(self) -> EdgeScores:
        """The scores; `origin` has the method, and the threshold of `acdc`."""
        attribution = self.attribution
        origin = {"method": attribution.method}
        values = self.values.clone()
        if attribution.method == "acdc":
            origin["threshold"] = attribution.threshold
        outside = ~torch.tensor(attribution.circuit.mask())
        values[outside] = min(0.0, values.min().item()) - 1.0  # below all edges of the circuit
        by_magnitude = attribution.method not in ("exact", "acdc")
        return EdgeScores(attribution.model.graph, values, by_magnitude, origin)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        return Checkpoint(self.step, {"scores": self.values})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit as without the interruption."""
        check_shapes(checkpoint.state, {"scores": tuple(self.values.shape)})
        self.values = checkpoint.state["scores"].clone()
        self.step = checkpoint.step
