"""edgeprune: find the circuit with which a language model does a task, by pruning its edges."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Ablation": "ablation",
    "Circuit": "circuit",
    "CircuitGraph": "graph",
    "clean_up": "analysis.cleanup",
    "Evaluation": "analysis.evaluate",
    "compare": "analysis.compare",
    "consensus": "analysis.compare",
    "draw_circuit": "drawing",
    "encode_pair": "dataset",
    "evaluate": "analysis.evaluate",
    "export_circuit": "analysis.export",
    "load_dataset": "dataset",
    "load_masks": "training.run",
    "load_model": "modeling",
    "prune": "api",
}
"""Public name -> module, imported when first used, so that `import edgeprune` is instant."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    return getattr(import_module(f"edgeprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
