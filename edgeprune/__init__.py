"""edgeprune: find the circuit with which a language model does a task, by pruning its edges."""

from importlib import import_module
from typing import Any

_HOME = {
    "Ablation": "engine.ablation",
    "Circuit": "circuit",
    "CircuitGraph": "graph",
    "EdgeScores": "scores",
    "Evaluation": "evaluation.evaluate",
    "Run": "runs.run",
    "ablate": "evaluation.ablate",
    "attribute": "api.attribute",
    "attribute_tokens": "evaluation.tokens",
    "clean_up": "evaluation.cleanup",
    "compare": "evaluation.compare",
    "consensus": "evaluation.compare",
    "draw_circuit": "drawing",
    "encode_pair": "prompts",
    "evaluate": "evaluation.evaluate",
    "explain": "evaluation.explain",
    "mib_areas": "evaluation.mib",
    "load_circuit": "runs.source",
    "load_dataset": "prompts",
    "load_model": "models.load",
    "page": "api.page",
    "prune": "api.prune",
    "score_heads": "evaluation.heads",
    "write_circuit": "formats",
}
"""Public name -> module, imported on first use, so that `import edgeprune` is instant."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    return getattr(import_module(f"edgeprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
