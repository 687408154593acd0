"""Printing: results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class _Console(Console):
    """Keeps working when nobody reads the output any more (`| head`), so results are written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


OUT = _Console()
ERR = _Console(stderr=True)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        ERR.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def print_log() -> None:
    """Print the package's log messages on standard error."""
    logger = logging.getLogger("edgeprune")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Handler()]
    logger.propagate = False


def print_result(text: str) -> None:
    """Print a line on standard output; never read as markup."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Name:
    """A table cell that, where it is too long, breaks after a hyphen."""

    label: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = ""
        for part in re.split("(?<=-)", self.label):
            if line and cell_len(line + part) > options.max_width:
                yield Text(line)
                line = ""
            line += part
        yield Text(line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        parts = re.split("(?<=-)", self.label)
        return Measurement(max(map(cell_len, parts)), cell_len(self.label))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns without a heading hold names, which give way to numbers."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column),
                         overflow="fold")  # fmt: skip
    for row in rows:
        cells = zip(columns, row, strict=True)
        table.add_row(*(Text(cell) if column else _Name(cell) for column, cell in cells))
    OUT.print(table)
