"""Drawings of circuits, plots and the HTML page of a report. Imports no torch."""

from edgeprune.drawing.graphviz import circuit_dot, comparison_groups, draw_circuit
from edgeprune.drawing.plots import (
    Line,
    Panel,
    Ranks,
    draw_frontier,
    draw_heads,
    draw_matrices,
    draw_training,
)
from edgeprune.drawing.report import render_report
