"""Drawings of circuits, plots and the HTML page of a report. Imports no torch."""

from edgeprune.drawing.graphviz import circuit_dot, comparison_groups, draw_circuit
from edgeprune.drawing.page import render_page
from edgeprune.drawing.plots import Line, Panel, draw_frontier, draw_matrices, draw_training

__all__ = [
    "Line", "Panel", "circuit_dot", "comparison_groups", "draw_circuit",
    "draw_frontier", "draw_matrices", "draw_training", "render_page",
]  # fmt: skip
