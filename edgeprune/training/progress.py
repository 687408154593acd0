"""A progress bar for training: on a terminal a bar, in a log a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgeprune.training.trainer import StepMetrics

LOG_LINES = 20
"""How many lines a whole run writes where there is no terminal."""


@contextmanager
def training_progress(
    steps: int, *, enabled: bool = True
) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields a function to be called after each step.

    Args:
        steps: of the whole run.
        enabled: without, nothing is shown.
    """
    if not enabled:
        yield lambda metrics: None
    elif sys.stderr.isatty():
        with _bar(steps) as show:
            yield show
    else:
        yield _log_lines(steps)


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[StepMetrics], None]]:
    columns = [
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    rate = _Rate()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps, text="")
        yield lambda metrics: progress.update(
            task, completed=metrics.step, text=_text(metrics, rate.after(metrics.step))
        )


def _log_lines(steps: int) -> Callable[[StepMetrics], None]:
    rate = _Rate()
    every = max(1, steps // LOG_LINES)

    def show(metrics: StepMetrics) -> None:
        per_second = rate.after(metrics.step)
        if metrics.step % every == 0 or metrics.step == steps:
            text = _text(metrics, per_second)
            with suppress(BrokenPipeError):  # nobody reads any more
                print(f"step {metrics.step}/{steps}  {text}", file=sys.stderr, flush=True)

    return show


def _text(metrics: StepMetrics, per_second: float) -> str:
    text = (
        f"unexplained {metrics.unexplained:.3f}" if metrics.kl is None else f"KL {metrics.kl:.3f}"
    )
    text += f"  sparsity {metrics.sparsity:.3f}"
    if metrics.target is not None:
        text += f"  target {metrics.target:.3f}"
    if metrics.node_sparsity is not None:
        text += f"  nodes {metrics.node_sparsity:.3f}/{metrics.node_target:.3f}"
    return f"{text}  {per_second:.1f} steps/s"


class _Rate:
    """Steps a second since the first step seen (which pays for the start-up)."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> float:
        now = time.perf_counter()
        if self._first is None:
            self._first = (step, now)
            return 0.0
        return (step - self._first[0]) / max(1e-9, now - self._first[1])
