"""Summarise many runs: frontiers of size against faithfulness, and stability over seeds.

Runs with the same task, model and ablation form a group, which is one plot. Within a group, runs
whose settings differ only in seed and in the choice of the circuit form a series. Within a series,
runs that chose their circuit in the same way form a point, whose spread is over seeds; its line in
the plot goes through the circuits of every size that these runs measured.
"""

import csv
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from edgeprune.circuit import Circuit
from edgeprune.drawing import draw_circuit, draw_frontier, draw_matrices, render_report
from edgeprune.drawing.report import Section
from edgeprune.errors import GraphvizMissing
from edgeprune.evaluation.compare import consensus, overlap, times_kept
from edgeprune.evaluation.curve import Curve, curve_panels
from edgeprune.evaluation.finding import in_words
from edgeprune.evaluation.specificity import Specificity
from edgeprune.evaluation.table import Table
from edgeprune.files import write_text
from edgeprune.formats import write_circuit
from edgeprune.metrics import METRICS, Metric
from edgeprune.prompts import SPLITS

log = logging.getLogger("edgeprune")

SIZE = ("sparsity", "num_edges", "max_kl", "min_exact_match", "trainer.target_sparsity")
"""Settings that say how the circuit is chosen."""
REPORTED = [metric for metric in METRICS.values() if metric.better]
"""The metrics that rank circuits."""
HEADLINES = [metric for metric in REPORTED if metric.headline]
"""The metrics of plots and of the console's tables."""
NOTE = (
    "Numbers are means over seeds; brackets and bands go from the lowest seed to the highest. "
    "Edge IoU is the intersection over union of two seeds' edges, averaged over pairs of seeds. "
    + "; ".join(f"{metric.label}: {metric.description}" for metric in REPORTED)
)
"""The first paragraph of the page."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run."""

    name: str
    settings: Mapping[str, Any]  # flattened, such as {"trainer.steps": 600}
    circuit: Circuit
    evaluations: Mapping[str, Mapping[str, Any]]  # `Evaluation.to_dict()` by split
    curve: Curve | None  # circuits of every size
    digests: Mapping[str, str]  # SHA-256 of its `model` and `data`
    distinguishing: Set[str]  # names of the settings that tell experiments apart
    origin: Mapping[str, Any]  # metadata for the files of consensus circuits


class Spread(NamedTuple):
    """Mean, minimum and maximum of a number over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """The spread of the values that are not None; None if there are none."""
        known = [value for value in values if value is not None]
        return cls(fmean(known), min(known), max(known)) if known else None


def _spreads(evaluations: Iterable[Mapping[str, Any]], model: str) -> dict[str, Spread | None]:
    """The spread of each metric of the `circuit`, the `full` model or the `empty` circuit."""
    return {name: Spread.of(e[model].get(name) for e in evaluations) for name in METRICS}


class Point:
    """The runs of a series that chose their circuits in the same way, sorted by seed.

    `evaluations` are those on the shown split; some runs may have none. `spreads` has `num_edges`,
    every metric, and `edge_iou` over pairs of runs; None where nothing was measured.
    """

    def __init__(self, requested: str, runs: Sequence[RunRecord], split: str | None) -> None:
        self.requested = requested
        self.runs = runs
        self.evaluations = [run.evaluations[split] for run in runs if split in run.evaluations]
        ious = (overlap(a.circuit, b.circuit)["edge_iou"] for a, b in combinations(runs, 2))
        self.spreads = _spreads(self.evaluations, "circuit")
        self.spreads["num_edges"] = Spread.of(len(run.circuit) for run in runs)
        self.spreads["edge_iou"] = Spread.of(ious)


@dataclass(frozen=True)
class Group:
    """Runs of one task, model, ablation and graph.

    `split` is the one whose evaluations are shown; None if no run has been evaluated. `series` maps
    the settings that set a series apart, as text, to its points, the largest circuits first.
    """

    task: str
    model: str
    ablation: str
    num_edges: int
    split: str | None
    series: Mapping[str, Sequence[Point]]

    @property
    def points(self) -> list[Point]:
        return [point for points in self.series.values() for point in points]

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        return [evaluation for point in self.points for evaluation in point.evaluations]

    @property
    def title(self) -> str:
        prompts = f"{self.split} prompts" if self.evaluations else "not evaluated"
        if any(evaluation.get("training_prompts") for evaluation in self.evaluations):
            prompts += ", including training prompts"
        return f"{self.task} in {self.model}, {self.ablation} ablation: {prompts}"

    def baselines(self) -> dict[str, dict[str, Spread | None]]:
        """Size and metrics of the full model and the empty circuit, by label."""
        full, empty = (_spreads(self.evaluations, model) for model in ("full", "empty"))
        full["num_edges"], empty["num_edges"] = Spread.of([self.num_edges]), Spread.of([0])
        return {"full model": full, "empty circuit": empty}

    def measured(self, metrics: Sequence[Metric]) -> list[Metric]:
        return [m for m in metrics if any(point.spreads[m.name] for point in self.points)]


def group_runs(runs: Sequence[RunRecord], split: str | None = None) -> list[Group]:
    """Sort runs into groups, series and points; without a split, each group's most frequent one."""
    members = defaultdict(list)
    for run in runs:
        names = (_title(run, "task"), _title(run, "model"), run.settings.get("ablation.kind", ""))
        members[*names, run.circuit.graph].append(run)
    groups = []
    for (*names, graph), some in sorted(members.items(), key=lambda item: str(item[0])):
        counts = Counter(name for run in some for name in run.evaluations)
        shown = split or (max(reversed(SPLITS), key=counts.__getitem__) if counts else None)
        groups.append(Group(*names, graph.num_edges, shown, _series(some, shown)))
    return groups


def _title(run: RunRecord, part: str) -> str:
    """The name of a run's `task` or `model`; a custom one is named after its file or folder."""
    name, path = (run.settings.get(f"{part}.{key}") for key in ("name", "path"))
    return Path(path).name.removesuffix(".jsonl") if name == "custom" and path else name or ""


def _series(runs: Sequence[RunRecord], split: str | None) -> dict[str, list[Point]]:
    keys = set().union(*(run.distinguishing for run in runs)) - {*SIZE, "seed"}
    keys = keys - {"task.name", "model.name"} | {"task.path", "model.path"}
    keys = sorted(key for key in keys if len({_setting(run, key) for run in runs}) > 1)
    members = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.settings.get("seed") or 0, run.name)):
        own = [key for key in keys if key in run.settings]  # prune and attribute have others
        name = ", ".join(f"{key}={_setting(run, key)}" for key in own)
        members[name][tuple(map(run.settings.get, SIZE))].append(run)
    series = {}
    for name, sizes in sorted(members.items()):
        points = [Point(_size(size, sizes), some, split) for size, some in sizes.items()]
        series[name] = sorted(points, key=lambda point: -point.spreads["num_edges"].mean)
    return series


def _setting(run: RunRecord, key: str) -> str:
    """A setting as text; for the path of a model or of data, the start of its digest."""
    value = run.settings.get(key)
    digest = {"task.path": "data", "model.path": "model"}.get(key)
    return run.digests[digest][:8] if digest and value else str(value)


def _size(size: tuple, sizes: Iterable[tuple]) -> str:
    """A size as text; without its target sparsity if another setting identifies it."""
    values = zip(SIZE, size, strict=True)
    given = [f"{key.split('.')[-1]} {value}" for key, value in values if value is not None]
    if len(given) > 1 and sum(other[:-1] == size[:-1] for other in sizes) == 1:
        given.pop()  # the target sparsity
    return ", ".join(given) or "default"


def frontier_table(group: Group, series: str, *, detailed: bool = False) -> Table:
    """One row per point of a series; a detailed one has all metrics, and ranges over seeds."""
    metrics = group.measured(REPORTED if detailed else HEADLINES)

    def text(spread: Spread | None, format: Callable[[float], str]) -> str:
        if spread is None:
            return "–"
        mean, low, high = map(format, spread)
        return f"{mean} ({low}–{high})" if detailed and low != high else mean

    def row(name: str, runs: str, spreads: Mapping[str, Spread | None]) -> list[str]:
        size = spreads["num_edges"]
        sizes = [text(size, "{:,.0f}".format), f"{1 - size.mean / group.num_edges:.4f}"]
        iou = text(spreads.get("edge_iou"), "{:.3f}".format)
        return [name, runs, *sizes, *(text(spreads[m.name], m.text) for m in metrics), iou]

    rows = []
    for point in group.series[series]:
        runs, evaluated = len(point.runs), len(point.evaluations)
        some = f"{runs}" if evaluated in (0, runs) else f"{runs} ({evaluated} evaluated)"
        rows.append(row(point.requested, some, point.spreads))
    if group.evaluations:
        full, empty = (row(name, "", spreads) for name, spreads in group.baselines().items())
        rows = [full, *rows, empty]
    labels = [metric.label.replace(" ", "\n") for metric in metrics]
    title = f"{group.title}; {group.num_edges:,} edges" + (f"; {series}" if series else "")
    return Table(["", "runs", "edges", "sparsity", *labels, "edge\nIoU"], rows, title)


def write_report(
    groups: Sequence[Group], folder: Path, title: str = "edgeprune report",
    specificities: Mapping[str, Specificity] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Write runs.csv, edges.csv, plots, consensus/ and report.html into a folder.

    The report links to the groups' pages that are in the folder (`page_name`). `specificities` are
    shown under their titles.
    """
    _write_csv_files(groups, folder)
    sections = [Section(notes=[NOTE])]
    for group, name in zip(groups, file_names(groups), strict=True):
        section = Section(heading=f"{group.title}; {group.num_edges:,} edges", sections=[])
        if (folder / page_name(name)).exists():
            section["links"] = {"Look into these circuits at every size": page_name(name)}
        section["pictures"] = _draw_frontier(group, folder, name)
        for index, (series, points) in enumerate(group.series.items(), 1):
            place = f"consensus/{name}-series-{index}"
            details = [_stability(point, folder, place) for point in points if len(point.runs) > 1]
            table = frontier_table(group, series, detailed=True)
            section["sections"] += [Section(heading=series, tables=[table], details=details)]
        sections.append(section)
    sections += [_specificity(found, name, folder) for name, found in specificities.items()]
    if any(folder.glob("consensus/*/circuit.dot")):
        log.warning("Graphviz is not installed, so the page shows no circuits; they are .dot files")
    write_text(folder / "report.html", render_report(title, sections))


def file_names(groups: Sequence[Group]) -> list[str]:
    """A name per group for its files; groups that differ in their graphs alone are numbered."""
    names = [_file_name(group.task, group.model, group.ablation) for group in groups]
    numbered = enumerate(names, 1)
    return [f"{name}-{number}" if names.count(name) > 1 else name for number, name in numbered]


def page_name(name: str) -> str:
    """The file of the page of a group, given the group's name."""
    return f"page-{name}.html"


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", "-".join(parts)).strip("-.") or "runs"


def _write_csv_files(groups: Sequence[Group], folder: Path) -> None:
    """Write runs.csv, with a row per run, and edges.csv, with a row per edge of each point."""
    runs, edges = [], []
    for group in groups:
        names = {"task": group.task, "model": group.model, "ablation": group.ablation}
        for series, points in group.series.items():
            for point in points:
                where = {**names, "series": series, "asked": point.requested}
                runs += [where | _run_row(run, group.split) for run in point.runs]
                num = len(point.runs)
                for (writer, reader), n in times_kept([run.circuit for run in point.runs]).items():
                    edge = {"writer": writer, "reader": reader}
                    edges.append(where | edge | {"times_kept": n, "runs": num, "share": n / num})
    for name, rows in (("runs.csv", runs), ("edges.csv", edges)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0] if rows else (), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def _run_row(run: RunRecord, split: str | None) -> dict[str, Any]:
    connected, evaluation = run.circuit.without_dangling(), run.evaluations.get(split)
    metrics = evaluation["circuit"] if evaluation else {}
    return {
        "run": run.name, "seed": run.settings.get("seed"),
        "num_edges": len(run.circuit), "sparsity": run.circuit.sparsity,
        "num_edges_without_dangling": len(connected),
        "num_nodes_without_dangling": len(connected.nodes),
        "split": split if evaluation else None, **{name: metrics.get(name) for name in METRICS},
    }  # fmt: skip


def _draw_frontier(group: Group, folder: Path, name: str) -> dict[str, Path]:
    """Draw a panel per headline metric, as .png, .pdf and .svg; pictures for the page."""
    lines = {}
    for series, points in group.series.items():
        for point in points:
            label = ", ".join(filter(None, (series, point.requested * (len(points) > 1))))
            lines[label] = [run.curve for run in point.runs if run.curve is not None]
    lines = {label: curves for label, curves in lines.items() if curves}
    if not lines:
        return {}
    prompts = sorted({curve.prompts for curves in lines.values() for curve in curves})
    on = f"{' and '.join(prompts)} prompts"
    title = f"{group.task} in {group.model}, {group.ablation} ablation: {on}"
    for suffix in ("png", "pdf", "svg"):
        path = folder / f"frontier-{name}.{suffix}"
        draw_frontier(curve_panels(lines), path, title=title, all_edges=group.num_edges)
    return {f"circuits of every size, measured on {on}": path}


def _specificity(found: Specificity, title: str, folder: Path) -> Section:
    """Draw how circuits do on the prompts of other tasks."""
    path = folder / f"{_file_name('specificity', title)}.svg"
    draw_matrices(found.matrices(), found.circuits, path, title=title)
    notes = [in_words(found.findings, "The circuits pass")]
    return Section(heading=f"Specificity: {title}", notes=notes, pictures={title: path})


def _stability(point: Point, folder: Path, prefix: str) -> Section:
    """Write the consensus circuit of a point's runs below the folder; how alike the runs are."""
    runs, circuits = point.runs, [run.circuit for run in point.runs]
    names = [run.name for run in runs]
    place, title = f"{prefix}-{_file_name(point.requested)}", f"consensus at {point.requested}"
    circuit = consensus(circuits)
    same = all(run.digests == runs[0].digests for run in runs)
    origin = {key: value for key, value in runs[0].origin.items() if same and key != "run"}
    origin["chosen_by"] = f"consensus of {len(runs)} runs: {', '.join(names)}"
    for format in ("edges", "circuit"):
        write_circuit(circuit, folder / place / f"{format}.json", format, origin=origin)
    connected, pictures = circuit.without_dangling(), {}
    note = (
        f"More than half of the seeds keep {len(circuit):,} edges ({place}/edges.json), of which "
        f"{len(connected):,} lie on paths from input to output."
    )
    with suppress(GraphvizMissing):  # which leaves circuit.dot
        draw_circuit(connected, folder / place / "circuit.svg", title=title)
        pictures[title] = folder / place / "circuit.svg"
    ious = [[overlap(a, b)["edge_iou"] for b in circuits] for a in circuits]
    rows = [(name, *map("{:.3f}".format, row)) for name, row in zip(names, ious, strict=True)]
    counts = Counter(times_kept(circuits).values())
    kept = [(f"{n} of {len(runs)}", f"{counts[n]:,}") for n in range(len(runs), 0, -1)]
    tables = [Table(("edge IoU", *names), rows, shades=ious), Table(("kept by", "edges"), kept)]
    heading = f"Stability over {len(runs)} seeds at {point.requested}"
    return Section(heading=heading, notes=[note], tables=tables, pictures=pictures)
