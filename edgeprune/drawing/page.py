"""One self-contained HTML page: pictures are embedded, nothing is loaded, all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from jinja2 import Environment, FileSystemLoader

MIME_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
"""Type of a picture per suffix."""


class Picture(TypedDict):
    """A .svg or .png file, which must exist when the page is rendered, and its description."""

    path: Path | str
    alt: str


class Table(TypedDict, total=False):
    """A table of texts; `shades` [row, column - 1] in [0, 1] colour the cells after the first."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float]]


class Section(TypedDict, total=False):
    """A part of a page, shown in the order of the keys; all are optional.

    `details` are sections shown on a click on their `heading`; `sections` are nested sections.
    """

    heading: str
    notes: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    details: Sequence[Section]
    sections: Sequence[Section]


def render_page(title: str, sections: Sequence[Section]) -> str:
    """An HTML page with a title and sections."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html.j2").render(title=title, sections=sections)


def _data_uri(path: Path | str) -> str:
    path = Path(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return f"data:{MIME_TYPES[path.suffix]};base64,{data}"
