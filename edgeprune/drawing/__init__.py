"""Drawings of circuits. No torch here."""

from edgeprune.drawing.graphviz import (
    SUFFIXES,
    EdgeGroup,
    circuit_dot,
    comparison_groups,
    draw_circuit,
)
from edgeprune.errors import GraphvizMissing

__all__ = [
    "SUFFIXES",
    "EdgeGroup",
    "GraphvizMissing",
    "circuit_dot",
    "comparison_groups",
    "draw_circuit",
]
