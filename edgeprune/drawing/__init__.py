"""Drawings of circuits. No torch here."""

from edgeprune.drawing.draw import (
    SUFFIXES,
    EdgeGroup,
    GraphvizMissing,
    circuit_dot,
    comparison_groups,
    draw_circuit,
)

__all__ = [
    "SUFFIXES",
    "EdgeGroup",
    "GraphvizMissing",
    "circuit_dot",
    "comparison_groups",
    "draw_circuit",
]
