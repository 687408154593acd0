"""The report: one HTML file with embedded pictures, which loads nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, FileSystemLoader

FOLDER = Path(__file__).parent
"""Where the templates are, and the style that they share with the page of circuits."""


class Section(TypedDict, total=False):
    """A part of the report, shown in the order of the keys; all are optional.

    `links` maps texts to names of files next to the report, `pictures` maps descriptions to .svg
    files, `tables` are those of `evaluation.table`, `details` are sections that are shown when
    their `heading` is clicked, and `sections` are nested sections.
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
    return render_template("report.html.j2", title=title, sections=sections)


def render_template(name: str, **values: Any) -> str:
    """The HTML of a template in this folder, with the common style; all text is escaped."""
    loader = FileSystemLoader(FOLDER)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    return environment.get_template(name).render(style=style, **values)
