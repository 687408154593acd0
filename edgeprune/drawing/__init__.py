"""Drawings of circuits. No torch here."""

from edgeprune.drawing.draw import SUFFIXES, GraphvizMissing, circuit_dot, draw_circuit

__all__ = ["SUFFIXES", "GraphvizMissing", "circuit_dot", "draw_circuit"]
