"""A plot of how a run went: distance and sparsity, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.drawing.plots import COLORS, DASHES, ROUNDING, grid, log_axis, save_plot


def draw_training(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw the distance from the full model, and the gates' sparsity beside its target.

    Args:
        metrics: the lines of metrics.jsonl, see `StepMetrics`; at least one.
        path: ends in .png, .pdf or .svg.
        title: a line of text above.
    """
    save_plot(lambda: _figure(metrics, title), path)


def _figure(metrics: Sequence[dict[str, Any]], title: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in metrics]
    marker = "o" if len(steps) == 1 else None  # a line through one point is not seen

    def draw(ax: Any, name: str, label: str, **style: Any) -> list[float]:
        values = [line[name] for line in metrics]
        if any(value is None for value in values):
            return []
        if ax is left:
            values = [max(value, ROUNDING) for value in values]
        ax.plot(steps, values, label=label, linewidth=1.4, marker=marker, **style)
        return values

    kl = draw(left, "kl", "", color=COLORS[0])
    log_axis(left, kl + draw(left, "unexplained", "", color=COLORS[0]))
    left.set_ylabel("KL on each step's batch (nats)" if kl else "unexplained variance")
    for kind, prefix, color in (("edge", "", COLORS[1]), ("node", "node_", COLORS[2])):
        draw(right, f"{prefix}sparsity", f"{kind} gates", color=color)
        draw(right, f"{prefix}target", "what they are driven to", color=color, linestyle=DASHES)
    low, high = right.get_ylim()
    right.set_ylim(min(low, 0.0), max(high, 1.0))
    right.set_ylabel("sparsity of the gates")
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        grid(ax)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure
