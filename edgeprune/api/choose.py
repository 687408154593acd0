"""Choosing a circuit from scores: by its size, by how good it is, or by a threshold."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import edgeprune
from edgeprune.circuit import Circuit
from edgeprune.config import chosen_by
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.cleanup import clean_up
from edgeprune.evaluation.curve import Curve, Rule, measure_curve, refine
from edgeprune.methods.paper import circuit_by_threshold
from edgeprune.metrics import Metrics
from edgeprune.prompts import Pair
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import progress as progress_bar
from edgeprune.training.trainer import StepMetrics

log = logging.getLogger("edgeprune")

ROUNDING = 1e-6
"""Distances below this are rounding errors."""

Choice = tuple[str, float | None]
"""See `PruneConfig.choice`."""

RULES: dict[str, Callable[[float], Rule]] = {
    "max_kl": lambda limit: lambda circuit, empty: circuit.kl <= limit,
    "min_exact_match": lambda limit: lambda circuit, empty: circuit.exact_match >= limit,
    "max_share_lost": lambda limit: lambda circuit, empty: share_lost(circuit, empty) <= limit,
}
"""Condition per name of a choice by how good a circuit is."""


@dataclass(frozen=True)
class Pruned:
    """What pruning, or an attribution, found.

    Attributes:
        circuit: the circuit that was chosen, cleaned up if that was asked for.
        scores: of all edges; `scores.circuit(num_edges=...)` gives circuits of other sizes.
        curve: metrics of circuits of many sizes.
        history: one entry per step.
        ablation: what closed edges carried, for `evaluate` and `clean_up`.
        origin: how the circuit was chosen, as JSON values.
    """

    circuit: Circuit
    scores: EdgeScores = field(repr=False)
    curve: Curve = field(repr=False)
    history: list[StepMetrics] = field(repr=False)
    ablation: Ablation = field(repr=False)
    origin: Mapping[str, Any] = field(repr=False)

    def _repr_html_(self) -> str:
        """In a notebook: the page, in a frame."""
        return edgeprune.page(self)._repr_html_()


def share_lost(circuit: Metrics, empty: Metrics) -> float:
    """The circuit's KL as a fraction of the empty circuit's; the error where outputs are values."""
    name = "error" if math.isnan(circuit.kl) else "kl"
    return circuit[name] / max(empty[name], ROUNDING)


def choose(
    scores: EdgeScores,
    choice: Choice,
    *,
    state: Callable[[], Mapping[str, Tensor]],
    measure: Callable[[Sequence[int] | None], Curve],
    agree: Callable[[bool], bool] = bool,
) -> tuple[Circuit, dict[str, Any], Curve | None]:
    """Choose a circuit.

    Args:
        state: gives the state of the method that learned the scores, for a threshold.
        measure: gives the curve (for None) and measures circuits of more sizes, for a condition on
            how good the circuit is.
        agree: makes several processes, which may differ in rounding, decide in the same way.

    Returns:
        The circuit, how it was chosen as JSON values, and the curve if one was needed.

    Raises ConfigError for a limit on the KL where outputs are values.
    """
    name, value = choice
    origin = {"chosen_by": chosen_by(choice)}
    if name == "threshold" and "threshold" in scores.origin:
        threshold = scores.origin["threshold"]
        return scores.circuit_above(threshold), {**origin, "edge_threshold": threshold}, None
    if name == "threshold":
        circuit, thresholds = circuit_by_threshold(scores.graph, state())
        found = {"edge_threshold": thresholds["edge"], "node_threshold": thresholds.get("node")}
        return circuit, {**origin, **found}, None
    if name not in RULES:
        return cut(scores, **{name: value}), origin, None
    rule = RULES[name](value)
    curve = measure(None)
    full = curve.points[curve.num_edges]
    check_choice(choice, has_kl=not math.isnan(full.kl))

    def is_good(circuit: Metrics, empty: Metrics) -> bool:
        return agree(rule(circuit, empty))

    curve = refine(curve, is_good, measure)
    size = curve.smallest(is_good)
    if size == curve.num_edges:
        log.warning(f"no measured circuit meets {describe_choice(choice)}, so all edges are kept")
    return scores.circuit(num_edges=size), origin, curve


def cut(scores: EdgeScores, **size: float | None) -> Circuit:
    """`scores.circuit`; warns if edges are left out whose score is that of the last one kept."""
    circuit = scores.circuit(**size)
    ranked, num_kept = scores.importance()[scores.ranking()], len(circuit)
    if 0 < num_kept < len(ranked) and ranked[num_kept - 1] == ranked[num_kept]:
        num_tied = int((ranked == ranked[num_kept]).sum())
        log.warning(
            f"{num_tied:,} edges have the same score, {ranked[num_kept]:g}; those of them among "
            f"the {num_kept:,} kept are the first in the graph's order"
        )
    return circuit


def describe_choice(choice: Choice) -> str:
    """A condition in words."""
    name, value = choice
    if name == "max_share_lost":
        return f"at most {value:.0%} of the empty circuit's distance from the full model"
    return chosen_by(choice)


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
            listener=show,
        )  # fmt: skip


def cleaned_up(
    model: CircuitModel,
    circuit: Circuit,
    origin: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    tolerance: float,
    **options: Any,
) -> tuple[Circuit, dict[str, Any]]:
    """`clean_up` of a chosen circuit, and how the result was chosen."""
    cleaned = clean_up(model, circuit, pairs, tolerance=tolerance, **options)
    return cleaned.circuit, {**origin, "cleanup": {"tolerance": tolerance, **cleaned.to_dict()}}
