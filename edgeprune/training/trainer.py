"""The trainer, which does one optimisation step after another, and the loop around it."""

import logging
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgeprune.config import TrainerConfig
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.engine.cuda_graphs import CudaGraphs
from edgeprune.engine.gradient import Gradient, StepInputs, differentiate
from edgeprune.errors import ConfigError, Interrupted, ProcessError, TrainingError
from edgeprune.methods.method import Method
from edgeprune.metrics import OBJECTIVES, Objective, Output, mean_unexplained_variance
from edgeprune.prompts import Batch, Pair, collate, training_pairs
from edgeprune.scale.launch import on_stop_signals
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.checkpoint import Checkpoint

log = logging.getLogger("edgeprune")


@dataclass(frozen=True)
class StepMetrics:
    """One optimisation step, measured on its own batch with its own gates.

    Attributes:
        step: number of steps done, including this one.
        objective: name of what was minimised: `kl` (nats per predicted token), `unexplained`
            (fraction of the outputs' variance), or another key of `metrics.OBJECTIVES`.
        value: its value; None if the step did not measure it.
        values: the method's own numbers, such as `num_edges` and `learning_rate`.
    """

    step: int
    objective: str
    value: float | None
    values: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """All numbers in one flat dictionary, as in a line of metrics.jsonl."""
        return {"step": self.step, self.objective: self.value, **self.values}

    def __str__(self) -> str:
        """The objective and the first two of the method's numbers, for a progress bar."""
        shown = [
            f"{name} {x:,.0f}" if abs(x) >= 10 else f"{name} {x:.4g}"
            for name, x in self.values.items() if x is not None
        ][:2]  # fmt: skip
        value = [] if self.value is None else [f"{self.objective} {self.value:.3f}"]
        return "  ".join([*value, *shown])


@dataclass(eq=False)
class Trainer:
    """Runs the circuit on batches and lets a method learn from the gradient of its gates.

    Attributes:
        pairs: training prompts.
        seed: seed of the order of the data.
        ablation: the values of ablated edges.
        world: the processes that share the run, each with a trainer of its own.
        step: number of optimisation steps done.

    Raises ConfigError if a batch cannot be split as asked for, the objective does not apply, or for
    CUDA graphs without a GPU.
    """

    model: CircuitModel
    pairs: Sequence[Pair]
    method: Method
    settings: TrainerConfig
    seed: int
    ablation: Ablation
    world: World = field(default_factory=World)
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        settings, world, device = self.settings, self.world, self.model.device.type
        size = min(settings.batch_size, len(self.pairs))
        if size < world.count:
            raise ConfigError(f"{world.count} processes cannot share {size} pairs; start fewer")
        is_split = settings.micro_batch_size or world.count > 1
        if is_split and self.model.output is not Output.logits:
            raise ConfigError(
                f"the outputs of {self.model.name} are compared by the variance of a whole batch: "
                "leave out trainer.micro_batch_size, and start one process"
            )
        if settings.cuda_graph and device != "cuda":
            raise ConfigError(f"trainer.cuda_graph=true requires a GPU; the model is on {device}")
        self.objective, function = objective_of(settings.objective, self.model.output, self.pairs)
        options = {"objective": function, "recompute": settings.recompute}
        self.differentiate_batch = partial(differentiate, self.model, **options)
        if settings.cuda_graph:
            self.differentiate_batch = CudaGraphs(self.model, **options).differentiate

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def checkpoint_every(self) -> int:
        return self.settings.checkpoint_every

    def train_step(self) -> StepMetrics:
        """Do one optimisation step.

        Raises TrainingError if the loss or a gradient is not finite, and ProcessError if another
        process died or stopped responding; nothing was changed.
        """
        pairs = training_pairs(self.pairs, self.settings.batch_size, self.seed, self.step)
        gates = self.method.gates(self.step)
        objective, grad_gates = self.differentiate(pairs, gates)
        try:
            values = self.method.update(self.step, objective, grad_gates)
        except FloatingPointError as error:
            raise TrainingError(
                f"step {self.step + 1}: {error}, on the batch that begins with {pairs[0].text!r}; "
                "lower trainer.learning_rate, or use model.dtype=float32"
            ) from None
        self.step += 1
        value = values.pop("objective")
        if self.objective == "kl":  # rounding may make a KL of 0 negative
            value = max(value, 0.0)
        return StepMetrics(self.step, self.objective, value, values)

    def differentiate(self, pairs: Sequence[Pair], gates: Tensor) -> Gradient:
        """The objective on a batch, and its gradient.

        The processes divide the batch; all get the same result. `gates` is [edge], in [0, 1].
        """
        mine = partial(self._differentiate_part, pairs, gates.detach())
        objective, grad_gates = self.world.run(self.model, mine)
        self.world.sum([objective, grad_gates])  # in place
        return objective, grad_gates

    def _differentiate_part(self, pairs: Sequence[Pair], gates: Tensor) -> Gradient:
        """This process's part of `differentiate`, in micro-batches with the same gates."""
        gates.requires_grad_()
        total = torch.zeros((), device=gates.device)
        grad_gates = torch.zeros_like(gates)  # [edge]
        part = self.world.part(pairs)
        size = self.settings.micro_batch_size or len(part)
        for start in range(0, len(part), size):
            batch = collate(part[start : start + size]).to(gates.device)
            reference, corrupted = self._full_model(batch)
            inputs = StepInputs(batch, reference, self.ablation.values(batch, corrupted), gates)
            share = len(batch.pairs) / len(pairs)
            value, gradient = self.differentiate_batch(inputs, share=share)
            total += value
            grad_gates += gradient
        return total, grad_gates

    @cached_property
    def _full_model(self) -> Callable[[Batch], tuple[Tensor, Activations | None]]:
        """See `CircuitModel.run_pair`.

        A small training set of which pairs are used repeatedly is run once, before the first step.
        """
        batch_size, corrupted = self.settings.batch_size, self.ablation.needs_corrupted
        if not self.settings.repeats(len(self.pairs)):
            return partial(self.model.run_pair, corrupted=corrupted)
        size = self.settings.micro_batch_size or math.ceil(batch_size / self.world.count)
        return KeptPasses.where_they_fit(self.model, self.pairs, size, corrupted=corrupted)

    def scores(self) -> EdgeScores:
        """The method's current scores; `origin` names the method and the step."""
        origin = {"method": self.settings.method, "step": self.step}
        values = self.method.scores(self.model.graph, self.method.state_dict())
        return EdgeScores(self.model.graph, values, origin=origin)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        return Checkpoint(self.step, self.method.state_dict())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit as without the interruption."""
        self.method.load_state_dict(checkpoint.state)
        self.step = checkpoint.step


def objective_of(
    name: str, output: Output, pairs: Sequence[Pair], setting: str | None = None
) -> tuple[str, Objective]:
    """An objective and the name under which it is logged.

    Raises ConfigError if it does not apply to the model's outputs or to the prompts; `setting` is
    how the user asked for it.
    """
    setting = setting or f"trainer.objective={name}"
    if output is not Output.logits:
        if name != "kl":
            raise ConfigError(
                f"{setting} needs logits, but this model outputs values; leave it out"
            )
        return "unexplained", mean_unexplained_variance
    if "logit_difference" in name and not all(pair.distractor_ids for pair in pairs):
        raise ConfigError(f'{setting} needs a "distractor" on every line of the prompts')
    if name == "cross_entropy" and any(-1 in pair.target_ids for pair in pairs):
        raise ConfigError(
            "trainer.objective=cross_entropy needs all tokens to predict; some target_ids are null"
        )
    return name, OBJECTIVES[name]


# ---------------------------------------------------------------------------------------- the loop

Listener = Callable[[StepMetrics], object]


class Store(Protocol):
    """Where a run keeps its checkpoints and metrics: a folder, `path`."""

    path: Path

    def latest(self) -> Checkpoint | None: ...
    def save(self, checkpoint: Checkpoint) -> None: ...
    def log(self, metrics: dict[str, Any]) -> None: ...
    def truncate_log(self, step: int) -> None: ...


class Stepper(Protocol):
    """What `train` runs: a `Trainer`, or an `Attributor`, whose steps learn nothing."""

    world: World
    step: int
    steps: int
    checkpoint_every: int

    def train_step(self) -> StepMetrics: ...
    def checkpoint(self) -> Checkpoint: ...
    def restore(self, checkpoint: Checkpoint) -> None: ...


def train(
    trainer: Stepper, *, store: Store | None = None, listeners: Sequence[Listener] = ()
) -> None:
    """Train to the end, from the latest checkpoint of the store if it has one.

    A stop signal ends training after the current step; a second one interrupts at once, except
    under several processes, whose launchers repeat signals and kill what takes too long.

    Args:
        trainer: at step 0. Each process has its own; all read the checkpoint, and rank 0 writes.
        store: where checkpoints and metrics are kept; None writes nothing and handles no signals.
        listeners: called after each step.

    Raises:
        Interrupted: by a signal (see `on_stop_signals`), after a checkpoint was saved.
        TrainingError: the loss is not finite; the state before it is saved.
        CheckpointError: a checkpoint cannot be written or does not fit.
    """
    alone, received = trainer.world.count == 1, []
    if store is None:
        return _train(trainer, store, listeners, received)

    def receive(number: int, frame: object) -> None:
        if received and alone and number != signal.SIGHUP:  # shell and terminal both send SIGHUP
            raise KeyboardInterrupt
        received.append(number)

    checkpoint = store.latest()
    if checkpoint is not None:
        trainer.restore(checkpoint)
        log.info(f"resuming from step {trainer.step} of {trainer.steps}")
    trainer.world.check_same("the checkpoints", str(trainer.step))
    if trainer.world.is_rank_zero:
        store.truncate_log(trainer.step)
    # With several processes, one that fails ignores signals until it has reported the reason.
    with on_stop_signals(receive, restore_on_error=alone):
        _train(trainer, store, listeners, received)


def _train(
    trainer: Stepper, store: Store | None, listeners: Sequence[Listener], received: list[int]
) -> None:
    """Do the steps that remain, until a signal is received."""
    world, saved = trainer.world, trainer.step
    writes = store is not None and world.is_rank_zero
    while trainer.step < trainer.steps:
        try:
            metrics = trainer.train_step()
        except (TrainingError, ProcessError, torch.OutOfMemoryError):
            if writes and trainer.step != saved:
                store.save(trainer.checkpoint())
            raise
        is_last = trainer.step == trainer.steps
        if writes:
            store.log(metrics.to_dict())
        for listener in listeners:
            listener(metrics)
        stop = world.any(bool(received))
        if is_last or stop or trainer.step % trainer.checkpoint_every == 0:
            saved = trainer.step
            if writes:
                store.save(trainer.checkpoint())
        if stop:
            world.any(False)  # wait until rank 0 has saved
            number = received[0] if received else signal.SIGTERM
            stopped = f"stopped by {signal.Signals(number).name} after step {trainer.step}"
            hint = "continue with the same command and resume=auto"
            raise Interrupted(f"{stopped}, saved in {store.path}; {hint}", number)
