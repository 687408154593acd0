"""The training loop: resuming, checkpoints, the log of metrics, and signals."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeprune.errors import Interrupted, ProcessError, TrainingError
from edgeprune.scale.launch import stop_signals
from edgeprune.training.checkpoint import Checkpoint
from edgeprune.training.trainer import StepMetrics, Trainer

log = logging.getLogger("edgeprune")


class Store(Protocol):
    """Where a run keeps its checkpoints and metrics.

    Attributes:
        path: its folder, for messages.
    """

    path: Path

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; None if there is none."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; raises CheckpointError."""
        ...

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to the log of metrics."""
        ...

    def truncate_log(self, step: int) -> None:
        """Remove the lines of later steps, which will be written again."""
        ...


def train(
    trainer: Trainer,
    *,
    store: Store | None = None,
    on_step: Callable[[StepMetrics], object] | None = None,
    checkpoint_every: int = 100,
    log_every: int = 10,
) -> None:
    """Train to the end, from the latest checkpoint of the store if it has one.

    Args:
        trainer: at step 0. Under several processes each calls this with its own trainer and store;
            all read the checkpoint, and rank 0 alone writes.
        store: where checkpoints and metrics are kept; None writes nothing and handles no signals.
        on_step: called after each step.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.

    Raises:
        Interrupted: by a signal (see `stop_signals`), after a checkpoint was saved.
        TrainingError: the loss is not finite; the state before it is saved.
        CheckpointError: a checkpoint cannot be written or does not fit.
        ConfigError: the processes have read different checkpoints.
    """
    on_step = on_step or (lambda metrics: None)
    if store is None:
        while trainer.step < trainer.steps:
            on_step(trainer.train_step())
        return
    world, writes = trainer.world, trainer.world.is_rank_zero
    saved = _restore_latest(trainer, store)
    if writes:
        store.truncate_log(trainer.step)
    with _stop_signals(alone=world.count == 1) as received:
        while trainer.step < trainer.steps:
            try:
                metrics = trainer.train_step()
            except (TrainingError, ProcessError, torch.OutOfMemoryError):
                if writes and trainer.step != saved:
                    store.save(trainer.checkpoint())
                raise
            is_last = trainer.step == trainer.steps
            if writes and (trainer.step % log_every == 0 or is_last):
                store.log(metrics.to_dict())
            on_step(metrics)
            stop = world.any(bool(received))
            if trainer.step % checkpoint_every == 0 or is_last or stop:
                if writes:
                    store.save(trainer.checkpoint())
                saved = trainer.step
            if stop:
                world.any(False)  # wait until rank 0 has saved
                raise _interrupted(received, trainer, store)


def _restore_latest(trainer: Trainer, store: Store) -> int:
    """Restore the latest checkpoint, the same on every process; returns its step, or 0."""
    checkpoint = store.latest()
    if checkpoint is not None:
        trainer.restore(checkpoint)
        log.info(f"resuming from step {trainer.step} of {trainer.steps}")
    trainer.world.check_same("the checkpoints", str(trainer.step))
    return trainer.step


def _interrupted(received: list[int], trainer: Trainer, store: Store) -> Interrupted:
    number = received[0] if received else signal.SIGTERM
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after step {trainer.step}; a checkpoint was "
        f"saved in {store.path}. Continue with the same command and resume=auto",
        number,
    )


@contextmanager
def _stop_signals(*, alone: bool) -> Iterator[list[int]]:
    """Collect the signals that stop a run, for the loop to act on.

    Args:
        alone: whether this is the run's only process. A second signal then interrupts at once;
            launchers of several processes repeat signals, and kill what takes too long.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if received and alone and number != signal.SIGHUP:  # shell and terminal both send SIGHUP
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, receive) for number in stop_signals()}
    completed = False
    try:
        yield received
        completed = True
    finally:
        if alone or completed:  # else the process is about to exit and must report the reason
            for number, handler in old.items():
                signal.signal(number, handler)
