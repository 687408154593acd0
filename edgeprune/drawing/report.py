"""The report: one HTML file with embedded pictures, which loads nothing; all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, FileSystemLoader

STYLE = Path(__file__).parent / "style.css"
"""Colours and text, as on the page of circuits."""


class Section(TypedDict, total=False):
    """A part of a page, shown in the order of the keys; all are optional.

    `links` are files next to the report by their texts, `pictures` .svg files by their
    descriptions, `tables` those of `evaluation.table`; `details`
    are sections shown on a click on their `heading`, and `sections` are nested sections.
    """

    heading: str
    notes: Sequence[str]
    links: Mapping[str, str]
    pictures: Mapping[str, Path]
    tables: Sequence[Any]
    details: Sequence[Section]
    sections: Sequence[Section]


def render_report(title: str, sections: Sequence[Section]) -> str:
    """An HTML page with a title and sections."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.get_template("report.html.j2").render(
        title=title, sections=sections, style=STYLE.read_text(encoding="utf-8")
    )
