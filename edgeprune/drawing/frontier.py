"""Plots of faithfulness against size, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from edgeprune.drawing.plots import COLORS, DASHES, GREY, ROUNDING, grid, log_axis, save_plot

MARKERS = "osD^vPX"
TICK_DISTANCE = 0.1
"""Of ticks on the x axis at least, as a share of it: labels nearer than this would overlap."""
LETTER, LINE = 0.02, 0.06
"""About how wide and high a level's name is, as shares of the axes."""
LEGEND_ROW = 0.22
"""Inches that a line of the legend is high."""


@dataclass(frozen=True)
class Curve:
    """One line with a band; all sequences are of one length.

    Attributes:
        name: in the legend; empty: none is shown.
        num_edges: along x.
        mid, low, high: along y; the band lies between the last two.
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
        label: of the y axis.
        curves: lines.
        levels: (text, y) of horizontal lines to compare with.
        log: whether y is logarithmic; else it goes from 0 to 1.
    """

    label: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[str, float]]
    log: bool


def draw_frontier(panels: Sequence[Panel], path: Path | str, *, title: str, all_edges: int) -> None:
    """Draw panels side by side, edges along x, into a file of the format of its suffix.

    Args:
        panels: at least one.
        path: ends in .png, .pdf or .svg.
        title: a line of text above.
        all_edges: of the whole graph, named on the x axis.
    """
    save_plot(lambda: _figure(panels, title, all_edges), Path(path))


def _figure(panels: Sequence[Panel], title: str, all_edges: int) -> Any:
    from matplotlib.figure import Figure

    names = [curve.name for curve in panels[0].curves if curve.name]
    height = 3.6 + LEGEND_ROW * len(names)
    figure = Figure(figsize=(4.0 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, all_edges)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    if names:
        handles = axes[0].get_lines()[: len(panels[0].curves)]
        figure.legend(
            handles, [curve.name for curve in panels[0].curves], loc="outside lower center",
            frameon=False, fontsize=9,
        )  # fmt: skip
    return figure


def _draw_panel(ax: Any, panel: Panel, all_edges: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    if panel.log:
        panel = _without_rounding(panel)
    sizes = sorted({x for curve in panel.curves for x in curve.num_edges})
    for index, curve in enumerate(panel.curves):
        color = COLORS[index % len(COLORS)]
        ax.plot(
            curve.num_edges, curve.mid, color=color, marker=MARKERS[index % len(MARKERS)],
            markersize=5, linewidth=1.6, label=curve.name, zorder=3,
            clip_on=False,
        )  # fmt: skip
        ax.fill_between(
            curve.num_edges, curve.low, curve.high, color=color, alpha=0.18, linewidth=0
        )
        if len(curve.num_edges) == 1:  # a band of no width
            ax.vlines(curve.num_edges, curve.low, curve.high, color=color, alpha=0.35, linewidth=5)
    for _, level in panel.levels:
        ax.axhline(level, color=GREY, linewidth=0.9, linestyle=DASHES, zorder=1)
    largest = max([1, *sizes])
    if sizes and sizes[0] > 0:
        ax.set_xscale("log")
        ax.set_xlim(sizes[0] / 1.15, largest * 1.15)
    else:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(-0.2, largest * 1.15)
    ticks = _apart(ax, sizes)
    ax.set_xticks(ticks)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if len(ticks) > 5:
        ax.tick_params(axis="x", labelrotation=45)
    ax.set_xlabel(f"edges kept, of {all_edges:,}")
    ax.set_ylabel(panel.label)
    if panel.log:
        drawn = [y for curve in panel.curves for y in (*curve.low, *curve.high)]
        log_axis(ax, drawn)
        ax.set_ylim(top=1.6 * max([1e-3, *drawn, *(level for _, level in panel.levels)]))
    else:
        ax.set_ylim(-0.03, 1.06)
    grid(ax)
    _name_levels(ax, panel)


def _name_levels(ax: Any, panel: Panel) -> None:
    """Name each level at an end of its line, above or below it, where that covers the least."""
    import numpy as np

    ends, _ = ax.get_xlim(), ax.get_ylim()  # which settles both
    in_axes = (ax.transData - ax.transAxes).transform
    lines = [(c.num_edges, y) for c in panel.curves for y in (c.low, c.mid, c.high)]
    lines += [(ends, (level, level)) for _, level in panel.levels]
    along, drawn = np.linspace(0, 1, 201), []
    for xs, ys in lines:
        points = sorted(in_axes(np.column_stack((xs, ys))).tolist()) if len(xs) else []
        if points:
            x, y = np.transpose(points)
            on = along[(along > x[0] - LETTER) & (along < x[-1] + LETTER)]
            drawn.append(np.column_stack((on, np.interp(on, x, y))))
    for text, level in panel.levels:
        width, y = LETTER * len(text), in_axes((ends[0], level))[1]
        places = []
        for side, middle in (("bottom", y + 0.6 * LINE), ("top", y - 0.6 * LINE)):
            for end, left in (("right", 1 - width), ("left", 0)):
                x, near = np.concatenate(drawn).T - [[0], [middle]]
                covered = (x >= left) & (x <= left + width) & (abs(near) < 0.8 * LINE)
                if side == "bottom" or middle > LINE / 2:  # not on the axis
                    places.append((covered.sum(), end, side, left, middle))
        _, end, side, left, middle = min(places, key=itemgetter(0))
        label = along[(along >= left) & (along <= left + width)]
        drawn.append(np.column_stack((label, np.full_like(label, middle))))
        ax.annotate(
            text, (float(end == "right"), level), xycoords=("axes fraction", "data"),
            xytext=(3 if end == "left" else 0, 2 if side == "bottom" else -2),
            textcoords="offset points", ha=end, va=side, fontsize=8, color=GREY,
        )  # fmt: skip


def _without_rounding(panel: Panel) -> Panel:
    def rounded(values: Sequence[float]) -> list[float]:
        return [0.0 if value < ROUNDING else value for value in values]

    curves = [
        replace(c, mid=rounded(c.mid), low=rounded(c.low), high=rounded(c.high))
        for c in panel.curves
    ]
    return replace(panel, curves=curves)


def _apart(ax: Any, sizes: Sequence[float]) -> list[float]:
    """The sizes whose labels do not overlap, from the largest down."""
    transform = ax.xaxis.get_transform().transform
    left, right = transform(ax.get_xlim())
    kept: list[float] = []
    for size in reversed(sizes):
        if not kept or transform([kept[-1]])[0] - transform([size])[0] >= TICK_DISTANCE * (
            right - left
        ):
            kept.append(size)
    return kept
