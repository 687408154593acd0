"""Sum up many runs: frontiers of size against faithfulness, and stability over seeds.

Runs with the same task, model and ablation form a group. Within a group, runs whose settings differ
only in seed and requested size form a series, which is one curve. Within a series, runs with the
same requested size form a point, whose spread is over seeds.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.evaluation.compare import Overlap, consensus
from edgeprune.evaluation.table import Table
from edgeprune.metrics import METRICS, Metric
from edgeprune.prompts import SPLITS

log = logging.getLogger("edgeprune")

SIZE = ("sparsity", "num_edges", "trainer.target_sparsity")
"""Settings that request a size."""
REPORTED = tuple(metric for metric in METRICS.values() if metric.better)
"""The metrics that rank circuits."""
HEADLINES = tuple(metric for metric in REPORTED if metric.headline)
"""The metrics of plots and of the console's tables."""
BASELINES = {"full": "full model", "empty": "empty circuit"}
"""Models in an evaluation to compare circuits with, and their labels."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        name: name of its directory.
        settings: flattened settings, such as {'trainer.steps': 600}.
        circuit: the circuit it found.
        evaluations: `Evaluation.to_dict()` by split, all of this circuit, model, data and ablation.
        digests: SHA-256 of its `model` and `data`.
        distinguishing: names of the settings that tell experiments apart. `SIZE`, `seed` and the
            name and path of model and task have a meaning of their own and are ignored here.
        folder: its directory; consensus circuits refer to it.
    """

    name: str
    settings: Mapping[str, Any]
    circuit: Circuit
    evaluations: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]
    distinguishing: Set[str] = frozenset()
    folder: Path | None = None

    @property
    def size(self) -> tuple:
        """The requested size, one value per setting in `SIZE`."""
        return tuple(self.settings.get(key) for key in SIZE)

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    def metric(self, split: str | None, model: str, name: str) -> float | None:
        """A metric of the `circuit`, `full` model or `empty` circuit; None if not measured."""
        return (self.evaluations.get(split or "", {}).get(model) or {}).get(name)


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum of a number over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are not None; None if there are none."""
        known = [value for value in values if value is not None]
        return cls(sum(known) / len(known), min(known), max(known)) if known else None

    def text(self, format: Callable[[float], str], ranges: bool) -> str:
        """Such as '0.061 (0.055–0.070)', or the mean alone."""
        mean, low, high = map(format, (self.mean, self.low, self.high))
        return f"{mean} ({low}–{high})" if ranges and low != high else mean


@dataclass(frozen=True)
class Point:
    """The runs of a series with the same requested size.

    Attributes:
        runs: sorted by seed.
        split: the split whose evaluations are shown.
        requested: the requested size as text.
    """

    runs: tuple[RunRecord, ...]
    split: str | None
    requested: str

    @property
    def num_evaluated(self) -> int:
        return sum(self.split in run.evaluations for run in self.runs)

    @property
    def num_edges(self) -> Spread:
        return Spread.of(len(run.circuit) for run in self.runs)

    def spread(self, name: str) -> Spread | None:
        """Spread of a metric over runs, or of `edge_iou` or `node_iou` over pairs of runs."""
        if name in ("edge_iou", "node_iou"):
            return Spread.of(getattr(overlap, name) for overlap in self.overlaps.values())
        return Spread.of(run.metric(self.split, "circuit", name) for run in self.runs)

    @cached_property
    def overlaps(self) -> dict[tuple[str, str], Overlap]:
        """Overlap of the circuits of each pair of runs, by their names."""
        return {
            (a.name, b.name): Overlap.of(a.circuit, b.circuit)
            for a, b in combinations(self.runs, 2)
        }

    @cached_property
    def consensus(self) -> Circuit:
        """The edges that more than half of the runs keep."""
        return consensus([run.circuit for run in self.runs])


@dataclass(frozen=True)
class Series:
    """One curve: its points, largest circuits first, and the settings that set it apart."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Group:
    """Runs that are shown in one plot.

    Attributes:
        task, model, ablation: what they have in common.
        num_edges: number of edges of the whole graph.
        split: the split whose evaluations are shown; None if no run has been evaluated.
        series: the curves.
    """

    task: str
    model: str
    ablation: str
    num_edges: int
    split: str | None
    series: tuple[Series, ...]

    @property
    def title(self) -> str:
        return f"{self.task} in {self.model}, {self.ablation} ablation"

    @property
    def points(self) -> list[Point]:
        return [point for series in self.series for point in series.points]

    @property
    def runs(self) -> list[RunRecord]:
        return [run for point in self.points for run in point.runs]

    @property
    def evaluated(self) -> bool:
        """Whether any run has been evaluated on the split."""
        return any(self.split in run.evaluations for run in self.runs)

    @property
    def prompts(self) -> str:
        """Which evaluations are shown, as text."""
        if not self.evaluated:
            return f"not evaluated on {self.split} prompts" if self.split else "not evaluated"
        shown = [run.evaluations.get(self.split, {}) for run in self.runs]
        trained_on = any(evaluation.get("training_prompts") for evaluation in shown)
        return f"{self.split} prompts" + (", including training prompts" if trained_on else "")

    def baseline(self, model: str, metric: str) -> float | None:
        """A metric of the `full` model or the `empty` circuit, averaged over runs."""
        spread = Spread.of(run.metric(self.split, model, metric) for run in self.runs)
        return spread and spread.mean

    def has(self, metric: Metric) -> bool:
        """Whether a metric has been measured for any circuit."""
        return any(point.spread(metric.name) for point in self.points)


def group_runs(runs: Sequence[RunRecord], split: str | None = None) -> list[Group]:
    """Sort runs into groups, series and points.

    Args:
        runs: all runs.
        split: whose evaluations are shown; None for the most frequent split of each group.
    """
    tasks, models = _titles(runs, "task", "data"), _titles(runs, "model", "model")
    members = defaultdict(list)
    for run, task, model in zip(runs, tasks, models, strict=True):
        ablation = run.settings.get("ablation.kind", "")
        members[task, model, ablation, run.circuit.graph].append(run)
    groups = []
    for (*names, graph), some in sorted(members.items(), key=lambda item: str(item[0])):
        shown = split or _most_frequent_split(some)
        groups.append(Group(*names, graph.num_edges, shown, _series(some, shown)))
    return groups


def _titles(runs: Sequence[RunRecord], part: str, digest: str) -> list[str]:
    """The name of each run's `task` or `model`.

    A custom one is named after its file or folder. Different ones of the same name show the start
    of their digests, except that generated data differ by seed, and models by dtype and bits.
    """
    keys, digests = [], defaultdict(set)
    for run in runs:
        name, path = (run.settings.get(f"{part}.{key}") for key in ("name", "path"))
        if name == "custom" and path:
            name = Path(path).stem if part == "task" else Path(path).name
        dtype = (run.settings.get("model.dtype"), run.settings.get("model.bits"))
        keys.append((name or "", part == "task" and not path, dtype))
        digests[keys[-1]].add(run.digests[digest])
    titles = []
    for (name, is_generated, dtype), run in zip(keys, runs, strict=True):
        is_ambiguous = not is_generated and len(digests[name, is_generated, dtype]) > 1
        titles.append(f"{name} ({run.digests[digest][:8]})" if is_ambiguous else name)
    return titles


def _most_frequent_split(runs: Sequence[RunRecord]) -> str | None:
    counts = Counter(split for run in runs for split in run.evaluations)
    return max(reversed(SPLITS), key=lambda split: counts[split]) if counts else None


def _series(runs: Sequence[RunRecord], split: str | None) -> tuple[Series, ...]:
    own_meaning = {*SIZE, "seed", "model.name", "model.path", "task.name"}
    keys = {"task.path", *(key for run in runs for key in run.distinguishing)} - own_meaning
    keys = sorted(key for key in keys if len({_setting_text(run, key) for run in runs}) > 1)
    members = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.seed or 0, run.name)):
        name = ", ".join(f"{key}={_setting_text(run, key)}" for key in keys)
        members[name][run.size].append(run)
    series = []
    for name, by_size in sorted(members.items()):
        points = [Point(tuple(some), split, _size_text(size, by_size))
                  for size, some in by_size.items()]  # fmt: skip
        series.append(Series(name, tuple(sorted(points, key=lambda p: -p.num_edges.mean))))
    for point in (point for one in series for point in one.points):
        if len({run.seed for run in point.runs}) < len(point.runs):
            names = ", ".join(run.name for run in point.runs)
            log.warning("%s: runs of the same seed count as several seeds: %s; leave out copies",
                        point.requested, names)  # fmt: skip
    return tuple(series)


def _setting_text(run: RunRecord, key: str) -> str:
    """A setting as text; for the path of data, the start of their digest."""
    value = run.settings.get(key)
    return run.digests["data"][:8] if key == "task.path" and value else str(value)


def _size_text(size: tuple, sizes: Iterable[tuple]) -> str:
    """A size as text; without its target sparsity if another setting identifies it."""
    named = zip((key.split(".")[-1] for key in SIZE), size, strict=True)
    given = {key: value for key, value in named if value is not None}
    if len(given) > 1 and sum(other[:-1] == size[:-1] for other in sizes) == 1:
        del given["target_sparsity"]
    return ", ".join(f"{key} {value}" for key, value in given.items()) or "by threshold"


# ----------------------------------------------------------------------------------------- tables


def frontier_table(
    group: Group, series: Series, metrics: Sequence[Metric] = HEADLINES, *, ranges: bool = False
) -> Table:
    """One row per point, between the full model and the empty circuit.

    Args:
        group, series: what to show.
        metrics: columns; those that no run has are left out.
        ranges: whether minimum and maximum over seeds are shown too.
    """
    metrics = [metric for metric in metrics if group.has(metric)]
    rows = [_frontier_row(group, point, metrics, ranges) for point in series.points]
    if group.evaluated:
        full = _baseline_row(group, metrics, "full", group.num_edges)
        rows = [full, *rows, _baseline_row(group, metrics, "empty", 0)]
    columns = ["", "runs", "edges", "sparsity", *(metric.label for metric in metrics), "edge IoU"]
    name = f"; {series.name}" if series.name else ""
    title = f"{group.title}, {group.num_edges:,} edges; {group.prompts}{name}"
    return Table(columns, rows, title)


def _frontier_row(group: Group, point: Point, metrics: list[Metric], ranges: bool) -> list[str]:
    runs, evaluated, cells = len(point.runs), point.num_evaluated, []
    for metric in metrics:
        spread = point.spread(metric.name)
        cells.append(spread.text(partial(metric.text, like=spread.mean), ranges) if spread else "–")
    iou = point.spread("edge_iou")
    return [
        point.requested,
        f"{runs}" if evaluated in (0, runs) else f"{runs} ({evaluated} evaluated)",
        point.num_edges.text("{:,.0f}".format, ranges),
        f"{1 - point.num_edges.mean / group.num_edges:.4f}",
        *cells,
        iou.text("{:.3f}".format, ranges) if iou else "–",
    ]


def _baseline_row(group: Group, metrics: list[Metric], model: str, num_edges: int) -> list[str]:
    values = [metric.text(group.baseline(model, metric.name)) for metric in metrics]
    sparsity = f"{1 - num_edges / group.num_edges:.4f}"
    return [BASELINES[model], "", f"{num_edges:,}", sparsity, *values, ""]
