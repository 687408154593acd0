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
    total: int, unit: str, *, enabled: bool = True
) -> Iterator[Callable[[int, object], None]]:
    """Show the progress of `total` units of work, such as steps, unless it is disabled.

    Yields:
        A function to call with the number of units done and something to show next to it.
    """
    start, quarters = time.perf_counter(), set()

    def log_quarters(done: int, status: object) -> None:
        if 4 * done // total not in quarters:
            quarters.add(4 * done // total)
            seconds = time.perf_counter() - start
            log.info(f"{unit} {done}/{total}  {status}  {seconds:.0f} s")

    if not enabled:
        yield lambda done, status: None
    elif not sys.stderr.isatty():
        yield log_quarters
    else:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(unit, total=total)
            yield lambda done, status: bar.update(
                task, completed=done, description=f"{unit} {done}/{total}  {status}"
            )
