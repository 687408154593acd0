"""One self-contained HTML page: pictures inside it, nothing fetched, all text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24262b; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p.note { color: #5a5f69; max-width: 60rem; }
img { max-width: 100%; height: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e5ea; }
th { color: #5a5f69; font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; font-weight: 600; margin: .4rem 0; }
"""
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def page(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: text.
        body: pieces of HTML, as the functions below make them.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def note(text: str) -> str:
    """A paragraph of text."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], shades: Sequence[Sequence[float]] = ()
) -> str:
    """A table of texts; `shades`, 0 to 1 a cell, colour the cells after each row's first."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for number, row in enumerate(rows):
        cells = [f"<td>{html.escape(row[0])}</td>"]
        for place, text in enumerate(row[1:]):
            style = ""
            if shades:
                style = (
                    f' style="background: rgba(0, 114, 178, {shades[number][place] * 0.55:.3f})"'
                )
            cells.append(f"<td{style}>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{chr(10).join(body)}\n</table></div>'


def picture(path: Path, text: str) -> str:
    """A .svg or .png file, put into the page as an image."""
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{TYPES[path.suffix]};base64,{data}"
    return f'<div class="wide"><img alt="{html.escape(text)}" src="{source}"></div>'


def details(summary: str, body: Iterable[str]) -> str:
    """What is shown when clicked on."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(body)}</details>"
