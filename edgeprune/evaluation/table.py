"""A table of text, for the console and for pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        columns: heading of each column; a column of names has the heading "".
        rows: one text per column.
        title: one line above the table.
        shades: [row, column - 1], in [0, 1], colours of the cells after each row's first; or empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    shades: Sequence[Sequence[float]] = ()
