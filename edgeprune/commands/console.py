"""Printing: results on standard output, everything else on standard error."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from edgeprune.evaluation.table import Table


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
    logger.disabled, logger.propagate, logger.handlers = False, False, [_Handler()]


def print_result(text: str) -> None:
    """Print a line on standard output; never read as markup."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def print_paths(paths: Sequence[Path], what: str = "FILE") -> None:
    """Print where a result was written, or why nowhere; `what` is what output= would name."""
    if paths:
        print_result(f"-> {', '.join(map(str, paths))}")
    else:
        print_result(
            "Nothing was written: circuit, model, prompts or ablation are not those of a run; "
            f"output={what} writes the result."
        )


def print_shaded(tokens: Sequence[tuple[str, tuple[int, int, int], str]]) -> None:
    """Print a line of tokens, each on a colour (red, green, blue), with a value if it has one."""
    line = Text("    ")
    for text, color, value in tokens:
        style = "" if color == (255, 255, 255) else "rgb(0,0,0) on rgb({},{},{})".format(*color)
        line.append(text, style)
        line.append(f"[{value}]" if value else "", "dim")
    OUT.print(line, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table; columns without a heading hold names, which give way to numbers."""
    shown = RichTable(title=Text(table.title), title_justify="left")
    for column in table.columns:
        side = "right" if column else "left"
        shown.add_column(column, justify=side, no_wrap=bool(column), overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    OUT.print(shown)
