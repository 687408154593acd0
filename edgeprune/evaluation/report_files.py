"""The files of a report: CSV, plots of frontiers, consensus circuits, and one page."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeprune.drawing import Curve, Panel, draw_circuit, draw_frontier, render_page
from edgeprune.drawing.page import Section
from edgeprune.errors import GraphvizMissing
from edgeprune.evaluation.compare import times_kept
from edgeprune.evaluation.report import (
    BASELINES,
    HEADLINES,
    REPORTED,
    Group,
    Point,
    RunRecord,
    Series,
    frontier_table,
)
from edgeprune.evaluation.table import Table
from edgeprune.files import write_text
from edgeprune.formats import write_circuit
from edgeprune.metrics import METRICS, Metric

log = logging.getLogger("edgeprune")

MAX_SEEDS = 24
"""The page shows the overlap of each pair for at most this many seeds; stability.csv has all."""
NOTE = (
    "Lines and numbers are means over seeds; bands and the ranges in brackets go from the lowest "
    "seed to the highest. Edge IoU is the intersection over union of the edges of two seeds, "
    "averaged over all pairs of seeds. "
) + "; ".join(f"{metric.label}: {metric.description}" for metric in REPORTED) + "."  # fmt: skip


def write_report(
    groups: Sequence[Group], folder: Path, title: str = "edgeprune report"
) -> list[Path]:
    """Write runs.csv, frontier.csv, stability.csv, edges.csv, plots, consensus/ and report.html.

    Args:
        groups: from `group_runs`.
        folder: where to write; exists and is empty.
        title: title of the page.

    Returns:
        The files.
    """
    _write_tables(groups, folder)
    sections = [Section(notes=[NOTE])]
    for group, name in zip(groups, _file_names(groups), strict=True):
        sections.append(
            Section(
                heading=f"{group.title}, {group.num_edges:,} edges; {group.prompts}",
                pictures=_draw_frontier(group, folder, name),
                sections=[
                    _series_section(group, series, folder, _file_name(name, f"series-{number}"))
                    for number, series in enumerate(group.series, 1)
                ],
            )
        )
    if any(folder.glob("consensus/*/circuit.dot")):
        log.warning("Graphviz is not installed, so the page shows no circuits; they are .dot files")
    write_text(folder / "report.html", render_page(title, sections))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _series_section(group: Group, series: Series, folder: Path, name: str) -> Section:
    return Section(
        heading=series.name,
        tables=[frontier_table(group, series, REPORTED, ranges=True)],
        details=[
            _stability(point, folder, f"consensus/{_file_name(name, point.requested)}")
            for point in series.points
            if len(point.runs) > 1
        ],
    )


def _file_name(*parts: str) -> str:
    name = re.sub(r"[^\w.=+-]+", "-", "-".join(parts)).strip("-.")
    return name or "runs"


def _file_names(groups: Sequence[Group]) -> list[str]:
    """One name per group; groups of the same title, which differ in their graphs, are numbered."""
    names = [_file_name(group.task, group.model, group.ablation) for group in groups]
    return [
        f"{name}-{number}" if names.count(name) > 1 else name
        for number, name in enumerate(names, 1)
    ]


# -------------------------------------------------------------------------------------------- CSV


def _write_tables(groups: Sequence[Group], folder: Path) -> None:
    tables: dict[str, list[dict[str, Any]]] = {
        "runs": [], "frontier": [], "stability": [], "edges": []
    }  # fmt: skip
    for group in groups:
        for series in group.series:
            for point in series.points:
                where = {
                    "task": group.task, "model": group.model, "ablation": group.ablation,
                    "series": series.name, "asked": point.requested,
                }  # fmt: skip
                for rows, new in zip(tables.values(), _point_rows(group, point), strict=True):
                    rows += [{**where, **row} for row in new]
    for name, rows in tables.items():
        columns = list(rows[0]) if rows else ["task", "model", "ablation", "series", "asked"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / f"{name}.csv", text.getvalue())


def _point_rows(group: Group, point: Point) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each CSV file for one point."""
    yield [_run_row(group, run) for run in point.runs]
    size = point.num_edges.mean
    yield [{
        "runs": len(point.runs), "evaluated": point.num_evaluated, "num_edges": size,
        "sparsity": 1 - size / group.num_edges, "split": group.split,
        **{f"{name}_{part}": getattr(point.spread(name), part, None)
           for name in (*(metric.name for metric in REPORTED), "edge_iou", "node_iou")
           for part in ("mean", "low", "high")},
    }]  # fmt: skip
    yield [
        {"a": a, "b": b, "edge_iou": overlap.edge_iou, "node_iou": overlap.node_iou,
         "shared_edges": overlap.shared_edges, "shared_nodes": overlap.shared_nodes}
        for (a, b), overlap in point.overlaps.items()
    ]  # fmt: skip
    counts, num_runs = times_kept([run.circuit for run in point.runs]), len(point.runs)
    yield [
        {"writer": writer, "reader": reader, "times_kept": count, "runs": num_runs,
         "share": count / num_runs}
        for (writer, reader), count in counts.items() if num_runs > 1
    ]  # fmt: skip


def _run_row(group: Group, run: RunRecord) -> dict[str, Any]:
    size = run.circuit.sizes()
    connected = size["without_dangling"]
    return {
        "run": run.name, "seed": run.seed, "num_edges": size["num_edges"],
        "sparsity": size["sparsity"], "num_edges_without_dangling": connected["num_edges"],
        "num_nodes_without_dangling": connected["num_nodes"],
        "split": group.split if group.split in run.evaluations else None,
        **{name: run.metric(group.split, "circuit", name) for name in METRICS},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ plots


def _draw_frontier(group: Group, folder: Path, name: str) -> dict[str, Path]:
    """Draw one panel per headline metric, as .png, .pdf and .svg; the picture for the page.

    Nothing if no run has been evaluated.
    """
    panels = [_panel(group, metric) for metric in HEADLINES if group.has(metric)]
    if not panels:
        log.warning("%s: %s, so there is no plot", group.title, group.prompts)
        return {}
    for suffix in ("png", "pdf", "svg"):
        path = folder / f"frontier-{name}.{suffix}"
        title = f"{group.title}: {group.prompts}"
        draw_frontier(panels, path, title=title, all_edges=group.num_edges)
    labels = ", ".join(panel.label for panel in panels)
    return {f"{labels} against edges kept": path}


def _panel(group: Group, metric: Metric) -> Panel:
    is_distance = metric.better == "lower"
    levels = [
        (label, level) for model, label in BASELINES.items()
        if (level := group.baseline(model, metric.name)) is not None
        and not (is_distance and model == "full")  # which is 0
    ]  # fmt: skip
    curves = [_curve(series, metric) for series in group.series]
    return Panel(metric.description, curves, levels, log=is_distance)


def _curve(series: Series, metric: Metric) -> Curve:
    points = [point for point in series.points if point.spread(metric.name)]
    spreads = [point.spread(metric.name) for point in points]
    return Curve(
        series.name,
        [point.num_edges.mean for point in points],
        *([getattr(spread, part) for spread in spreads] for part in ("mean", "low", "high")),
    )


# -------------------------------------------------------------------------------------- stability


def _stability(point: Point, folder: Path, place: str) -> Section:
    """Write the consensus circuit of a point's runs below the folder; how alike the runs are."""
    circuit, runs = point.consensus, point.runs
    origin = {
        "chosen_by": f"consensus of {len(runs)} runs: {', '.join(run.name for run in runs)}",
        "run": runs[0].folder and os.path.relpath(runs[0].folder, folder / place),
    }
    for format in ("edges", "circuit"):
        write_circuit(circuit, folder / place / f"{format}.json", format, origin=origin)
    counts = Counter(times_kept([run.circuit for run in runs]).values())
    kept = range(len(runs), 0, -1)
    rows = [(f"{times} of {len(runs)}", f"{counts[times]:,}") for times in kept]
    tables = [Table(("kept by", "edges"), rows)]
    if len(runs) <= MAX_SEEDS:
        tables.insert(0, _iou_table(point))
    note = (
        f"The {len(circuit):,} edges that more than half of the seeds keep are the consensus "
        f"circuit, {place}/edges.json. "
    )
    pictures, connected = {}, circuit.without_dangling()
    try:
        path, title = folder / place / "circuit.svg", f"consensus at {point.requested}"
        draw_circuit(connected, path, title=title)
        pictures = {title: path}
        note += f"The drawing shows the {len(connected):,} on paths from the input to the output."
    except GraphvizMissing:  # leaves circuit.dot
        pass
    heading = f"Stability over {len(runs)} seeds at {point.requested}"
    return Section(heading=heading, notes=[note], tables=tables, pictures=pictures)


def _iou_table(point: Point) -> Table:
    """The edge IoU of each pair of runs, shaded by its value."""
    names = [run.name for run in point.runs]
    labels = [f"seed {run.seed}" for run in point.runs]
    if len(set(labels)) < len(labels):
        labels = names
    ious = {frozenset(pair): overlap.edge_iou for pair, overlap in point.overlaps.items()}
    matrix = [[ious.get(frozenset((a, b)), 1.0) for b in names] for a in names]
    rows = [
        (label, *map("{:.3f}".format, values))
        for label, values in zip(labels, matrix, strict=True)
    ]  # fmt: skip
    return Table(("edge IoU", *labels), rows, shades=matrix)
