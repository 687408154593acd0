"""The trainer: one optimisation step after another, for any method. It touches no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.engine.cuda_graphs import CudaGraphs
from edgeprune.engine.gradient import Gradient, StepInputs, differentiate
from edgeprune.errors import ConfigError, TrainingError
from edgeprune.methods.method import Method
from edgeprune.metrics import Output
from edgeprune.prompts import Batch, Pair, collate, training_pairs
from edgeprune.scale.sharding import is_sharded
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class StepMetrics:
    """One optimisation step, measured on its own batch with its own gates.

    Attributes:
        step: number of steps done, including this one.
        loss: what was minimised.
        kl: nats per predicted token; None where the model's outputs are not logits.
        unexplained: fraction of the outputs' variance that is unexplained; None where they are
            logits.
        values: the method's own numbers, such as `sparsity`, `target` and `learning_rate`.
    """

    step: int
    loss: float
    kl: float | None
    unexplained: float | None
    values: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """All numbers in one flat dictionary, as in a line of metrics.jsonl."""
        return {
            "step": self.step,
            "loss": self.loss,
            "kl": self.kl,
            "unexplained": self.unexplained,
            **self.values,
        }

    def __str__(self) -> str:
        """The distance and the first two of the method's numbers, for a progress bar."""
        distance = f"unexplained {self.unexplained:.3f}" if self.kl is None else f"KL {self.kl:.3f}"
        shown = [f"{name} {x:.3f}" for name, x in self.values.items() if x is not None][:2]
        return "  ".join([distance, *shown])


class Trainer:
    """Runs the circuit on batches and lets a method learn from the gradient of its gates.

    Args:
        model: the frozen model.
        pairs: training prompts.
        method: gives the gates of each step and learns from their gradient.
        steps: number of optimisation steps of the whole run.
        batch_size: pairs per step.
        seed: seed of the order of the data.
        ablation: the values of ablated edges.
        world: the processes that share the run, each with a trainer of its own; together they take
            the same step as a single process would.
        micro_batch_size: pairs run at a time, to save memory; None runs the whole batch.
        recompute: whether blocks are run again in the backward pass, to save memory.
        cuda_graph: whether passes are recorded as CUDA graphs and replayed.

    Raises:
        ConfigError: a batch has fewer pairs than there are processes; a batch is to be split
            although the model's outputs are not logits; or CUDA graphs without a GPU.
    """

    def __init__(
        self,
        model: CircuitModel,
        pairs: Sequence[Pair],
        method: Method,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        ablation: Ablation,
        world: World | None = None,
        micro_batch_size: int | None = None,
        recompute: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.model, self.pairs, self.method = model, pairs, method
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.ablation = ablation
        self.world = world or World()
        self.micro_batch_size, self.recompute = micro_batch_size, recompute
        self.cuda_graph = cuda_graph
        self.step = 0
        self.world.check_batch(min(batch_size, len(pairs)))
        if model.output is not Output.logits and (micro_batch_size or self.world.count > 1):
            raise ConfigError(
                f"the outputs of {model.name} are not logits, and their variance is computed over "
                "the whole batch; leave out trainer.micro_batch_size, and start one process"
            )
        if cuda_graph and model.device.type != "cuda":
            raise ConfigError(
                f"trainer.cuda_graph=true requires a GPU, but the model is on {model.device.type}; "
                "leave it out"
            )

    def train_step(self) -> StepMetrics:
        """Do one optimisation step.

        Raises:
            TrainingError: the loss or a gradient is not finite; nothing was changed.
            ProcessError: another process died or stopped responding; nothing was changed.
        """
        pairs = training_pairs(self.pairs, self.batch_size, self.seed, self.step)
        gates = self.method.gates(self.step)
        distance, grad_gates = self.differentiate(pairs, gates)
        try:
            values = self.method.update(self.step, distance, grad_gates)
        except FloatingPointError as error:
            raise TrainingError(
                f"step {self.step + 1}: {error}, on the batch that begins with "
                f"{pairs[0].text!r}; the state before this step is kept. Lower "
                "trainer.learning_rate, or use model.dtype=float32"
            ) from None
        self.step += 1
        loss, distance = values.pop("loss"), values.pop("distance")
        if self.model.output is Output.logits:  # rounding may make a KL of 0 negative
            return StepMetrics(self.step, loss, max(distance, 0.0), None, values)
        return StepMetrics(self.step, loss, None, distance, values)

    def differentiate(self, pairs: Sequence[Pair], gates: Tensor) -> Gradient:
        """Distance of the circuit from the full model on a batch, and its gradient.

        Args:
            pairs: the batch, over all processes.
            gates: [edge] in [0, 1].

        Returns:
            The distance, a scalar, and its gradient with respect to the gates, [edge]; the same on
            every process.
        """
        part = partial(self._differentiate_part, pairs, gates.detach())
        if is_sharded(self.model.architecture.blocks[0].layer):  # gathers layers from the others
            distance, grad_gates = self.world.collective(part)
        else:
            distance, grad_gates = part()
        self.world.sum([distance, grad_gates])
        return distance, grad_gates

    def _differentiate_part(self, pairs: Sequence[Pair], gates: Tensor) -> Gradient:
        """This process's part of `differentiate`, in micro-batches with the same gates."""
        gates.requires_grad_()
        total = torch.zeros((), device=gates.device)
        grad_gates = torch.zeros_like(gates)
        part = self.world.part(pairs)
        size = self.micro_batch_size or len(part)
        for start in range(0, len(part), size):
            batch = collate(part[start : start + size]).to(gates.device)
            reference, corrupted = self._run_pair(batch)
            inputs = StepInputs(batch, reference, self.ablation.values(batch, corrupted), gates)
            share = len(batch.pairs) / len(pairs)
            distance, gradient = self._differentiate_batch(inputs, share=share)
            total += distance
            grad_gates += gradient
        return total, grad_gates

    @cached_property
    def _differentiate_batch(self) -> Callable[..., Gradient]:
        """See `engine.gradient.differentiate`."""
        if self.cuda_graph:
            return CudaGraphs(self.model, recompute=self.recompute).differentiate
        return partial(differentiate, self.model, recompute=self.recompute)

    @cached_property
    def _run_pair(self) -> Callable[[Batch], tuple[Tensor, Activations | None]]:
        """See `CircuitModel.run_pair`; a small training set is run once, before the first step."""
        size = self.micro_batch_size or math.ceil(self.batch_size / self.world.count)
        return KeptPasses.where_they_fit(
            self.model, self.pairs, size, corrupted=self.ablation.needs_corrupted
        )

    def scores(self) -> EdgeScores:
        """The method's current scores; `origin` also has the step."""
        scores = self.method.scores()
        return replace(scores, origin={**scores.origin, "step": self.step})

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        return Checkpoint(self.step, self.method.state_dict())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, to the same bits as without the interruption.

        Raises:
            CheckpointError: it belongs to another graph or another method.
        """
        self.method.load_state_dict(checkpoint.state)
        self.step = checkpoint.step
