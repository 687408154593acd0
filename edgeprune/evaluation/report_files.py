"""The files of a report: CSV, plots of frontiers, consensus circuits, and one page."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.drawing import draw_circuit, render_page
from edgeprune.drawing.page import Section
from edgeprune.drawing.plots import Curve, Panel, draw_frontier
from edgeprune.errors import GraphvizMissing
from edgeprune.evaluation.report import (
    BASELINES,
    HEADLINES,
    REPORTED,
    Group,
    Point,
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
    "Lines and numbers are means over seeds; bands, and ranges in brackets, go from the lowest seed "
    "to the highest. Edge IoU is the intersection over union of the edges of two seeds, averaged "
    "over all pairs of seeds. "
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
    files = _write_tables(groups, folder)
    sections = [Section(notes=[NOTE])]
    for group, name in zip(groups, _file_names(groups), strict=True):
        plots = _draw_frontier(group, folder / f"frontier-{name}")
        pictures = [(plots[-1], "frontier of size against faithfulness")] if plots else []
        heading = f"{group.title}, {group.num_edges:,} edges; {group.prompts}"
        sections.append(Section(heading, pictures=pictures))
        for number, series in enumerate(group.series, 1):
            details = []
            for point in series.points:
                if point.stability:
                    curve = f"series-{number}" if len(group.series) > 1 else ""
                    place = Path("consensus", _file_name(name, curve, point.requested))
                    files += _write_consensus(point, folder / place)
                    details.append(_stability_section(point, folder, place))
            table = frontier_table(group, series, REPORTED, ranges=True)
            sections.append(Section(series.name, tables=[table], details=details, level=3))
        files += plots
    write_text(folder / "report.html", render_page(title, sections))
    return [*files, *folder.glob("consensus/*/circuit.svg"), folder / "report.html"]


def _file_name(*parts: str) -> str:
    name = re.sub(r"[^\w.=+-]+", "-", "-".join(filter(None, parts))).strip("-.")
    return name or "runs"


def _file_names(groups: Sequence[Group]) -> list[str]:
    """One name per group; groups of the same title, which differ in their graphs, are numbered."""
    names = [_file_name(group.task, group.model, group.ablation) for group in groups]
    return [
        f"{name}-{number}" if names.count(name) > 1 else name
        for number, name in enumerate(names, 1)
    ]


# -------------------------------------------------------------------------------------------- CSV


def _write_tables(groups: Sequence[Group], folder: Path) -> list[Path]:
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
                for name, rows in _point_rows(group, point).items():
                    tables[name] += [{**where, **row} for row in rows]
    for name, rows in tables.items():
        columns = list(rows[0]) if rows else ["task", "model", "ablation", "series", "asked"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / f"{name}.csv", text.getvalue())
    return [folder / f"{name}.csv" for name in tables]


def _point_rows(group: Group, point: Point) -> dict[str, list[dict[str, Any]]]:
    """The rows of each CSV file for one point."""
    rows = {"runs": _run_rows(group, point), "frontier": [_frontier_row(group, point)]}
    if point.stability:
        num_runs = len(point.runs)
        rows["stability"] = [
            {"a": a, "b": b, "edge_iou": overlap.edge_iou, "node_iou": overlap.node_iou,
             "shared_edges": overlap.shared_edges, "shared_nodes": overlap.shared_nodes}
            for a, b, overlap in point.stability.pairs
        ]  # fmt: skip
        rows["edges"] = [
            {"writer": writer, "reader": reader, "times_kept": count, "runs": num_runs,
             "share": count / num_runs}
            for (writer, reader), count in point.stability.times_kept.items()
        ]  # fmt: skip
    return rows


def _run_rows(group: Group, point: Point) -> list[dict[str, Any]]:
    rows = []
    for run in point.runs:
        size = run.circuit.sizes()
        connected = size["without_dangling"]
        rows.append({
            "run": run.name, "seed": run.seed, "num_edges": size["num_edges"],
            "sparsity": size["sparsity"], "num_edges_without_dangling": connected["num_edges"],
            "num_nodes_without_dangling": connected["num_nodes"],
            "split": group.split if group.split in run.evaluations else None,
            **{name: run.metric(group.split, "circuit", name) for name in METRICS},
        })  # fmt: skip
    return rows


def _frontier_row(group: Group, point: Point) -> dict[str, Any]:
    size = point.num_edges.mean
    row = {
        "runs": len(point.runs), "evaluated": point.num_evaluated, "num_edges": size,
        "sparsity": 1 - size / group.num_edges, "split": group.split,
    }  # fmt: skip
    spreads = {metric.name: point.spread(metric.name) for metric in REPORTED}
    for name in ("edge_iou", "node_iou"):
        spreads[name] = getattr(point.stability, name, None)
    for name, spread in spreads.items():
        for part in ("mean", "low", "high"):
            row[f"{name}_{part}"] = getattr(spread, part, None)
    return row


# ------------------------------------------------------------------------------------------ plots


def _draw_frontier(group: Group, path: Path) -> list[Path]:
    """Draw one panel per headline metric, as .png, .pdf and .svg; nothing without evaluations."""
    panels = [_panel(group, metric) for metric in HEADLINES if group.has(metric)]
    if not panels:
        log.warning("%s: %s, so there is no plot", group.title, group.prompts)
        return []
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "pdf", "svg")]
    for each in paths:
        title = f"{group.title}: {group.prompts}"
        draw_frontier(panels, each, title=title, all_edges=group.num_edges)
    return paths


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
    points = [
        (p.num_edges.mean, spread) for p in series.points if (spread := p.spread(metric.name))
    ]
    return Curve(
        series.name,
        [num_edges for num_edges, _ in points],
        *([getattr(spread, part) for _, spread in points] for part in ("mean", "low", "high")),
    )


# -------------------------------------------------------------------------------------- stability


def _write_consensus(point: Point, folder: Path) -> list[Path]:
    """Write the consensus circuit, and note which runs it comes from."""
    circuit = point.stability.consensus
    names = ", ".join(run.name for run in point.runs)
    run = point.runs[0].folder
    origin = {
        "chosen_by": f"consensus of {len(point.runs)} runs: {names}",
        "run": run and os.path.relpath(run, folder),
    }
    files = {"edges": folder / "edges.json", "circuit": folder / "circuit.json"}
    for format, path in files.items():
        write_circuit(circuit, path, format, origin=origin)
    return list(files.values())


def _stability_section(point: Point, folder: Path, place: Path) -> Section:
    """What is shown about the runs of a point, with their consensus circuit drawn."""
    circuit = point.stability.consensus
    connected = circuit.without_dangling()
    note = (
        f"The consensus circuit, the {len(circuit):,} edges that more than half of the seeds keep, "
        f"is in {place}/edges.json. The drawing shows the {len(connected):,} of them on a path "
        "from the input to the output."
    )
    counts, runs = Counter(point.stability.times_kept.values()), len(point.runs)
    rows = [(f"{times} of {runs}", f"{counts[times]:,}") for times in range(runs, 0, -1)]
    tables = [Table(("kept by", "edges"), rows)]
    if runs <= MAX_SEEDS:
        tables.insert(0, _iou_table(point))
    heading, pictures = f"consensus at {point.requested}", []
    path = folder / place / "circuit.svg"
    try:
        draw_circuit(connected, path, title=heading)
        pictures = [(path, heading)]
    except GraphvizMissing:
        log.warning("Graphviz is not installed, so the page has no drawings of circuits")
    summary = f"Stability over {runs} seeds at {point.requested}"
    return Section(summary, notes=[note], tables=tables, pictures=pictures)


def _iou_table(point: Point) -> Table:
    """The edge IoU of each pair of runs, shaded by its value."""
    names = [run.name for run in point.runs]
    labels = [f"seed {run.seed}" for run in point.runs]
    if len(set(labels)) < len(labels):
        labels = names
    ious = {frozenset((a, b)): overlap.edge_iou for a, b, overlap in point.stability.pairs}
    matrix = [[ious.get(frozenset((a, b)), 1.0) for b in names] for a in names]
    rows = [
        (label, *map("{:.3f}".format, values))
        for label, values in zip(labels, matrix, strict=True)
    ]  # fmt: skip
    return Table(("edge IoU", *labels), rows, shades=matrix)
