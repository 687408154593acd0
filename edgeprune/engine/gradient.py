"""An objective, such as the KL from the full model, on a batch, and its gradient for the gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.metrics import Objective, mean_kl
from edgeprune.prompts import Batch

Gradient = tuple[Tensor, Tensor]
"""The objective, a scalar, and its gradient with respect to the gates, [edge]."""


@dataclass(frozen=True)
class StepInputs:
    """All tensors that the objective depends on.

    Attributes:
        reference: the full model's outputs, [predicted, vocabulary].
        ablation_values: what an edge with gate 0 carries; None: zeros.
        gates: [edge] in [0, 1], a leaf that requires a gradient; 1 = clean.
    """

    batch: Batch
    reference: Tensor
    ablation_values: Activations | None
    gates: Tensor

    def map(self, function: Callable[..., Tensor], *others: StepInputs) -> StepInputs:
        """Apply a function to every tensor (and to the corresponding tensors of the others)."""
        fields = zip(*(vars(x).values() for x in (self, *others)), strict=True)
        batches, references, values, gates = fields
        batch = batches[0].map(function, *batches[1:])
        value = None if values[0] is None else values[0].map(function, *values[1:])
        return StepInputs(batch, function(*references), value, function(*gates))


def differentiate(
    model: CircuitModel,
    inputs: StepInputs,
    *,
    objective: Objective = mean_kl,
    share: float = 1.0,
    recompute: bool = False,
) -> Gradient:
    """Run the circuit forward and backward; circuit_model.py begins with a walkthrough.

    Objective and gradient are multiplied by `share`, the fraction of the step's prompts that are in
    this batch, so that those of all its micro-batches add up.
    """
    arguments = inputs.batch, inputs.gates, inputs.ablation_values
    outputs = model.run_circuit(*arguments, recompute=recompute)  # [predicted, vocabulary]
    value = share * objective(inputs.batch, inputs.reference, outputs)
    (grad_gates,) = torch.autograd.grad(value, inputs.gates)
    return value.detach(), grad_gates
