"""What all plots share: colours, axes, and how they are written. By matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeprune.files import write_atomically

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#4A4E57")
GREY = "#6B6F78"
DASHES = (0, (4, 3))
ROUNDING = 1e-6
"""A KL divergence below this is rounding, which may be negative."""
FEW_DECADES = 100
"""A logarithmic y axis of less than this range has labels between the powers of ten."""


def save_plot(make_figure: Callable[[], Any], path: Path) -> None:
    """Make a figure and write it as a file of the format of the path's suffix.

    Text is never math or TeX, and the same plot is the same file.
    """
    import matplotlib

    settings = {
        "text.parse_math": False, "svg.hashsalt": "edgeprune", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = make_figure()
        format = path.suffix.removeprefix(".")
        dated = {"pdf": "CreationDate", "svg": "Date"}.get(format)
        metadata = {dated: None} if dated else None
        write_atomically(
            path,
            lambda temporary: figure.savefig(temporary, format=format, dpi=150, metadata=metadata),
        )


def log_axis(ax: Any, values: Sequence[float]) -> None:
    """Make y logarithmic; below 0.001 linear where there are zeros."""
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


def grid(ax: Any) -> None:
    """Faint lines behind what is drawn."""
    ax.grid(axis="y", color="#E3E5EA", linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
