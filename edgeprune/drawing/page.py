"""One self-contained HTML page: pictures are embedded, nothing is loaded, all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, FileSystemLoader


class Picture(TypedDict):
    """An .svg file, which must exist when the page is rendered, and its description."""

    path: Path
    alt: str


class Section(TypedDict, total=False):
    """A part of a page, shown in the order of the keys; all are optional.

    `tables` are of `evaluation.table.Table`. `details` are sections shown on a click on their
    `heading`; `sections` are nested sections.
    """

    heading: str
    notes: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Any]
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
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.get_template("page.html.j2").render(title=title, sections=sections)
