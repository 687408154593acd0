"""Evaluate a circuit beside the full model and the fully corrupted one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.metrics import ExampleMetrics, Output, score
from edgeprune.prompts import Pair, iterate_batches

OF_DISTRACTORS = (
    "two_way_accuracy", "logit_difference", "logit_difference_recovered", "probability_difference",
)  # fmt: skip
"""Metrics that are means over the examples with distractors alone."""


@dataclass(frozen=True)
class Metrics:
    """Means over the examples of a data set, or over those with distractors (`OF_DISTRACTORS`).

    NaN where the data has none.

    Attributes:
        kl: faithfulness, KL from the full model, nats per predicted token; NaN where outputs are
            values.
        kl_standard_error: of that mean, over the examples; NaN where there is one.
        error: the largest absolute difference from the full model's outputs in an example; NaN
            where outputs are logits.
        exact_match: share of examples with the full model's most likely tokens.
        accuracy: share of examples whose most likely tokens are right.
        two_way_accuracy: share of examples where the answers are likelier than the distractors; a
            tie is half of one.
        logit_difference: log-sum-exp of the answers' logits less that of the distractors'.
        logit_difference_recovered: that, as a share of the way from every edge closed (0) to the
            full model (1); NaN where these do not differ.
        probability_difference: the answers' probability less the distractors'.
    """

    kl: float
    kl_standard_error: float
    error: float
    exact_match: float
    accuracy: float
    two_way_accuracy: float
    logit_difference: float
    logit_difference_recovered: float
    probability_difference: float


@dataclass(frozen=True)
class WorstExample:
    """The example on which the circuit is least faithful, by `kl` or, for values, by `error`.

    Predictions are all of its predicted tokens, as text.
    """

    text: str
    kl: float
    error: float
    full_prediction: str
    circuit_prediction: str


@dataclass(frozen=True)
class Evaluation:
    """A circuit's scores and what to compare them with.

    Attributes:
        circuit: the circuit.
        full: the untouched model.
        corrupted: every edge closed.
        shuffled: the mean over the same circuit between other heads (`Circuit.shuffled`), or None.
        worst: the circuit's least faithful example.
        num_examples, num_edges, sparsity: of what was measured.
        num_with_distractors: so many of the examples have distractors.
    """

    circuit: Metrics
    full: Metrics
    corrupted: Metrics
    shuffled: Metrics | None
    worst: WorstExample
    num_examples: int
    num_edges: int
    sparsity: float
    num_with_distractors: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return _without_nan(asdict(self))


@torch.no_grad()
def evaluate(
    model: CircuitModel,
    circuit: Circuit,
    pairs: Sequence[Pair],
    *,
    ablation: Ablation | str = "interchange",
    batch_size: int = 64,
    shuffled_circuits: int = 0,
) -> Evaluation:
    """Measure how much of the model's behaviour a circuit keeps.

    Args:
        model: the model the circuit was found in.
        circuit: its kept edges; all others are ablated.
        pairs: the prompts.
        ablation: what ablated edges carry, such as `Pruned.ablation`; or `interchange`, `zero` or
            `mean` (over `pairs`, one a position).
        batch_size: pairs a forward pass.
        shuffled_circuits: the circuit is measured so many times between other heads, too.

    Raises:
        ValueError: the circuit is of another graph than the model's, there are no prompts, one is
            too long for the model, or a number is too small.
    """
    if shuffled_circuits < 0:
        raise ValueError(f"shuffled_circuits={shuffled_circuits} must be 0 or more")
    CircuitModel.check(model)
    Circuit.check(circuit, model.graph)
    model.check_prompts(pairs)
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    shuffled = [circuit.shuffled(seed).mask() for seed in range(shuffled_circuits)]
    masks = [circuit.mask(), [False] * model.graph.num_edges, *shuffled]
    gates = [torch.tensor(mask, dtype=torch.float32, device=model.device) for mask in masks]
    scores: list[list[ExampleMetrics]] = [[] for _ in range(1 + len(gates))]
    texts: list[str] = []
    for batch in iterate_batches(pairs, batch_size):
        batch = batch.to(model.device)
        reference, corrupted = model.run_pair(batch, corrupted=ablation.needs_corrupted)
        closed = ablation.values(batch, corrupted)
        scores[0].append(score(batch, reference, reference, model.output))
        for one, kept in zip(scores[1:], gates, strict=True):
            outputs = model.run_circuit(batch, kept, closed)
            one.append(score(batch, reference, outputs, model.output))
        texts += [pair.text for pair in batch.pairs]
    everything = [_concatenate(one) for one in scores]
    full, of_circuit, corrupted, *_ = everything
    differences = [one.logit_difference.nanmean().item() for one in (corrupted, full)]
    summaries = [_summarise(one, *differences) for one in everything]
    of_logits = model.output is Output.logits
    worst = int((of_circuit.kl if of_logits else of_circuit.error).argmax())
    return Evaluation(
        circuit=summaries[1],
        full=summaries[0],
        corrupted=summaries[2],
        shuffled=_mean_scores(summaries[3:]) if shuffled else None,
        worst=WorstExample(
            text=texts[worst],
            kl=of_circuit.kl[worst].clamp(min=0).item(),
            error=of_circuit.error[worst].item(),
            full_prediction=_decode(model, full.predicted[worst]),
            circuit_prediction=_decode(model, of_circuit.predicted[worst]),
        ),
        num_examples=len(texts),
        num_edges=len(circuit),
        sparsity=circuit.sparsity,
        num_with_distractors=int((~full.logit_difference.isnan()).sum()),
    )


def _concatenate(scores: list[ExampleMetrics]) -> ExampleMetrics:
    names = [f.name for f in fields(ExampleMetrics) if f.name != "predicted"]
    return ExampleMetrics(
        **{name: torch.cat([getattr(s, name).cpu() for s in scores]) for name in names},
        predicted=tuple(tokens for s in scores for tokens in s.predicted),
    )


def _summarise(scores: ExampleMetrics, corrupted: float, full: float) -> Metrics:
    """Means, given the mean logit differences with every edge closed and of the full model."""
    difference, kl = scores.logit_difference, scores.kl.double()
    two_way = torch.heaviside(difference, torch.tensor(0.5)).double()
    two_way[difference.isnan()] = math.nan
    mean_difference, way = difference.nanmean().item(), full - corrupted
    return Metrics(
        kl=kl.mean().clamp(min=0).item(),  # rounding may leave it below 0
        kl_standard_error=kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else math.nan,
        error=scores.error.double().mean().item(),
        exact_match=scores.exact_match.double().mean().item(),
        accuracy=scores.correct.double().mean().item(),
        two_way_accuracy=two_way.nanmean().item(),
        logit_difference=mean_difference,
        logit_difference_recovered=(mean_difference - corrupted) / way if way else math.nan,
        probability_difference=scores.probability_difference.nanmean().item(),
    )


def _mean_scores(scores: list[Metrics]) -> Metrics:
    return Metrics(
        *(sum(getattr(s, f.name) for s in scores) / len(scores) for f in fields(Metrics))
    )


def _decode(model: CircuitModel, predicted: Tensor) -> str:
    """The predicted tokens as text, or the numbers."""
    if model.output is Output.number:
        return " ".join(f"{number:.4g}" for number in predicted.tolist())
    return "" if model.tokenizer is None else model.tokenizer.decode(predicted.tolist())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
