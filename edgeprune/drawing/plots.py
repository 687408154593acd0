"""Plots with matplotlib: the progress of a run, and metrics against the size of circuits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#4A4E57")
"""Colours of lines, in order; colour-blind readers can distinguish them."""
MARKERS = "osD^vPX"
"""Markers of lines, in order."""
GREY = "#6B6F78"
"""Colour of axes and levels."""
DASHES = (0, (4, 3))
"""Line style of levels and targets."""
STYLE = {
    "text.parse_math": False, "svg.hashsalt": "edgeprune", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
}  # fmt: skip
"""Settings of matplotlib: text is never parsed as TeX, and the same plot gives the same file."""
ROUNDING = 1e-6
"""KL divergences below this are rounding errors, which may be negative."""
FEW_DECADES = 100
"""A logarithmic y axis with a smaller range has labels between the powers of ten."""
TICK_DISTANCE = 0.1
"""Minimum distance of ticks on the x axis, as a fraction of it; closer labels would overlap."""
LETTER_WIDTH, LINE_HEIGHT = 0.02, 0.06
"""Approximate size of a letter of a level's name, as fractions of the axes."""
LEGEND_ROW = 0.22
"""Height of a line of the legend, in inches."""


@dataclass(frozen=True)
class Curve:
    """A line with a band; all sequences have the same length.

    Attributes:
        name: shown in the legend, unless empty.
        num_edges: x coordinates.
        mid, low, high: y coordinates of the line, and of the band's lower and upper edge.
    """

    name: str
    num_edges: Sequence[float]
    mid: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        label: label of the y axis.
        curves: lines.
        levels: (name, y) of horizontal lines for comparison.
        log: whether the y axis is logarithmic; otherwise it ranges from 0 to 1.
    """

    label: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[str, float]]
    log: bool


def draw_training(metrics: Sequence[dict[str, Any]], path: Path | str, *, title: str) -> None:
    """Plot the distance from the full model, and the gates' sparsity with its target, per step.

    Args:
        metrics: the lines of metrics.jsonl, at least one.
        path: ends in .png, .pdf or .svg.
        title: a line of text at the top.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _save(training_figure(metrics, title), Path(path))


def draw_frontier(panels: Sequence[Panel], path: Path | str, *, title: str, all_edges: int) -> None:
    """Plot panels side by side, with the number of edges as x axis.

    Args:
        panels: at least one.
        path: ends in .png, .pdf or .svg.
        title: a line of text at the top.
        all_edges: number of edges of the graph, shown at the x axis.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _save(frontier_figure(panels, title, all_edges), Path(path))


def _save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, without a date."""
    format = path.suffix.removeprefix(".")
    date = {"pdf": "CreationDate", "svg": "Date"}.get(format)
    metadata = {date: None} if date else None
    write_atomically(
        path,
        lambda temporary: figure.savefig(temporary, format=format, dpi=150, metadata=metadata),
    )


# ------------------------------------------------------------------------------------ training


def training_figure(metrics: Sequence[dict[str, Any]], title: str) -> Figure:
    """The figure of `draw_training`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in metrics]
    marker = "o" if len(steps) == 1 else None  # a line through a single point is invisible

    def draw(ax: Axes, name: str, label: str, **style: Any) -> list[float]:
        values = [line.get(name) for line in metrics]
        if any(value is None for value in values):
            return []
        if ax is left:
            values = [max(value, ROUNDING) for value in values]
        ax.plot(steps, values, label=label, linewidth=1.4, marker=marker, **style)
        return values

    kl = draw(left, "kl", "", color=COLORS[0])
    _log_axis(left, kl + draw(left, "unexplained", "", color=COLORS[0]))
    left.set_ylabel("KL on each step's batch (nats)" if kl else "unexplained variance")
    for kind, prefix, color in (("edge", "", COLORS[1]), ("node", "node_", COLORS[2])):
        draw(right, f"{prefix}sparsity", f"{kind} gates", color=color)
        draw(right, f"{prefix}target", "target", color=color, linestyle=DASHES)
    low, high = right.get_ylim()
    right.set_ylim(min(low, 0.0), max(high, 1.0))
    right.set_ylabel("sparsity of the gates")
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _grid(ax)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


# ------------------------------------------------------------------------------------ frontier


def frontier_figure(panels: Sequence[Panel], title: str, all_edges: int) -> Figure:
    """The figure of `draw_frontier`."""
    from matplotlib.figure import Figure

    names = [curve.name for curve in panels[0].curves]
    num_rows = sum(bool(name) for name in names)
    height = 3.6 + LEGEND_ROW * num_rows
    figure = Figure(figsize=(4.0 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, all_edges)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    if num_rows:
        handles = axes[0].get_lines()[: len(names)]
        figure.legend(handles, names, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _draw_panel(ax: Axes, panel: Panel, all_edges: int) -> None:
    if panel.log:
        panel = replace(panel, curves=[_without_rounding(curve) for curve in panel.curves])
    for index, curve in enumerate(panel.curves):
        color, xs = COLORS[index % len(COLORS)], curve.num_edges
        ax.plot(
            xs, curve.mid, color=color, marker=MARKERS[index % len(MARKERS)], markersize=5,
            linewidth=1.6, label=curve.name, zorder=3, clip_on=False,
        )  # fmt: skip
        ax.fill_between(xs, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        if len(xs) == 1:  # its band has no width
            ax.vlines(xs, curve.low, curve.high, color=color, alpha=0.35, linewidth=5)
    for _, level in panel.levels:
        ax.axhline(level, color=GREY, linewidth=0.9, linestyle=DASHES, zorder=1)
    _size_axis(ax, sorted({x for curve in panel.curves for x in curve.num_edges}))
    ax.set_xlabel(f"edges kept, of {all_edges:,}")
    ax.set_ylabel(panel.label)
    if panel.log:
        drawn = [y for curve in panel.curves for y in (*curve.low, *curve.high)]
        _log_axis(ax, drawn)
        ax.set_ylim(top=1.6 * max([1e-3, *drawn, *(level for _, level in panel.levels)]))
    else:
        ax.set_ylim(-0.03, 1.06)
    _grid(ax)
    _name_levels(ax, panel)


def _without_rounding(curve: Curve) -> Curve:
    """The curve with 0 in place of rounding errors."""
    rounded = {
        name: [0.0 if value < ROUNDING else value for value in getattr(curve, name)]
        for name in ("mid", "low", "high")
    }
    return replace(curve, **rounded)


def _size_axis(ax: Axes, sizes: Sequence[float]) -> None:
    """Make x logarithmic, linear below 1 if there is a size of 0, with the sizes as ticks."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    largest = max([1, *sizes])
    if sizes and sizes[0] > 0:
        ax.set_xscale("log")
        ax.set_xlim(sizes[0] / 1.15, largest * 1.15)
    else:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(-0.2, largest * 1.15)
    transform = ax.xaxis.get_transform().transform
    left, right = transform(ax.get_xlim())
    ticks: list[float] = []  # without those whose labels would overlap, from the largest down
    for size in reversed(sizes):
        gap = transform([ticks[-1]])[0] - transform([size])[0] if ticks else right - left
        if gap >= TICK_DISTANCE * (right - left):
            ticks.append(size)
    ax.set_xticks(ticks)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if len(ticks) > 5:
        ax.tick_params(axis="x", labelrotation=45)


def _name_levels(ax: Axes, panel: Panel) -> None:
    """Write each level's name at an end of its line, above or below, where it covers the least."""
    import numpy as np

    ends, _ = ax.get_xlim(), ax.get_ylim()  # both are fixed from here on
    in_axes = (ax.transData - ax.transAxes).transform
    lines = [(c.num_edges, y) for c in panel.curves for y in (c.low, c.mid, c.high)]
    lines += [(ends, (level, level)) for _, level in panel.levels]
    along, drawn = np.linspace(0, 1, 201), []
    for xs, ys in lines:
        points = sorted(in_axes(np.column_stack((xs, ys))).tolist()) if len(xs) else []
        if points:
            x, y = np.transpose(points)
            on = along[(along > x[0] - LETTER_WIDTH) & (along < x[-1] + LETTER_WIDTH)]
            drawn.append(np.column_stack((on, np.interp(on, x, y))))
    for text, level in panel.levels:
        width, y = LETTER_WIDTH * len(text), in_axes((ends[0], level))[1]
        places = []
        for side, middle in (("bottom", y + 0.6 * LINE_HEIGHT), ("top", y - 0.6 * LINE_HEIGHT)):
            for end, left in (("right", 1 - width), ("left", 0)):
                x, near = np.concatenate(drawn).T - [[0], [middle]]
                covered = (x >= left) & (x <= left + width) & (abs(near) < 0.8 * LINE_HEIGHT)
                if side == "bottom" or middle > LINE_HEIGHT / 2:  # not on the axis
                    places.append((covered.sum(), end, side, left, middle))
        _, end, side, left, middle = min(places, key=itemgetter(0))
        label = along[(along >= left) & (along <= left + width)]
        drawn.append(np.column_stack((label, np.full_like(label, middle))))
        ax.annotate(
            text, (float(end == "right"), level), xycoords=("axes fraction", "data"),
            xytext=(3 if end == "left" else 0, 2 if side == "bottom" else -2),
            textcoords="offset points", ha=end, va=side, fontsize=8, color=GREY,
        )  # fmt: skip


# --------------------------------------------------------------------------------- shared by both


def _log_axis(ax: Axes, values: Sequence[float]) -> None:
    """Make y logarithmic, linear below 0.001 if there are zeros."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values, default=0) > 0:
        ax.set_yscale("log")
        if max(values) < FEW_DECADES * min(values):
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _grid(ax: Axes) -> None:
    """Faint lines behind the curves."""
    ax.grid(axis="y", color="#E3E5EA", linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
