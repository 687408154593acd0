"""The page of `edgeprune report`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeprune.commands.report import COLUMNS, frontier_rows, times_rows
from edgeprune.commands.shared import say
from edgeprune.drawing import page as html

MOST_SEEDS = 24
"""Up to so many runs their overlaps are shown one by one; stability.csv has all."""


def report_page(
    title: str, groups: list, pictures: list[Path | None], consensus: dict[int, Path]
) -> str:
    """One self-contained HTML page.

    Args:
        title: text.
        groups: from `group_runs`.
        pictures: each group's frontier as SVG, or None.
        consensus: where each point's consensus circuit was written, by the point's id.
    """
    return html.page(title, _body(groups, pictures, consensus))


def _body(groups: list, pictures: list[Path | None], consensus: dict[int, Path]) -> Iterator:
    yield html.note(
        "Lines are means over seeds; bands, and brackets in tables, reach from the lowest seed to "
        "the highest. KL is from the full model, in nats per predicted token. Exact match is the "
        "share of prompts on which the circuit predicts what the full model predicts. Edge IoU is "
        "the intersection over the union of two seeds' edges, averaged over every two seeds."
    )
    for group, picture in zip(groups, pictures, strict=True):
        split = f"{group.split} prompts" if group.split else "not evaluated"
        yield html.heading(f"{group.title}, {group.num_edges:,} edges; {split}")
        if picture is not None:
            yield html.picture(picture, "KL, exact match and accuracy against edges kept")
        for series in group.series:
            if series.name:
                yield html.heading(series.name, 3)
            yield html.table(COLUMNS, frontier_rows(series, group.num_edges, ranges=True))
            for point in series.points:
                if point.stability is not None:
                    summary = f"Stability over {len(point.runs)} seeds at {point.asked}"
                    yield html.details(summary, _stability(point, consensus[id(point)]))


def _stability(point: Any, folder: Path) -> Iterator[str]:
    names = [run.name for run in point.runs]
    labels = [f"seed {run.seed}" for run in point.runs]
    if len(set(labels)) < len(labels):
        labels = names
    if len(names) <= MOST_SEEDS:
        ious = {frozenset((a, b)): overlap for a, b, overlap in point.stability.pairs}
        matrix = [
            [1.0 if a == b else ious[frozenset((a, b))].edge_iou for b in names] for a in names
        ]
        rows = [
            (label, *(f"{value:.3f}" for value in row))
            for label, row in zip(labels, matrix, strict=True)
        ]
        yield html.table(("edge IoU", *labels), rows, matrix)
    yield html.table(("kept by", "edges"), times_rows(point))
    circuit = point.stability.consensus
    connected = circuit.without_dangling()
    yield html.note(
        f"The consensus circuit, of the {len(circuit):,} edges that more than half of the seeds "
        f"keep, is in {folder.name}/edges.json. Shown are the {len(connected):,} of them on a path "
        "from the input to the output."
    )
    drawing = _drawing(connected, f"consensus at {point.asked}")
    if drawing is not None:
        yield drawing


def _drawing(circuit: Any, title: str) -> str | None:
    """The circuit by Graphviz, or nothing where that is missing."""
    from edgeprune.drawing import GraphvizMissing, draw_circuit

    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "circuit.svg"
        try:
            draw_circuit(
                circuit.edges,
                path,
                title=title,
                heads_per_kv_head=circuit.graph.heads_per_kv_head,
            )
        except GraphvizMissing:
            say("the page is without drawings of circuits: Graphviz is not on this machine")
            return None
        return html.picture(path, title)
