"""Progress of long work: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

log = logging.getLogger("edgeprune")


@contextmanager
def progress(
    total: int, text: str, *, enabled: bool = True
) -> Iterator[Callable[[int, object], None]]:
    """Show the progress of `total` units of work.

    Args:
        total: number of units.
        text: what a unit is called, such as "step".
        enabled: if False, nothing is shown.

    Yields:
        A function to call with the number of units done and something to show next to it.
    """
    if not enabled:
        yield lambda done, status="": None
    elif sys.stderr.isatty():
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(text, total=total)
            yield lambda done, status="": bar.update(
                task, completed=done, description=f"{text} {done}/{total}  {status}"
            )
    else:
        yield _log_quarters(total, text)


def _log_quarters(total: int, text: str) -> Callable[[int, object], None]:
    """Log the first call and each quarter of the work."""
    start, last = time.perf_counter(), -1

    def show(done: int, status: object = "") -> None:
        nonlocal last
        quarter = 4 * done // total
        if quarter > last:
            seconds = time.perf_counter() - start
            log.info(f"{text} {done}/{total}  {status}  {seconds:.0f} s")
            last = quarter

    return show
