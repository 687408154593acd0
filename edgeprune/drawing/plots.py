"""Plots with matplotlib: the progress of a run, and metrics against the size of circuits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeprune.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#4A4E57")
MARKERS = "osD^vPX"
"""Colours and markers of lines, in order; colour-blind readers can distinguish them."""
GREY, DASHES = "#6B6F78", (0, (4, 3))
"""Colour of axes and levels; line style of levels and targets."""
STYLE = {
    "text.parse_math": False, "svg.hashsalt": "edgeprune", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": "#E3E5EA", "grid.linewidth": 0.8, "legend.frameon": False,
    "legend.fontsize": 9, "figure.titlesize": 12, "figure.titleweight": "bold",
}  # fmt: skip
"""Settings of matplotlib: text is never parsed as TeX, and the same plot gives the same file."""
ROUNDING = 1e-6
"""KL divergences below this are rounding errors, which may be negative."""
LABEL_WIDTH = 24
"""Number of characters after which a y axis' label is broken into lines."""


class Line(NamedTuple):
    """A line `mid` in a band from `low` to `high`; all sequences have the same length."""

    name: str  # shown in the legend, unless empty
    num_edges: Sequence[float]
    mid: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    """One set of axes; `label` is that of the y axis."""

    label: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]]  # (name, y) of horizontal lines, the best first
    log: bool  # whether y is a distance on a logarithmic axis; otherwise it is a fraction, 0 to 1


@contextmanager
def _figure(
    path: Path | str, title: str, num_panels: int, width: float, height: float, rows: int = 1
) -> Iterator[Figure]:
    """Yield a figure with axes in rows, then write it in the format of the path's suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title)
        figure.subplots(rows, -(-num_panels // rows))
        yield figure
        format = Path(path).suffix.removeprefix(".")
        no_date = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(format)
        save = partial(figure.savefig, format=format, dpi=150, metadata=no_date)
        write_atomically(Path(path), save)


class Ranks(NamedTuple):
    """The ranks of the strongest edges over the steps of a run, best edge first."""

    steps: Sequence[int]
    ranks: Sequence[Sequence[int]]  # [edge][step], from 1
    names: Sequence[str]  # of the edges
    all_edges: int


LABELS = {
    "kl": "KL (nats)",
    "unexplained": "unexplained variance",
    "logit_difference": "squared error of the logit difference",
    "max_logit_difference": "minus the logit difference",
    "cross_entropy": "cross-entropy (nats)",
}
"""Axis label per objective."""


def draw_training(
    metrics: Sequence[dict[str, Any]], path: Path | str, *, title: str, ranks: Ranks | None = None
) -> Figure:
    """Plot the objective on each step's batch, and the sparsity or the size of the gates.

    Args:
        metrics: the lines of metrics.jsonl, at least one.
        path: ends in .png, .pdf or .svg.
        ranks: of the strongest edges, for a panel that shows when they rose; None: no such panel.
    """
    objective = next(name for name in LABELS if name in metrics[0])
    label = f"{LABELS[objective]}, on each step's batch"
    steps = [line["step"] for line in metrics]
    values = [line[objective] for line in metrics]
    is_log = objective != "max_logit_difference"
    values = [max(value, ROUNDING) for value in values] if is_log else values
    num_panels = 2 if ranks is None else 3
    with _figure(path, title, num_panels, 4.0 * num_panels, 3.6) as figure:
        left, right = figure.axes[:2]
        if ranks is not None:
            _draw_ranks(figure.axes[2], ranks)
        if "num_edges" in metrics[0]:
            sizes = [line["num_edges"] for line in metrics]
            _scatter(left, steps, values, sizes, "edges", log=True)
            _scatter(right, sizes, values, steps, "step")
            right.set_xscale("log")
            right.xaxis.set_major_formatter("{x:,.0f}")
            right.set(xlabel="edges", ylabel=label)
        else:
            _line(left, steps, values, color=COLORS[0])
            _draw_sparsity(right, metrics)
            right.locator_params(axis="x", nbins=6, integer=True)
        left.set(xlabel="step", ylabel=label)
        left.locator_params(axis="x", nbins=6, integer=True)
        for ax in (left, right) if "num_edges" in metrics[0] else (left,):
            if is_log:
                _log_axis(ax, values)
    return figure


def _draw_ranks(ax: Axes, rose: Ranks) -> None:
    """Plot ranks against the step, rank 1 on top; the first edges have names, one per colour."""
    for index, ranks in reversed([*enumerate(rose.ranks)]):  # the named ones last, on top
        if index < len(COLORS):
            _line(ax, rose.steps, ranks, color=COLORS[index], label=rose.names[index], zorder=3)
        else:
            ax.plot(rose.steps, ranks, color=GREY, alpha=0.25, linewidth=0.8)
    ax.set_yscale("log")
    ax.set_ylim(1.5 * rose.all_edges, 0.8)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=6, integer=True)
    ax.set(xlabel="step", ylabel=f"rank of the {len(rose.ranks)} strongest edges")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="lower right", fontsize=7)


def _scatter(
    ax: Axes, xs: Sequence[float], ys: Sequence[float], colors: Sequence[float], label: str,
    *, log: bool = False,
) -> None:  # fmt: skip
    """Draw points whose colour shows a third number, and a scale of these colours."""
    points = ax.scatter(xs, ys, c=colors, s=10, cmap="viridis", norm="log" if log else None)
    ax.figure.colorbar(points, ax=ax, label=label, format="{x:,.0f}")


def _line(ax: Axes, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
    marker = "o" if len(xs) == 1 else None  # a line through a single point is invisible
    ax.plot(xs, ys, linewidth=1.4, marker=marker, **style)


def _draw_sparsity(ax: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    """Plot the sparsity of the gates, and its target if there is one, against the step."""
    steps = [line["step"] for line in metrics]
    for kind, prefix, color in (("edge", "", COLORS[1]), ("node", "node_", COLORS[2])):
        for name, label, style in (
            ("sparsity", f"{kind} gates", "-"),
            ("target", "target", DASHES),
        ):
            values = [line.get(f"{prefix}{name}") for line in metrics]
            if None not in values:
                _line(ax, steps, values, color=color, label=label, linestyle=style)
    low, high = ax.get_ylim()
    ax.set(xlabel="step", ylabel="sparsity of the gates", ylim=(min(low, 0.0), max(high, 1.0)))
    ax.legend()


def draw_frontier(
    panels: Sequence[Panel], path: Path | str, *, title: str, all_edges: int
) -> Figure:
    """Plot panels side by side against the number of edges, in a .png, .pdf or .svg file."""
    names = [line.name for line in panels[0].lines if line.name]
    height = 3.6 + 0.22 * len(names)  # 0.22 inches per line of the legend
    with _figure(path, title, len(panels), 4.0 * len(panels), height) as figure:
        for ax, panel in zip(figure.axes, panels, strict=True):
            _draw_panel(ax, panel)
            ax.set_xlabel(f"edges kept, of {all_edges:,}")
        if names:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center")
    return figure


def draw_matrices(
    matrices: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str], path: Path | str,
    *, title: str,
) -> Figure:  # fmt: skip
    """Draw matrices of fractions side by side, with their numbers, in a .png, .pdf or .svg file.

    `matrices` maps each title to [row, column] in [0, 1]; rows and columns have the same names.
    """
    size = 2.2 + 0.9 * len(names)
    with _figure(path, title, len(matrices), size * len(matrices), size) as figure:
        for ax, (heading, values) in zip(figure.axes, matrices.items(), strict=True):
            ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
            ax.set_title(heading, fontsize=10)
            ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
            ax.set_yticks(range(len(names)), names)
            ax.grid(visible=False)
            ax.set(xlabel="prompts of", ylabel="circuit of")
            for row, numbers in enumerate(values):
                for column, number in enumerate(numbers):
                    color = "white" if number > 0.6 else "black"
                    ax.text(column, row, f"{number:.2f}", ha="center", va="center", color=color)
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    drawn = []
    for (name, xs, *ys), color, marker in zip(panel.lines, cycle(COLORS), cycle(MARKERS)):
        mid, low, high = ([0.0 if panel.log and y < ROUNDING else y for y in part] for part in ys)
        drawn += [*low, *high]
        ax.plot(
            xs, mid, color=color, marker=marker, markersize=5, linewidth=1.6, label=name, zorder=3,
            clip_on=False,
        )  # fmt: skip
        ax.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0)
        if len(xs) == 1:  # its band has no width
            ax.vlines(xs, low, high, color=color, alpha=0.35, linewidth=5)
    for index, (name, level) in enumerate(panel.levels):
        ax.axhline(level, color=GREY, linewidth=0.9, linestyle=DASHES, zorder=1)
        # Curves approach the best level on the right, and the others on the left.
        is_left = index == 0 and not panel.log
        ax.annotate(
            name, (0 if is_left else 1, level), xycoords=("axes fraction", "data"),
            xytext=(3 if is_left else 0, 2), textcoords="offset points",
            ha="left" if is_left else "right", va="bottom", fontsize=8, color=GREY,
        )  # fmt: skip
    ax.set_ylabel(fill(panel.label, LABEL_WIDTH))
    _size_axis(ax, sorted({x for line in panel.lines for x in line.num_edges}, reverse=True))
    if panel.log:
        _log_axis(ax, drawn)
        ax.set_ylim(top=1.6 * max([1e-3, *drawn, *(level for _, level in panel.levels)]))
    else:
        ax.set_ylim(-0.03, 1.06)


def draw_heads(
    panels: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[str]]],
    path: Path | str, *, title: str,
) -> Figure:  # fmt: skip
    """Plot heat maps of layers × heads in a .png, .pdf or .svg file.

    Each panel is (name, values [layer][head], heads marked with a dot, such as "a5.h1"). Values are
    fractions, or nats for entropy.
    """
    num_layers, num_heads = len(panels[0][1]), len(panels[0][1][0])
    rows = -(-len(panels) // 6)
    size = (2.1 * min(len(panels), 6) + 0.6, rows * (1.0 + min(max(0.11 * num_layers, 1.2), 6)))
    with _figure(path, title, len(panels), *size, rows=rows) as figure:
        for ax in figure.axes[len(panels) :]:
            ax.remove()
        for ax, (name, values, marked) in zip(figure.axes, panels, strict=False):
            top = 1.0 if max(map(max, values)) <= 1 else None
            image = ax.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=top)
            places = [head.removeprefix("a").split(".h") for head in marked]
            ax.scatter(
                [int(head) for _, head in places], [int(layer) for layer, _ in places],
                s=5, color="white", edgecolors="black", linewidths=0.5,
            )  # fmt: skip
            ax.set_title(name.replace(", ", "\n"), fontsize=9)
            ax.grid(visible=False)
            ax.locator_params(nbins=6, integer=True)
            ax.set(xlim=(-0.5, num_heads - 0.5), ylim=(-0.5, num_layers - 0.5))
            figure.colorbar(image, ax=ax)
        figure.supxlabel("head; a dot is one above its threshold", fontsize=9)
        figure.supylabel("layer", fontsize=9)
    return figure


def _size_axis(ax: Axes, sizes: Sequence[float]) -> None:
    """Make x logarithmic, or linear below 1 if there is a size of 0, with ticks at the sizes."""
    if sizes[-1] > 0:
        ax.set_xscale("log")
        ax.set_xlim(sizes[-1] / 1.15, sizes[0] * 1.15)
    else:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(-0.2, max(1, sizes[0]) * 1.15)
    transform = ax.xaxis.get_transform().transform
    left, right = transform(ax.get_xlim())
    places = dict(zip(sizes, (transform(sizes) - left) / (right - left), strict=True))
    ticks = [sizes[0]]
    for size in sizes:
        if places[ticks[-1]] - places[size] >= 0.1:  # closer labels would overlap
            ticks.append(size)
    ax.set_xticks(ticks)
    ax.xaxis.minorticks_off()
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if len(ticks) > 5:
        ax.tick_params(axis="x", labelrotation=45)


def _log_axis(ax: Axes, values: Sequence[float]) -> None:
    """Make y logarithmic, linear below 0.001 if there are zeros."""
    if min(values, default=0) > 0:
        ax.set_yscale("log")
        if max(values) < 100 * min(values):  # less than two decades need labels in between
            ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    else:
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
