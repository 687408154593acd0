"""Choosing a circuit from scores: by its size, by how good it is, or by a threshold."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.cleanup import CleanUp
from edgeprune.evaluation.curve import Curve, Rule, measure_curve, refine
from edgeprune.methods.paper import circuit_by_threshold
from edgeprune.metrics import Metrics
from edgeprune.prompts import Pair
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import progress as progress_bar

log = logging.getLogger("edgeprune")

TINY = 1e-12
"""Smallest number that is divided by."""

Choice = tuple[str, float | None]
"""See `PruneConfig.choice`."""

RULES: dict[str, Callable[[float], Rule]] = {
    "max_kl": lambda limit: lambda circuit, empty: circuit.kl <= limit,
    "min_exact_match": lambda limit: lambda circuit, empty: circuit.exact_match >= limit,
    "max_share_lost": lambda limit: lambda circuit, empty: share_lost(circuit, empty) <= limit,
}
"""Condition per name of a choice by how good a circuit is."""


def share_lost(circuit: Metrics, empty: Metrics) -> float:
    """The circuit's KL as a fraction of the empty circuit's; the error where outputs are values."""
    name = "error" if math.isnan(circuit.kl) else "kl"
    return circuit[name] / max(empty[name], TINY)


class Chosen(NamedTuple):
    """A circuit, how it was chosen as JSON values, and the curve, if one was needed."""

    circuit: Circuit
    origin: dict[str, Any]
    curve: Curve | None


def choose(
    scores: EdgeScores,
    choice: Choice,
    *,
    state: Callable[[], Mapping[str, Tensor]],
    curve: Callable[[], Curve],
    measure: Callable[[Sequence[int]], Curve],
) -> Chosen:
    """Choose a circuit.

    Raises ConfigError for a limit on the KL where outputs are values.

    Args:
        state: gives the state of the method that learned the scores, for a threshold.
        curve: gives the curve, for a condition on how good the circuit is.
        measure: measures circuits of more sizes, see `evaluation.curve.refine`.
    """
    name, value = choice
    if name == "threshold":
        circuit, thresholds = circuit_by_threshold(scores.graph, state())
        found = {"edge_threshold": thresholds["edge"], "node_threshold": thresholds.get("node")}
        return Chosen(circuit, {"chosen_by": name, **found}, None)
    origin = {"chosen_by": f"{name}={value}"}
    if name not in RULES:
        return Chosen(scores.circuit(**{name: value}), origin, None)
    known = curve()
    check_choice(choice, has_kl=not math.isnan(known.empty.kl))
    refined = refine(known, RULES[name](value), measure)
    size = refined.smallest(RULES[name](value))
    if size == refined.num_edges:
        log.warning(f"no measured circuit meets {name}={value}, so all edges are kept")
    return Chosen(scores.circuit(num_edges=size), origin, refined)


def check_choice(choice: Choice, *, has_kl: bool) -> None:
    """Raise ConfigError for a limit on the KL of a model that has none."""
    name, value = choice
    if name == "max_kl" and not has_kl:
        raise ConfigError(
            f"max_kl={value} needs logits, but this model outputs values; give min_exact_match=, "
            "sparsity= or num_edges="
        )


def curve_of(
    model: CircuitModel,
    scores: EdgeScores,
    pairs: Sequence[Pair],
    ablation: Ablation,
    batch_size: int,
    sizes: Sequence[int] | None = None,
    *,
    progress: bool = True,
) -> Curve:
    """`measure_curve` with a progress bar."""
    with progress_bar(len(pairs), "measuring circuits: prompt", enabled=progress) as show:
        return measure_curve(
            model, scores, pairs, ablation=ablation, batch_size=batch_size, sizes=sizes,
            listener=lambda done: show(done, ""),
        )  # fmt: skip


def cleaned_up(
    cleaned: CleanUp, origin: dict[str, Any], tolerance: float
) -> tuple[Circuit, dict[str, Any]]:
    """A cleaned circuit, and how it was chosen."""
    return cleaned.circuit, {**origin, "cleanup": {"tolerance": tolerance, **cleaned.to_dict()}}
