"""Metrics as functions of logits, and the one table of them.

Logits are [predicted, vocabulary], one row per predicted token; `Batch` says which example each row
belongs to. Compiled transformers output values instead of logits (see `Output`).

To add a metric, add an entry to `METRICS`, and a field to `ExampleMetrics` if none has what it
needs. Summaries, tables, plots and files are made from the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from edgeprune.prompts import Batch

SAME_NUMBER = 1e-3
"""Numeric outputs that differ by at most this much count as the same answer."""
MAX_DECIMALS = 6
"""Metrics without a fixed format are shown with at most this many decimals."""


class Output(Enum):
    """What a model outputs at each position, which determines how two outputs are compared.

    logits: logits of tokens, compared by the KL divergence of their probabilities.
    one_hot: values near 1 in the answer's column and near 0 elsewhere, compared by their
        difference, since a softmax of values between 0 and 1 is nearly flat.
    number: one column that holds the answer itself, compared by the difference.
    """

    logits = "logits"
    one_hot = "one_hot"
    number = "number"


# ----------------------------------------------------------------------- distances of two outputs


def kl_per_token(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || circuit) per predicted token, in nats, [predicted]."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(logits.float(), -1)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def error_per_token(reference: Tensor, outputs: Tensor) -> Tensor:
    """Largest absolute difference over the columns, [predicted]."""
    return (reference.float() - outputs.float()).abs().amax(-1)


def unexplained_variance(reference: Tensor, outputs: Tensor) -> Tensor:
    """sum |reference - outputs|^2 / sum |reference - mean reference|^2, over all predicted tokens.

    0 for equal outputs; 1 is as bad as always outputting the mean. It has no unit, so the same
    price per edge suits fractions and counts.
    """
    reference, outputs = reference.float(), outputs.float()
    variance = (reference - reference.mean(0)).square().sum()
    constant = variance < 1e-6 * len(reference)  # the reference does not vary: mean squared error
    scale = torch.where(constant, float(len(reference)), variance)
    return (reference - outputs).square().sum() / scale


def faithfulness(
    batch: Batch, reference: Tensor, outputs: Tensor, output: Output = Output.logits
) -> Tensor:
    """The distance from the full model that training minimises, a scalar; 0 is best.

    For logits, KL(reference || circuit) in nats, averaged over each example's predicted tokens and
    then over examples. For values, `unexplained_variance`.
    """
    if output is not Output.logits:
        return unexplained_variance(reference, outputs)
    return (kl_per_token(reference, outputs) * batch.shares).sum() / len(batch.pairs)


def mean_by_example(values: Tensor, batch: Batch) -> Tensor:
    """[predicted] -> [batch], the mean over each example's predicted tokens."""
    zeros = values.new_zeros(len(batch.clean_ids))
    return zeros.index_add(0, batch.rows, values * batch.shares)


# ----------------------------------------------------------------------------------- per example


@dataclass(frozen=True)
class ExampleMetrics:
    """How one model does on each example; every tensor is [example].

    Attributes:
        kl: KL from the reference in nats per predicted token; NaN if outputs are values.
        error: largest absolute difference from the reference; NaN if outputs are logits.
        exact_match: whether every most likely token is the reference's.
        correct: whether every most likely token is the target, or belongs to another right answer.
        logit_difference: log-sum-exp of the answers' logits minus that of the distractors', at the
            token where they differ; NaN without distractors.
        probability_difference: probability of the answers minus that of the distractors, at the
            same token; NaN without distractors.
        predicted: the most likely tokens of each example, [predicted]; if outputs are numbers, the
            numbers.
    """

    kl: Tensor
    error: Tensor
    exact_match: Tensor
    correct: Tensor
    logit_difference: Tensor
    probability_difference: Tensor
    predicted: tuple[Tensor, ...]

    @classmethod
    def concatenate(cls, batches: Sequence[ExampleMetrics]) -> ExampleMetrics:
        """The examples of several batches, in order, on the CPU."""
        names = [field.name for field in fields(cls) if field.name != "predicted"]
        return cls(
            **{
                name: torch.cat([getattr(batch, name).cpu() for batch in batches]) for name in names
            },
            predicted=tuple(tokens for batch in batches for tokens in batch.predicted),
        )


def measure(
    batch: Batch, reference: Tensor, outputs: Tensor, output: Output = Output.logits
) -> ExampleMetrics:
    """Compare a model's outputs with the reference's and with the right answers.

    Args:
        batch: the prompts.
        reference: [predicted, vocabulary], outputs of the full model on the clean prompts.
        outputs: [predicted, vocabulary], outputs of the model to be measured.
        output: the kind of both.
    """
    if output is Output.number:
        predicted, target = outputs[:, 0], batch.target_values
        correct = ((predicted - target).abs() <= SAME_NUMBER) | target.isnan()
        same = (predicted - reference[:, 0]).abs() <= SAME_NUMBER
    else:
        predicted, target = outputs.argmax(-1), batch.target_ids
        correct = (predicted == target) | (target < 0)
        same = predicted == reference.argmax(-1)
    kl = error = torch.full((len(batch.pairs),), math.nan)
    differences = torch.full((len(batch.pairs), 2), math.nan)
    if output is Output.logits:
        kl = mean_by_example(kl_per_token(reference, outputs), batch)
        correct |= _belongs_to_another_answer(predicted, batch)
        differences = _answers_minus_distractors(outputs, batch)
    else:
        zeros = torch.zeros(len(batch.pairs), device=outputs.device)
        error = error_per_token(reference, outputs)
        error = zeros.scatter_reduce(0, batch.rows, error, "amax")
    return ExampleMetrics(
        kl=kl,
        error=error,
        exact_match=_all_by_example(same, batch),
        correct=_all_by_example(correct, batch),
        logit_difference=differences[:, 0],
        probability_difference=differences[:, 1],
        predicted=predicted.cpu().split([len(pair.target_ids) for pair in batch.pairs]),
    )


def _belongs_to_another_answer(predicted: Tensor, batch: Batch) -> Tensor:
    """[predicted], whether a token is right because of an answer other than the target."""
    flags: list[bool] = []
    tokens = iter(predicted.tolist())
    for pair in batch.pairs:
        right = {*pair.also_right, *((pair.contrast, token) for token in pair.answer_ids)}
        flags += [(index, next(tokens)) in right for index in range(len(pair.target_ids))]
    return torch.tensor(flags, device=predicted.device)


def _answers_minus_distractors(logits: Tensor, batch: Batch) -> Tensor:
    """[example, 2], difference in logits and in probability; NaN without distractors."""
    at_contrast = logits[batch.contrasts].float().cpu()  # one transfer for all examples
    differences = torch.full((len(batch.pairs), 2), math.nan)
    for row, (pair, values) in enumerate(zip(batch.pairs, at_contrast, strict=True)):
        if pair.distractor_ids:
            answers, distractors = list(pair.answer_ids), list(pair.distractor_ids)
            differences[row, 0] = values[answers].logsumexp(0) - values[distractors].logsumexp(0)
            probabilities = values.softmax(-1)
            differences[row, 1] = probabilities[answers].sum() - probabilities[distractors].sum()
    return differences


def _all_by_example(flags: Tensor, batch: Batch) -> Tensor:
    """[predicted] -> [batch], whether all of an example's flags are true."""
    return mean_by_example((~flags).float(), batch) == 0


# -------------------------------------------------------------------------------------- the table


def _mean(values: Tensor, full: Tensor, empty: Tensor) -> float:
    return values.mean().item()


def _mean_with_distractors(values: Tensor, full: Tensor, empty: Tensor) -> float:
    return values.nanmean().item()


def _mean_not_negative(values: Tensor, full: Tensor, empty: Tensor) -> float:
    return values.mean().clamp(min=0).item()  # rounding errors make a KL of 0 negative


def _standard_error(values: Tensor, full: Tensor, empty: Tensor) -> float:
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan


def _recovered(values: Tensor, full: Tensor, empty: Tensor) -> float:
    mean, upper, lower = (x.nanmean().item() for x in (values, full, empty))
    return (mean - lower) / (upper - lower) if upper != lower else math.nan


def _two_way(examples: ExampleMetrics) -> Tensor:
    difference = examples.logit_difference
    return torch.heaviside(difference, torch.tensor(0.5)).double().where(
        ~difference.isnan(), math.nan
    )  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`.

    Attributes:
        name: key in `Metrics` and in files.
        label: short name in tables.
        description: what it measures, with its unit; also the label of an axis.
        values: function from `ExampleMetrics` to [example]; NaN where it does not apply.
        summary: function from the values of a model, of the full model and of the empty circuit to
            the metric over all examples.
        better: direction of better circuits; None if the metric does not rank circuits.
        format: format specification, or "" for three significant digits.
        needs_distractors: whether it covers only examples with distractors.
        headline: whether plots and short tables show it.
    """

    name: str
    label: str
    description: str
    values: Callable[[ExampleMetrics], Tensor]
    summary: Callable[[Tensor, Tensor, Tensor], float] = _mean
    better: Literal["lower", "higher"] | None = "higher"
    format: str = ""
    needs_distractors: bool = False
    headline: bool = False

    def text(self, value: float | None, like: float | None = None) -> str:
        """The value as text; with as many decimals as `like` gets, if given; "–" for no value."""
        if value is None or math.isnan(value):
            return "–"
        like = abs(value if like is None else like)
        decimals = 2 - math.floor(math.log10(like)) if like >= 0.1**MAX_DECIMALS else 0
        return f"{value:{self.format or f'.{min(max(decimals, 0), MAX_DECIMALS)}f'}}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "kl", "KL", "KL from the full model (nats per token)",
            values=lambda examples: examples.kl.double(), summary=_mean_not_negative,
            better="lower", headline=True,
        ),
        Metric(
            "kl_standard_error", "standard error of KL", "standard error of the mean KL",
            values=lambda examples: examples.kl.double(), summary=_standard_error, better=None,
        ),
        Metric(
            "error", "error", "largest difference from the full model",
            values=lambda examples: examples.error.double(), better="lower", headline=True,
        ),
        Metric(
            "exact_match", "exact match", "fraction with the full model's prediction",
            values=lambda examples: examples.exact_match.double(), format=".3f", headline=True,
        ),
        Metric(
            "accuracy", "accuracy", "fraction with a correct prediction",
            values=lambda examples: examples.correct.double(), format=".3f", headline=True,
        ),
        Metric(
            "two_way_accuracy", "two-way accuracy",
            "fraction whose answers are likelier than distractors (a tie counts half)",
            values=_two_way, summary=_mean_with_distractors, format=".3f", needs_distractors=True,
        ),
        Metric(
            "logit_difference", "logit difference",
            "log-sum-exp of the answers' logits minus that of the distractors'",
            values=lambda examples: examples.logit_difference, summary=_mean_with_distractors,
            needs_distractors=True,
        ),
        Metric(
            "logit_difference_recovered", "logit difference recovered",
            "logit difference on a scale from the empty circuit (0) to the full model (1)",
            values=lambda examples: examples.logit_difference, summary=_recovered, format=".3f",
            needs_distractors=True,
        ),
        Metric(
            "probability_difference", "probability difference",
            "probability of the answers minus that of the distractors",
            values=lambda examples: examples.probability_difference,
            summary=_mean_with_distractors, format=".3f", needs_distractors=True,
        ),
    )
}  # fmt: skip
"""All metrics, by name, in the order in which they are shown."""


class Metrics(dict[str, float]):
    """The value of every metric in `METRICS`, by name or as an attribute, such as `metrics.kl`.

    Means are over examples, or over the examples with distractors where the metric needs them. NaN
    where a metric does not apply.
    """

    def __getattr__(self, name: str) -> float:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"unknown metric {name!r}; choose {', '.join(self)}") from None

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{name}={value:.4g}' for name, value in self.items())})"

    @classmethod
    def of(cls, examples: ExampleMetrics, full: ExampleMetrics, empty: ExampleMetrics) -> Metrics:
        """Summarise a model's examples.

        Args:
            examples: the model's.
            full, empty: those of the full model and of the empty circuit, on the same prompts.
        """
        models = (examples, full, empty)
        return cls({name: m.summary(*map(m.values, models)) for name, m in METRICS.items()})

    @classmethod
    def mean(cls, several: Sequence[Metrics]) -> Metrics:
        """The mean of each metric over several models."""
        return cls({name: sum(m[name] for m in several) / len(several) for name in METRICS})
