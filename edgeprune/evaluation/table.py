"""A table of text, for the console and for pages."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Cells of text; a column of names has the heading "".

    `shades` [row, column - 1], in [0, 1], are colours of the cells after each row's first.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    shades: Sequence[Sequence[float]] = ()
