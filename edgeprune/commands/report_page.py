"""The page of `edgeprune report`, and its tables as texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeprune.commands.shared import say
from edgeprune.drawing import page as html

if TYPE_CHECKING:
    from edgeprune.circuit import Circuit
    from edgeprune.evaluation.report import Group, Point, Series, Spread

NAMES = {"kl": "KL", "error": "error", "exact_match": "exact match", "accuracy": "accuracy",
         "two_way_accuracy": "two-way accuracy", "logit_difference": "logit difference",
         }  # fmt: skip
"""Of metrics, in tables."""
REFERENCES = {"full": "full model", "corrupted": "every edge closed"}
"""What circuits are to be compared with."""
SHARE = ".3f"
FORMATS = dict.fromkeys(("exact_match", "accuracy", "two_way_accuracy"), SHARE)
"""Of metrics; others have three digits, whatever their size."""
MAX_DECIMALS = 6
MAX_SEEDS = 24
"""Up to so many runs their overlaps are shown one by one; stability.csv has all."""


def report_page(
    title: str, groups: list[Group], pictures: list[Path | None], consensus: dict[str, str]
) -> str:
    """One self-contained HTML page.

    Args:
        title: text.
        groups: from `group_runs`.
        pictures: each group's frontier as SVG, or None.
        consensus: the file of each point's consensus circuit, from the page, by the name of
            the point's first run.
    """
    return html.page(title, _body(groups, pictures, consensus))


def _body(
    groups: list[Group], pictures: list[Path | None], consensus: dict[str, str]
) -> Iterator[str]:
    yield html.note(
        "Lines are means over seeds; bands, and brackets in tables, reach from the lowest seed to "
        "the highest. KL is from the full model, in nats per predicted token. Where outputs are "
        "values, error is the largest absolute difference from the full model's in an example, "
        "averaged over examples. Exact match is the share of prompts on which the circuit predicts "
        "what the full model predicts. Two-way accuracy is the share of prompts on which the "
        "answers are likelier than the distractors, logit difference how much larger their logits "
        "are. Edge IoU is the intersection over the union of two seeds' "
        "edges, averaged over every two seeds."
    )
    for group, picture in zip(groups, pictures, strict=True):
        yield html.heading(f"{group.title}, {group.num_edges:,} edges; {group.prompts}")
        if picture is not None:
            yield html.picture(
                picture, f"{NAMES[group.distance]}, exact match and accuracy against edges kept"
            )
        for series in group.series:
            if series.name:
                yield html.heading(series.name, 3)
            metrics = group.metrics
            yield html.table(columns(metrics), frontier_rows(group, series, metrics, ranges=True))
            for point in series.points:
                if point.stability is not None:
                    summary = f"Stability over {len(point.runs)} seeds at {point.asked}"
                    yield html.details(summary, _stability(point, consensus[point.runs[0].name]))


def _stability(point: Point, file: str) -> Iterator[str]:
    names = [run.name for run in point.runs]
    labels = [f"seed {run.seed}" for run in point.runs]
    if len(set(labels)) < len(labels):
        labels = names
    if len(names) <= MAX_SEEDS:
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
        f"keep, is in {file}. Shown are the {len(connected):,} of them on a path "
        "from the input to the output."
    )
    drawing = _drawing(connected, f"consensus at {point.asked}")
    if drawing is not None:
        yield drawing


def _drawing(circuit: Circuit, title: str) -> str | None:
    """The circuit by Graphviz, or nothing where that is missing."""
    from edgeprune.drawing import GraphvizMissing, draw_circuit

    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "circuit.svg"
        try:
            draw_circuit(circuit, path, title=title)
        except GraphvizMissing:
            say("the page is without drawings of circuits: Graphviz is not on this machine")
            return None
        return html.picture(path, title)


def columns(metrics: Sequence[str]) -> tuple[str, ...]:
    """Of a group's tables; the console shows all but the last."""
    return ("asked for", "runs", "edges", *(NAMES[metric] for metric in metrics), "edge IoU",
            "sparsity")  # fmt: skip


def frontier_rows(
    group: Group, series: Series, metrics: Sequence[str], ranges: bool
) -> list[Sequence[str]]:
    """A series' points as texts, under `columns`: means over seeds, with or without ranges.

    Evaluated ones stand between the full model and that with every edge closed.
    """
    rows = [
        (
            point.asked, _runs_text(point), spread_text(point.num_edges, ",.0f", ranges),
            *(spread_text(point.spread(metric), FORMATS.get(metric), ranges) for metric in metrics),
            spread_text(point.stability and point.stability.edge_iou, SHARE, ranges),
            f"{1 - point.num_edges.mean / group.num_edges:.4f}",
        )
        for point in series.points
    ]  # fmt: skip
    full = _reference_row(group, metrics, "full", group.num_edges)
    corrupted = _reference_row(group, metrics, "corrupted", 0)
    return [full, *rows, corrupted] if group.evaluated else rows


def _reference_row(
    group: Group, metrics: Sequence[str], of: str, num_edges: int
) -> tuple[str, ...]:
    values = [group.reference(of, metric) for metric in metrics]
    texts = [
        "–" if value is None else f"{value:{FORMATS.get(metric) or three_digits(value)}}"
        for metric, value in zip(metrics, values, strict=True)
    ]
    sparsity = f"{1 - num_edges / group.num_edges:.4f}"
    return (REFERENCES[of], "", f"{num_edges:,}", *texts, "", sparsity)


def _runs_text(point: Point) -> str:
    """'3', or '3 (1 evaluated)'."""
    runs, evaluated = len(point.runs), point.num_evaluated
    return f"{runs}" if evaluated in (0, runs) else f"{runs} ({evaluated} evaluated)"


def spread_text(spread: Spread | None, format: str | None, ranges: bool) -> str:
    """'0.061 (0.055–0.070)', or the mean alone; no format: three digits of the mean."""
    if spread is None:
        return "–"
    format = format or three_digits(spread.mean)
    mean, low, high = (f"{value:{format}}" for value in (spread.mean, spread.low, spread.high))
    return f"{mean} ({low}–{high})" if ranges and low != high else mean


def three_digits(value: float) -> str:
    """The format in which a number has three digits, or so many as `MAX_DECIMALS` leave it."""
    if abs(value) < 0.1**MAX_DECIMALS:
        return ".0f"
    return f".{min(max(2 - math.floor(math.log10(abs(value))), 0), MAX_DECIMALS)}f"


def times_rows(point: Point) -> list[tuple[str, str]]:
    """How many edges how many seeds keep, as texts."""
    counts = Counter(point.stability.times_kept.values())
    number = len(point.runs)
    return [(f"{times} of {number}", f"{counts[times]:,}") for times in range(number, 0, -1)]
