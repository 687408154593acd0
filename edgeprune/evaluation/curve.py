"""Metrics of circuits of many sizes, cut from the same scores, and the choice of one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from edgeprune.drawing import Line, Panel
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.evaluation.evaluate import measure_circuits
from edgeprune.evaluation.table import Table
from edgeprune.files import json_values
from edgeprune.metrics import METRICS, Metric, Metrics
from edgeprune.prompts import Pair, iterate_batches
from edgeprune.scores import EdgeScores

SMALLEST_SHARE = 0.005
"""Smallest measured size, as a share of the edges."""
NUM_SIZES = 12
"""Number of measured sizes, the full model included."""
NUM_REFINED = 5
"""Number of sizes that are measured at once between two others, to choose one (`refine`)."""
MAX_RATIO = 1.1
"""Ratio of neighbouring sizes below which no more are measured between them."""

Rule = Callable[[Metrics, Metrics], bool]
"""Whether a circuit is good enough, given its metrics and those of the empty circuit."""


@dataclass(frozen=True)
class Curve:
    """Metrics by size.

    Attributes:
        points: metrics by number of edges, ascending, from the empty circuit to the full model.
        num_examples: number of prompts.
        prompts: which prompts: "training", "validation" or "test".
    """

    points: Mapping[int, Metrics]
    num_examples: int
    prompts: str = ""

    @property
    def num_edges(self) -> int:
        """Number of edges of the graph."""
        return max(self.points)

    @property
    def empty(self) -> Metrics:
        """Metrics of the empty circuit."""
        return self.points[0]

    def smallest(self, is_good: Rule) -> int:
        """The smallest measured size that is good, as are all larger ones.

        A size that is good by chance, between sizes that are not, is passed over.
        """
        size = self.num_edges
        for larger, metrics in sorted(self.points.items(), reverse=True)[1:]:
            if not is_good(metrics, self.empty):
                break
            size = larger
        return size

    def with_points(self, other: Curve) -> Curve:
        """This curve with the other's points in addition."""
        points = dict(sorted({**other.points, **self.points}.items()))
        return replace(self, points=points)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        points = [{"num_edges": size, **metrics} for size, metrics in self.points.items()]
        about = {"prompts": self.prompts, "num_examples": self.num_examples}
        return json_values({**about, "points": points})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Curve:
        """The inverse of `to_dict`; metrics that a record lacks are NaN."""

        def metrics(values: Mapping[str, Any]) -> Metrics:
            known = {name: values.get(name) for name in METRICS}
            return Metrics({k: math.nan if x is None else x for k, x in known.items()})

        points = {point["num_edges"]: metrics(point) for point in record["points"]}
        if 0 not in points or len(points) < 2:
            raise ValueError("the curve lacks the empty circuit or the full model")
        return cls(points, record["num_examples"], record["prompts"])


def measure_curve(
    model: CircuitModel,
    scores: EdgeScores,
    pairs: Sequence[Pair],
    *,
    ablation: Ablation | str = "interchange",
    batch_size: int = 64,
    sizes: Iterable[int] | None = None,
    listener: Callable[[int], object] | None = None,
) -> Curve:
    """Measure circuits of many sizes.

    Args:
        scores: rank the edges; the circuit of each size has the highest.
        pairs: prompts, which should not be those the scores were learned on.
        ablation: what ablated edges carry, see `evaluate`.
        sizes: numbers of edges, in addition to none and all; None: `default_sizes`.
        listener: called after each batch with the number of prompts done.

    Raises ValueError as `evaluate` does, or if the scores are of another graph.
    """
    if scores.graph != model.graph:
        raise ValueError(f"the scores are of {scores.graph}, but the model has {model.graph}")
    model.check_prompts(pairs)
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    total = scores.graph.num_edges
    sizes = sorted({*(default_sizes(total) if sizes is None else sizes)} - {0, total})
    circuits = [scores.circuit(num_edges=size) for size in (0, *sizes)]
    batches = list(iterate_batches(pairs, batch_size))
    full, *examples = measure_circuits(model, circuits, batches, ablation, listener)
    measured = dict(zip((0, *sizes, total), (*examples, full), strict=True))
    points = {size: Metrics.of(each, full, examples[0]) for size, each in measured.items()}
    return Curve(points, len(pairs))


def default_sizes(total: int, asked: int | None = None) -> list[int]:
    """`NUM_SIZES` sizes, logarithmically spaced, and the size that was asked for.

    They go from `SMALLEST_SHARE` of all edges, or the size asked for if it is smaller, to all.
    """
    low = max(1, min(round(SMALLEST_SHARE * total), asked or total))
    return sorted({*log_sizes(low, total, NUM_SIZES), *([] if asked is None else [asked])})


def log_sizes(low: int, high: int, count: int) -> list[int]:
    """Up to `count` different whole numbers from low to high, logarithmically spaced."""
    steps = max(1, count - 1)
    return sorted({round(low * (high / low) ** (i / steps)) for i in range(count)})


def refine(curve: Curve, is_good: Rule, measure: Callable[[Sequence[int]], Curve]) -> Curve:
    """Measure more sizes until the smallest good one is known (see `Curve.smallest`).

    The next smaller size that was measured is then less than `MAX_RATIO` times smaller. `measure`
    measures the given sizes, as `measure_curve` does.
    """
    while True:
        size = curve.smallest(is_good)
        below = max((smaller for smaller in curve.points if smaller < size), default=0)
        if size - below <= 1 or size < MAX_RATIO * below:
            return curve
        between = {*log_sizes(max(1, below), size, NUM_REFINED + 2)} - {*curve.points}
        curve = curve.with_points(measure(sorted(between)))


def curve_table(curve: Curve, title: str, chosen: int | None = None) -> Table:
    """A row per size, with the metrics that apply; the chosen size is marked."""
    names = ("kl", "error", "exact_match", "accuracy", "logit_difference_recovered")
    rows = sorted(curve.points.items(), reverse=True)
    shown = [METRICS[name] for name in names if not all(math.isnan(m[name]) for _, m in rows)]
    columns = ["", "edges", "sparsity", *(metric.label.replace(" ", "\n") for metric in shown)]
    marks = {curve.num_edges: ["full model"], 0: ["empty circuit"]}
    if chosen is not None:
        marks.setdefault(chosen, []).append("chosen")
    table = [
        [", ".join(marks.get(size, [])), f"{size:,}", f"{1 - size / curve.num_edges:.2%}",
         *(metric.text(metrics[metric.name]) for metric in shown)]
        for size, metrics in rows
    ]  # fmt: skip
    return Table(columns, table, title)


def curve_panels(series: Mapping[str, Sequence[Curve]]) -> list[Panel]:
    """A panel per headline metric, to plot curves against the number of edges.

    Args:
        series: curves of runs that differ in their seed, by name. A line goes through the means at
            the sizes that all have, in a band from the lowest to the highest.
    """
    curves = [curve for some in series.values() for curve in some]
    headlines = [metric for metric in METRICS.values() if metric.headline]
    return [
        _panel(series, metric)
        for metric in headlines
        if not any(math.isnan(curve.empty[metric.name]) for curve in curves)
    ]


def _panel(series: Mapping[str, Sequence[Curve]], metric: Metric) -> Panel:
    is_distance = metric.better == "lower"  # which is 0 for the full model
    lines = []
    for name, curves in series.items():
        shared = set.intersection(*({*curve.points} for curve in curves))
        sizes = sorted(shared - {0, max(shared)}, reverse=True)
        values = [[curve.points[size][metric.name] for curve in curves] for size in sizes]
        lines.append(Line(name, sizes, *(list(map(f, values)) for f in (fmean, min, max))))
    curves = [curve for some in series.values() for curve in some]
    full = [curve.points[curve.num_edges][metric.name] for curve in curves]
    empty = [curve.empty[metric.name] for curve in curves]
    levels = [("full model", fmean(full)), ("empty circuit", fmean(empty))]
    return Panel(metric.description, lines, levels[is_distance:], log=is_distance)
