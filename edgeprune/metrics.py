"""Metrics as functions of logits, and the one table of them, `METRICS`.

Logits are [predicted, vocabulary], one row per predicted token; `Batch` says which example each row
belongs to. Compiled transformers output values instead of logits (see `Output`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from edgeprune.prompts import Batch

SAME_NUMBER = 1e-3
"""Numeric outputs that differ by at most this much count as the same answer."""


class Output(Enum):
    """What a model outputs at each position, which determines how two outputs are compared.

    `logits` are compared by the KL divergence of their probabilities. `one_hot` values are near 1
    in the answer's column and near 0 elsewhere, and a `number` is one column with the answer; both
    are compared by their difference, as a softmax of values in [0, 1] is nearly flat.
    """

    logits = "logits"
    one_hot = "one_hot"
    number = "number"


def kl_per_token(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || circuit) per predicted token, in nats, [predicted]."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(logits.float(), -1)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def unexplained_variance(reference: Tensor, outputs: Tensor) -> Tensor:
    """sum |reference - outputs|^2 / sum |reference - mean reference|^2, over all predicted tokens.

    0 for equal outputs; 1 is as bad as always outputting the mean.
    """
    reference, outputs = reference.float(), outputs.float()
    variance = (reference - reference.mean(0)).square().sum()
    constant = variance < 1e-6 * len(reference)  # then: mean squared error
    scale = torch.where(constant, float(len(reference)), variance)
    return (reference - outputs).square().sum() / scale


def logit_differences(batch: Batch, logits: Tensor) -> Tensor:
    """[batch], log-sum-exp of the answers' logits minus that of the distractors', in nats.

    Both are compared at the token where they differ. NaN for examples without distractors.
    """
    at_contrast = logits[batch.contrasts].float()  # [batch, vocabulary]
    return _minus_distractors(batch, partial(_log_sum_exp, at_contrast))


def _minus_distractors(batch: Batch, score: Callable[[Tensor], Tensor]) -> Tensor:
    """[batch], the score of the answers' ids minus the distractors'; NaN without distractors."""
    difference = score(batch.answer_ids) - score(batch.distractor_ids)
    return torch.where((batch.distractor_ids >= 0).any(-1), difference, math.nan)


def _log_sum_exp(logits: Tensor, ids: Tensor) -> Tensor:
    """[batch], over the ids of each example; -inf for none."""
    chosen = logits.gather(-1, ids.clamp(min=0))
    return chosen.masked_fill(ids < 0, -math.inf).logsumexp(-1)


def answer_scores(batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """How the answers do at each example's target `contrast`, by name, [batch] each.

    `logit` is the log-sum-exp of their logits, `probability` the sum of their probabilities, and
    `contrast` the logit difference from the distractors, NaN without distractors.
    """
    at_contrast = logits[batch.contrasts].float()  # [batch, vocabulary]
    log_p = torch.log_softmax(at_contrast, -1)
    return {
        "logit": _log_sum_exp(at_contrast, batch.answer_ids),
        "probability": _log_sum_exp(log_p, batch.answer_ids).exp(),
        "contrast": logit_differences(batch, logits),
    }


Objective = Callable[[Batch, Tensor, Tensor], Tensor]
"""(batch, reference, outputs) -> what training minimises on the batch, a scalar: a mean over
examples, so that micro-batches weigh as much as they have examples. `reference` and `outputs` are
[predicted, vocabulary], of the full model and of the circuit."""


def mean_kl(batch: Batch, reference: Tensor, logits: Tensor) -> Tensor:
    """KL(full model || circuit) in nats, averaged over each example's predicted tokens."""
    return _mean_over_tokens(batch, kl_per_token(reference, logits))


def mean_unexplained_variance(batch: Batch, reference: Tensor, outputs: Tensor) -> Tensor:
    """`unexplained_variance` of the batch."""
    return unexplained_variance(reference, outputs)


def logit_difference_error(batch: Batch, reference: Tensor, logits: Tensor) -> Tensor:
    """Squared difference of the circuit's logit difference from the full model's."""
    error = logit_differences(batch, logits) - logit_differences(batch, reference)
    return error.square().mean()


def negative_logit_difference(batch: Batch, reference: Tensor, logits: Tensor) -> Tensor:
    """Minus the circuit's logit difference, which also rewards exceeding the full model's."""
    return -logit_differences(batch, logits).mean()


def cross_entropy(batch: Batch, reference: Tensor, logits: Tensor) -> Tensor:
    """-log probability of the tokens to predict, averaged over each example's tokens."""
    log_p = torch.log_softmax(logits.float(), -1)
    return _mean_over_tokens(batch, -log_p.gather(-1, batch.target_ids[:, None])[:, 0])


def _mean_over_tokens(batch: Batch, values: Tensor) -> Tensor:
    """[predicted] -> scalar: the mean of each example's tokens, then of examples."""
    return (values * batch.shares).sum() / len(batch.pairs)


OBJECTIVES: dict[str, Objective] = {
    "kl": mean_kl,
    "logit_difference": logit_difference_error,
    "max_logit_difference": negative_logit_difference,
    "cross_entropy": cross_entropy,
}
"""Objective per value of the setting `trainer.objective`, for models that output logits."""


def distance_by_example(
    batch: Batch, reference: Tensor, outputs: Tensor, output: Output = Output.logits
) -> Tensor:
    """The distance from the full model on each example, [batch]; 0 is best.

    For logits, the mean of `kl_per_token`. For values, the largest absolute difference.
    """
    if output is not Output.logits:
        errors = (reference.float() - outputs.float()).abs().amax(-1)
        return _reduce_by_example(errors, batch, "amax")
    kl = kl_per_token(reference, outputs) * batch.shares
    return kl.new_zeros(len(batch.pairs)).index_add(0, batch.rows, kl)


def _reduce_by_example(values: Tensor, batch: Batch, reduction: str) -> Tensor:
    """[predicted] -> [batch], the `amax` or `amin` of each example's predicted tokens."""
    empty = values.new_empty(len(batch.pairs))
    return empty.scatter_reduce(0, batch.rows, values, reduction, include_self=False)


@dataclass(frozen=True)
class ExampleMetrics:
    """How one model does on each example; every tensor is [example], on the CPU.

    Answers are compared with distractors at the token where they differ: the difference of their
    logits' log-sum-exps, and of their summed probabilities. Both are NaN without distractors.
    """

    kl: Tensor  # `distance_by_example` of logits; NaN for values
    error: Tensor  # `distance_by_example` of values; NaN for logits
    exact_match: Tensor  # 1 if every most likely token is the reference's, else 0
    correct: Tensor  # 1 if every most likely token is that of a right answer, else 0
    logit_difference: Tensor
    probability_difference: Tensor
    log_probability: Tensor  # of the tokens to predict, mean over tokens; NaN for values
    predicted: tuple[Tensor, ...]  # [predicted] each, most likely tokens, or the numbers output

    @classmethod
    def concatenate(cls, batches: Sequence[Self]) -> Self:
        """The examples of several batches, in order."""
        parts = {field.name: [getattr(b, field.name) for b in batches] for field in fields(cls)}
        predicted = sum(parts.pop("predicted"), ())
        return cls(**{k: torch.cat(v) for k, v in parts.items()}, predicted=predicted)


def measure(
    batch: Batch, reference: Tensor, outputs: Tensor, output: Output = Output.logits
) -> ExampleMetrics:
    """Compare outputs with those of the full model on the clean prompts, and with right answers.

    `reference` and `outputs` are [predicted, vocabulary].
    """
    if output is Output.number:
        predicted, expected, target = outputs[:, 0], reference[:, 0], batch.target_values
        correct = target.isnan()  # any output is right where the target is unknown
    else:
        predicted, expected, target = outputs.argmax(-1), reference.argmax(-1), batch.target_ids
        correct = target < 0
    same = (predicted - expected).abs() <= SAME_NUMBER  # for tokens: equal
    correct |= (predicted - target).abs() <= SAME_NUMBER
    distance = distance_by_example(batch, reference, outputs, output)
    unknown = torch.full_like(distance, math.nan)
    if output is Output.logits:
        correct |= _belongs_to_another_answer(predicted, batch)
        log_p = torch.log_softmax(outputs.float(), -1)  # [predicted, vocabulary]
        found = {
            "kl": distance,
            "error": unknown,
            "logit_difference": logit_differences(batch, outputs),
            "probability_difference": _probability_differences(batch, log_p),
            "log_probability": _log_probabilities(batch, log_p),
        }
    else:
        by_logits = ("kl", "logit_difference", "probability_difference", "log_probability")
        found = {"error": distance, **dict.fromkeys(by_logits, unknown)}
    for name, flags in ("exact_match", same), ("correct", correct):
        found[name] = _reduce_by_example(flags.float(), batch, "amin")
    predicted = predicted.cpu().split([len(pair.target_ids) for pair in batch.pairs])
    found = {name: x.cpu().double() for name, x in found.items()}
    return ExampleMetrics(predicted=predicted, **found)


def _belongs_to_another_answer(predicted: Tensor, batch: Batch) -> Tensor:
    """[predicted], whether a token is right because of an answer other than the target."""
    flags: list[bool] = []
    tokens = iter(predicted.tolist())
    for pair in batch.pairs:
        right = {*pair.also_right, *((pair.contrast, token) for token in pair.answer_ids)}
        flags += [(index, next(tokens)) in right for index in range(len(pair.target_ids))]
    return torch.tensor(flags, device=predicted.device)


def _log_probabilities(batch: Batch, log_p: Tensor) -> Tensor:
    """[batch], log probability of the tokens to predict in nats, mean over each example's."""
    log_p = log_p.gather(-1, batch.target_ids.clamp(min=0)[:, None])[:, 0] * batch.shares
    return log_p.new_zeros(len(batch.pairs)).index_add(0, batch.rows, log_p)


def _probability_differences(batch: Batch, log_p: Tensor) -> Tensor:
    """[batch], probability of the answers minus that of the distractors; NaN without any."""
    at_contrast = log_p[batch.contrasts]  # [batch, vocabulary]
    return _minus_distractors(batch, lambda ids: _log_sum_exp(at_contrast, ids).exp())


@dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`.

    `summary` computes it from the examples of the circuit, the full model and the empty circuit.
    """

    name: str  # key in `Metrics` and in files
    label: str  # short name in tables
    description: str  # what it measures, with its unit; also the label of an axis
    summary: Callable[[ExampleMetrics, ExampleMetrics, ExampleMetrics], float]
    better: Literal["lower", "higher"] | None = "higher"  # None: it does not rank circuits
    format: str = ""  # format specification, or "" for three significant digits
    needs_distractors: bool = False  # whether it covers only examples with distractors
    headline: bool = False  # whether plots and short tables show it

    def text(self, value: float | None) -> str:
        """The value in this format; "–" for no value."""
        if value is None or math.isnan(value):
            return "–"
        is_scaled = 1e-6 <= abs(value) < math.inf
        decimals = 2 - math.floor(math.log10(abs(value))) if is_scaled else 0
        return f"{value:{self.format or f'.{min(max(decimals, 0), 6)}f'}}"


def _kl_standard_error(circuit: ExampleMetrics, *_: ExampleMetrics) -> float:
    return circuit.kl.std().item() / len(circuit.kl) ** 0.5 if len(circuit.kl) > 1 else math.nan


def _two_way_accuracy(circuit: ExampleMetrics, *_: ExampleMetrics) -> float:
    differences = circuit.logit_difference[~circuit.logit_difference.isnan()]
    return torch.heaviside(differences, differences.new_tensor(0.5)).mean().item()


def _recovered(*models: ExampleMetrics) -> float:
    mean, upper, lower = (model.logit_difference.nanmean().item() for model in models)
    return (mean - lower) / (upper - lower) if upper != lower else math.nan


METRICS = {
    metric.name: metric
    for metric in (
        Metric("kl", "KL", "KL from the full model (nats per token)",
               # Rounding errors make a KL of 0 negative.
               lambda c, *_: c.kl.mean().clamp(min=0).item(), better="lower", headline=True),
        Metric("kl_standard_error", "standard error of KL", "standard error of the mean KL",
               _kl_standard_error, better=None),
        Metric("error", "error", "largest difference from the full model",
               lambda c, *_: c.error.mean().item(), better="lower", headline=True),
        Metric("exact_match", "exact match", "fraction with the full model's prediction",
               lambda c, *_: c.exact_match.mean().item(), format=".3f", headline=True),
        Metric("accuracy", "accuracy", "fraction with a correct prediction",
               lambda c, *_: c.correct.mean().item(), format=".3f", headline=True),
        Metric("two_way_accuracy", "two-way accuracy",
               "fraction whose answers are likelier than distractors (a tie counts half)",
               _two_way_accuracy, format=".3f", needs_distractors=True),
        Metric("logit_difference", "logit difference",
               "log-sum-exp of the answers' logits minus that of the distractors'",
               lambda c, *_: c.logit_difference.nanmean().item(), needs_distractors=True),
        Metric("logit_difference_recovered", "logit difference recovered",
               "logit difference on a scale from the empty circuit (0) to the full model (1)",
               _recovered, format=".3f", needs_distractors=True),
        Metric("probability_difference", "probability difference",
               "probability of the answers minus that of the distractors",
               lambda c, *_: c.probability_difference.nanmean().item(), format=".3f",
               needs_distractors=True),
    )
}  # fmt: skip
"""All metrics, by name, in the order in which they are shown."""


class Metrics(dict[str, float]):
    """The value of each metric of `METRICS`, by name or as an attribute, such as `metrics.kl`.

    Values are means over the examples to which a metric applies; NaN if there are none.
    """

    def __getattr__(self, name: str) -> float:
        if name not in self:
            raise AttributeError(f"unknown metric {name!r}; choose {', '.join(self)}")
        return self[name]

    @classmethod
    def of(cls, circuit: ExampleMetrics, full: ExampleMetrics, empty: ExampleMetrics) -> Self:
        """Summarise a circuit's examples, given those of the full model and the empty circuit."""
        return cls({name: metric.summary(circuit, full, empty) for name, metric in METRICS.items()})
