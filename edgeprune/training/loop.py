"""The training loop: resuming, checkpoints, the log of metrics, and signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeprune.errors import Interrupted, ProcessError, TrainingError
from edgeprune.scale.launch import on_stop_signals
from edgeprune.training.checkpoint import Checkpoint
from edgeprune.training.trainer import StepMetrics, Trainer

log = logging.getLogger("edgeprune")


class Store(Protocol):
    """Where a run keeps its checkpoints and metrics: a folder, `path`."""

    path: Path

    def latest(self) -> Checkpoint | None: ...
    def save(self, checkpoint: Checkpoint) -> None: ...
    def log(self, metrics: dict[str, Any]) -> None: ...
    def truncate_log(self, step: int) -> None: ...


def train(
    trainer: Trainer,
    *,
    store: Store | None = None,
    on_step: Callable[[StepMetrics], object] = lambda metrics: None,
) -> None:
    """Train to the end, from the latest checkpoint of the store if it has one.

    A stop signal ends training after the current step; a second one interrupts at once, except
    under several processes, whose launchers repeat signals and kill what takes too long.

    Args:
        trainer: at step 0. Under several processes each calls this with its own trainer and store;
            all read the checkpoint, and rank 0 alone writes.
        store: where checkpoints and metrics are kept; None writes nothing and handles no signals.
        on_step: called after each step.

    Raises:
        Interrupted: by a signal (see `on_stop_signals`), after a checkpoint was saved.
        TrainingError: the loss is not finite; the state before it is saved.
        CheckpointError: a checkpoint cannot be written or does not fit.
        ConfigError: the processes have read different checkpoints.
    """
    if store is None:
        while trainer.step < trainer.settings.steps:
            on_step(trainer.train_step())
        return
    checkpoint = store.latest()
    if checkpoint is not None:
        trainer.restore(checkpoint)
        log.info(f"resuming from step {trainer.step} of {trainer.settings.steps}")
    trainer.world.check_same("the checkpoints", str(trainer.step))
    alone, received = trainer.world.count == 1, []

    def receive(number: int, frame: object) -> None:
        if received and alone and number != signal.SIGHUP:  # shell and terminal both send SIGHUP
            raise KeyboardInterrupt
        received.append(number)

    # With several processes, one that fails ignores signals until it has reported the reason.
    with on_stop_signals(receive, restore_on_error=alone):
        _train_and_save(trainer, store, on_step, received)


def _train_and_save(
    trainer: Trainer, store: Store, on_step: Callable[[StepMetrics], object], received: list[int]
) -> None:
    """Do the steps that remain, until a signal is received."""
    settings, world, saved = trainer.settings, trainer.world, trainer.step
    if world.is_rank_zero:
        store.truncate_log(trainer.step)
    while trainer.step < settings.steps:
        try:
            metrics = trainer.train_step()
        except (TrainingError, ProcessError, torch.OutOfMemoryError):
            if world.is_rank_zero and trainer.step != saved:
                store.save(trainer.checkpoint())
            raise
        is_last = trainer.step == settings.steps
        if world.is_rank_zero and (trainer.step % settings.log_every == 0 or is_last):
            store.log(metrics.to_dict())
        on_step(metrics)
        stop = world.any(bool(received))
        if trainer.step % settings.checkpoint_every == 0 or is_last or stop:
            saved = trainer.step
            if world.is_rank_zero:
                store.save(trainer.checkpoint())
        if stop:
            world.any(False)  # wait until rank 0 has saved
            number = received[0] if received else signal.SIGTERM
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {trainer.step}; a checkpoint "
                f"was saved in {store.path}. Continue with the same command and resume=auto",
                number,
            )
