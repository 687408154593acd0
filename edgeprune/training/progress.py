"""Where the numbers of a run are shown: a progress bar or a few lines, and Weights & Biases."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from edgeprune.training.trainer import StepMetrics

log = logging.getLogger("edgeprune")


@contextmanager
def progress(total: int, unit: str, *, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Show the progress of `total` units of work, such as steps.

    Yields a function to call with the number of units done and, optionally, something to show next
    to it.
    """
    start, quarters = time.perf_counter(), set()

    def log_quarters(done: int, status: object = "") -> None:
        if done and 4 * done // total not in quarters:
            quarters.add(4 * done // total)
            log.info(f"{unit} {done}/{total}  {status}  {time.perf_counter() - start:.0f} s")

    if enabled and not sys.stderr.isatty():
        yield log_quarters
        return
    with Progress(console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(unit, total=total)
        yield lambda done, status="": bar.update(
            task, completed=done, description=f"{unit} {done}/{total}  {status}"
        )


@contextmanager
def counting(total: int, unit: str) -> Iterator[Callable[[float], None]]:
    """Show the progress of about `total` units, and how long they will take.

    Yields a function that adds to their number.
    """
    start, done = time.perf_counter(), 0.0
    with progress(total, unit) as show:

        def add(number: float) -> None:
            nonlocal done
            done = min(done + number, total)
            status = ""
            if 0 < done < total:
                seconds = (time.perf_counter() - start) / done * (total - done)
                status = f"about {duration(seconds)} left"
            show(round(done), status)

        yield add


def duration(seconds: float) -> str:
    """A duration in words, such as "3 minutes"; "90 s" if it is less than two minutes."""
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(1, round(seconds))} s"


@contextmanager
def open_tracker(
    project: str, run_dir: Path, settings: dict[str, Any]
) -> Iterator[Callable[[StepMetrics], None]]:
    """Open a wandb run, offline without an API key; yields a function that logs a step."""
    import wandb

    mode = None if _has_key() or "WANDB_MODE" in os.environ else "offline"
    run = wandb.init(project=project, name=run_dir.name, dir=run_dir, config=settings, mode=mode)
    exit_code = 1
    try:
        yield lambda metrics: run.log(
            {name: x for name, x in metrics.to_dict().items() if x is not None}, step=metrics.step
        )
        exit_code = 0
    finally:
        run.finish(exit_code)


def _has_key() -> bool:
    """Whether wandb has an API key, in the environment or in the file in which it saves one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    try:
        return b"wandb" in Path(netrc).read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning(f"no wandb key is read from {netrc} ({error.strerror}); wandb stays offline")
        return False
