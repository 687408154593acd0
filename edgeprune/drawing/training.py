"""A plot of how a run went: distance and sparsity, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.drawing.plots import COLORS, GREY, grid, log_axis, save_plot

TARGET = (0, (4, 3))
"""Dashes of a target's line."""


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

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in metrics]

    def draw(ax: Any, name: str, label: str, **style: Any) -> list[float]:
        values = [line[name] for line in metrics]
        if any(value is None for value in values):
            return []
        marker = "o" if len(steps) == 1 else None  # a line through one point is not seen
        ax.plot(steps, values, label=label, linewidth=1.4, marker=marker, **style)
        return values

    kl = draw(left, "kl", "", color=COLORS[0])
    unexplained = draw(left, "unexplained", "", color=COLORS[0])
    log_axis(left, kl or unexplained)
    left.set_ylabel("KL on each step's batch (nats)" if kl else "unexplained variance")
    draw(right, "sparsity", "edge gates", color=COLORS[1])
    draw(right, "target", "target of edge gates", color=GREY, linestyle=TARGET)
    draw(right, "node_sparsity", "node gates", color=COLORS[2])
    draw(right, "node_target", "target of node gates", color=COLORS[6], linestyle=TARGET)
    right.set_ylabel("sparsity of the gates")
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        ax.set_xlabel("step")
        grid(ax)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure
