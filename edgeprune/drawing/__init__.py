"""Drawings of circuits. No torch here."""

from edgeprune.drawing.draw import (
    SUFFIXES,
    GraphvizMissing,
    Group,
    circuit_dot,
    comparison_groups,
    draw_circuit,
)

__all__ = [
    "SUFFIXES",
    "GraphvizMissing",
    "Group",
    "circuit_dot",
    "comparison_groups",
    "draw_circuit",
]
