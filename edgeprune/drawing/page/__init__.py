"""The page of circuits: one HTML file with its own style, scripts and data; it loads nothing.

`render` joins template.html, style.css, page.css and the scripts of `SCRIPTS`, which are plain
JavaScript, one subject a file. The data are JSON (`evaluation/page_data.py`), of which no text
becomes markup: in the file every `<` is escaped, and the scripts only ever set the text of
elements.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from edgeprune.drawing.graphviz import FILL, LINE, ONLY, PARTLY, SHARED

FOLDER = Path(__file__).parent
SCRIPTS = (
    "dom", "model", "state", "scene", "pens", "graph", "curve", "attention", "panels", "explain",
    "details", "prompts", "tokens", "lists", "save", "main",
)  # fmt: skip
"""The scripts, in the order in which they are joined; each uses what the earlier ones define."""
BEGIN, END = '<script type="application/json" id="data">', "</script>"
FRAME_HEIGHT = 760
"""Height of the page in a notebook, in pixels."""


def render(data: dict[str, Any]) -> str:
    """The page of this data, as HTML."""
    colors = {"fill": FILL, "line": LINE, "shared": SHARED, "partly": PARTLY, "only": ONLY}
    data = {**data, "colors": colors}
    style = _read("../style.css") + _read("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_read(f"{s}.js") for s in SCRIPTS) + "})();\n"
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    parts = {
        "policy": _policy(style, script),
        "title": html.escape(data["title"]),
        "style": style,
        "data": text.replace("<", "\\u003c").replace("\u2028", "\\u2028"),
        "script": script,
    }
    page = _read("template.html")
    pieces = page.split("%%")  # text and names in turn
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which only this style and this script take effect."""
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def data_of_page(page: str) -> dict[str, Any]:
    """The data of a page that `render` made; raises ValueError for another file."""
    start = page.index(BEGIN) + len(BEGIN)
    return json.loads(page[start : page.index(END, start)])


def in_frame(page: str) -> str:
    """A frame that shows the page in a notebook, apart from the notebook's own scripts."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0" title="edgeprune"></iframe>'
    )
