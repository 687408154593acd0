"""Measuring, cleaning up and comparing circuits, and reports over many runs."""
