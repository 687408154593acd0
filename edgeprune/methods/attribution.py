"""Methods that score edges without learning: by gradients at one or several points.

    score(u -> v) = mean over prompts and points of
                    sum over positions and d_model of (ablated_u - clean_u) * dL/d(input of v)

so a positive score means that the edge lowers the objective L: it helps. The points are those of
Syed et al. 2023 (arXiv:2310.10348; `eap`) and Hanna et al. 2024 (arXiv:2403.17806). For `relp` and
`gim`, dL/d(input of v) is not the gradient, see `engine/backward_rules.py`. To add a method of this
kind, add its points to `POINTS`; to add another, write a subclass of `Attribution` in a file of its
own and enter it in `ATTRIBUTIONS`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.backward_rules import RULES, backward_rules
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.engine.gradient import Gradient, StepInputs, differentiate
from edgeprune.engine.open_pass import OpenPass, Point
from edgeprune.metrics import Objective
from edgeprune.prompts import Batch, Pair, collate
from edgeprune.scale.world import World

POINTS: dict[str, Callable[[int, int], list[Point]]] = {
    "eap": lambda num_nodes, steps: [Point()],
    "eap_ig": lambda num_nodes, steps: [Point(0, k / steps) for k in range(steps)],
    "eap_ig_activations": lambda num_nodes, steps: [
        Point(node, k / steps) for node in range(num_nodes) for k in range(1, steps + 1)
    ],
    "clean_corrupted": lambda num_nodes, steps: [Point(), Point(0, 0.0)],
    **dict.fromkeys(RULES, lambda num_nodes, steps: [Point()]),
}
"""Per method, the points given the numbers of nodes (see `Point`) and of integration steps."""


@dataclass(kw_only=True, eq=False)
class Attribution:
    """Scores all edges in a fixed number of steps.

    Attributes:
        pairs: the prompts; scores are means over them.
        objective: what edges are to lower; a mean over the examples of a batch.
        world: the processes that share each batch.
        method: its name in `ATTRIBUTIONS`.
        batch_size: pairs that are run at a time, by all processes together.
        integration_steps: number of points, for methods that integrate.
        threshold: for `acdc`.
        circuit: whose edges are cut, for `exact` and `acdc`.
        batches: the pairs by length, `batch_size` at a time.
        num_steps: number of steps.
    """

    model: CircuitModel
    pairs: Sequence[Pair]
    ablation: Ablation
    objective: Objective
    world: World
    method: str
    batch_size: int
    integration_steps: int
    threshold: float
    circuit: Circuit
    batches: list[list[Pair]] = field(init=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.pairs, key=lambda pair: len(pair.clean_ids))
        starts = range(0, len(ordered), self.batch_size)
        self.batches = [ordered[start : start + self.batch_size] for start in starts]

    @property
    def num_steps(self) -> int:
        return len(self.batches)

    def step(self, index: int, scores: Tensor) -> float | None:
        """Do a step: change the scores, [edge], float64, zeros at the start.

        The steps are done in order, and depend on nothing but the scores; all processes make the
        same changes. Returns the objective on the step's prompts, if the step measures it.

        Raises FloatingPointError and changes nothing if the result is not finite.
        """
        raise NotImplementedError

    def expected_seconds(self) -> float | None:
        """How long all steps may take, for methods that are slow."""
        return None

    def my_part(self, index: int) -> tuple[Batch, int]:
        """This process's part of a batch, and the number of its pairs.

        A process without a part runs a pair of another's, which counts 0: all processes must run
        the model equally often, since they gather a sharded model's weights together.
        """
        pairs = self.batches[index]
        part = self.world.part(pairs)
        return collate(part or pairs[:1]).to(self.model.device), len(part)

    def ablation_values(self, batch: Batch) -> Activations | None:
        """The ablation values of a batch, without a pass over its clean prompts."""
        corrupted = None
        if self.ablation.needs_corrupted:
            _, corrupted = self.model.run_full(batch.corrupted_ids, slice(None))
        return self.ablation.values(batch, corrupted)


class _Gradients(Attribution):
    """Adds, batch by batch, the gradient with respect to all gates."""

    def step(self, index: int, scores: Tensor) -> float | None:
        size, (batch, count) = len(self.batches[index]), self.my_part(index)
        total, gradient = (count / size * part for part in self.differentiate(batch))
        self.world.sum([total, gradient])
        gradient = gradient.cpu().double()
        if not gradient.isfinite().all():
            raise FloatingPointError("the gradient of the gates is not finite")
        scores -= size / len(self.pairs) * gradient
        return total.item()

    def differentiate(self, batch: Batch) -> Gradient:
        """The objective and its gradient on a batch, as means over the method's points."""
        raise NotImplementedError


class AtPoints(_Gradients):
    """All gates are open, and the gradient is taken at the method's `POINTS`."""

    def differentiate(self, batch: Batch) -> Gradient:
        points = POINTS[self.method](1 + 2 * self.model.graph.num_layers, self.integration_steps)
        open_pass = OpenPass(self.model, batch, self.ablation_values(batch))
        rules = backward_rules(self.model, self.method) if self.method in RULES else nullcontext()
        with rules:
            return open_pass.differentiate(self.objective, points)


class AlongGates(_Gradients):
    """The gradient is taken with all gates at (k + 1/2) / steps, for k = 0, ..., steps - 1."""

    def differentiate(self, batch: Batch) -> Gradient:
        reference, corrupted = self.model.run_pair(batch, corrupted=self.ablation.needs_corrupted)
        values, steps = self.ablation.values(batch, corrupted), self.integration_steps
        options = {"objective": self.objective, "share": 1 / steps}
        total, gradient = 0.0, 0.0
        for k in range(steps):
            gates = torch.full((self.model.graph.num_edges,), (k + 0.5) / steps)
            gates = gates.to(self.model.device).requires_grad_()
            inputs = StepInputs(batch, reference, values, gates)
            value, added = differentiate(self.model, inputs, **options)
            total, gradient = total + value, gradient + added
        return total, gradient
