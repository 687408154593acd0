"""Faithfulness and behaviour, as pure functions of logits.

Logits are [predicted, vocabulary], one row a predicted token; `Batch` says which example and which
tokens each row belongs to. Compiled transformers give values in their place (see `Output`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from edgeprune.prompts import Batch

SAME_NUMBER = 1e-3
"""Numbers that differ by no more are the same answer."""


class Output(Enum):
    """What a model gives at each position; how far two of them are apart follows from it.

    logits: of tokens; apart by the KL divergence of their probabilities.
    one_hot: values, near 1 in the column of the answer and 0 elsewhere; apart by their difference,
        since a softmax of values between 0 and 1 is nearly flat.
    number: one column, the answer itself; apart by the difference.
    """

    logits = "logits"
    one_hot = "one_hot"
    number = "number"


def kl_per_token(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || circuit) of each predicted token, in nats, [predicted]."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(logits.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def unexplained_variance(reference: Tensor, outputs: Tensor) -> Tensor:
    """sum |reference - outputs|^2 / sum |reference - mean reference|^2, over all predicted tokens.

    0: the same outputs; 1: as bad as always giving the mean. Without a unit, so that a price on an
    edge means the same for fractions and for counts.
    """
    reference, outputs = reference.float(), outputs.float()
    variance = (reference - reference.mean(0)).square().sum()
    constant = variance < 1e-6 * len(reference)  # outputs that never vary are measured as they are
    scale = torch.where(constant, float(len(reference)), variance)
    return (reference - outputs).square().sum() / scale


def faithfulness(
    batch: Batch, reference: Tensor, outputs: Tensor, output: Output = Output.logits
) -> Tensor:
    """KL(reference || circuit), mean over an example's predicted tokens and over examples, nats.

    Where outputs are values in place of logits: the share of their variance that is unexplained.
    """
    if output is not Output.logits:
        return unexplained_variance(reference, outputs)
    return (kl_per_token(reference, outputs) * batch.shares).sum() / len(batch.pairs)


def error_per_token(reference: Tensor, outputs: Tensor) -> Tensor:
    """Largest absolute difference over the columns, [predicted]."""
    return (reference.float() - outputs.float()).abs().amax(-1)


def mean_by_example(values: Tensor, batch: Batch) -> Tensor:
    """[predicted] -> [batch], the mean over each example's predicted tokens."""
    nothing = values.new_zeros(len(batch.clean_ids))
    return nothing.index_add(0, batch.rows, values * batch.shares)


@dataclass(frozen=True)
class ExampleMetrics:
    """What one model does on each example of a batch; every tensor is [batch].

    Attributes:
        kl: from the reference, nats per predicted token; NaN where outputs are not logits.
        error: largest absolute difference from the reference; NaN where outputs are logits.
        correct: every predicted token is the most likely one, or that of another answer which is
            the same up to there.
        exact_match: every most likely token is the reference's.
        logit_difference: log-sum-exp of the answers' logits less that of the distractors', at the
            token in which distractors differ from the prediction, of answers that are the same up
            to there; NaN without distractors.
        probability_difference: the answers' probability less the distractors'; NaN likewise.
        predicted: of each example, the most likely tokens, [predicted]; the numbers themselves
            where outputs are numbers.
    """

    kl: Tensor
    error: Tensor
    correct: Tensor
    exact_match: Tensor
    logit_difference: Tensor
    probability_difference: Tensor
    predicted: tuple[Tensor, ...]


def score(
    batch: Batch, reference: Tensor, logits: Tensor, output: Output = Output.logits
) -> ExampleMetrics:
    """Compare logits with the reference's and with the right answers.

    Args:
        batch: says what is predicted where.
        reference: logits of the full model on the clean prompts.
        logits: of the model to be scored.
        output: what both are.
    """
    if output is not Output.logits:
        return _score_values(batch, reference, logits, output)
    best = logits.argmax(-1)
    right = (best == batch.target_ids) | (batch.target_ids < 0)
    at_contrast = logits[batch.contrasts].float().cpu()  # fetched once, not number by number
    right |= torch.tensor(_of_other_answers(best.tolist(), batch), device=right.device)
    differences = torch.full((len(batch.pairs), 2), float("nan"))
    for row, pair in enumerate(batch.pairs):
        if pair.distractor_ids:
            differences[row, 0] = _log_odds(at_contrast[row], pair.answer_ids, pair.distractor_ids)
            probabilities = at_contrast[row].softmax(-1)
            differences[row, 1] = (
                probabilities[list(pair.answer_ids)].sum()
                - probabilities[list(pair.distractor_ids)].sum()
            )
    return ExampleMetrics(
        kl=mean_by_example(kl_per_token(reference, logits), batch),
        error=torch.full((len(batch.pairs),), float("nan")),
        correct=_every(right, batch),
        exact_match=_every(best == reference.argmax(-1), batch),
        logit_difference=differences[:, 0],
        probability_difference=differences[:, 1],
        predicted=_by_example(best, batch),
    )


def _of_other_answers(best: list[int], batch: Batch) -> list[bool]:
    """[predicted], whether a most likely token is right by an answer other than the target."""
    flags: list[bool] = []
    for pair in batch.pairs:
        right = {*pair.also_right, *((pair.contrast, token) for token in pair.answer_ids)}
        tokens = best[len(flags) : len(flags) + len(pair.target_ids)]
        flags += [place in right for place in enumerate(tokens)]
    return flags


def _score_values(
    batch: Batch, reference: Tensor, outputs: Tensor, output: Output
) -> ExampleMetrics:
    if output is Output.number:
        best, wanted, of_reference = outputs[:, 0], batch.target_values, reference[:, 0]
        right = ((best - wanted).abs() <= SAME_NUMBER) | wanted.isnan()
        same = (best - of_reference).abs() <= SAME_NUMBER
    else:
        best, wanted, of_reference = outputs.argmax(-1), batch.target_ids, reference.argmax(-1)
        right = (best == wanted) | (wanted < 0)
        same = best == of_reference
    error = torch.zeros(len(batch.pairs), device=outputs.device).scatter_reduce(
        0, batch.rows, error_per_token(reference, outputs), "amax"
    )
    unknown = torch.full((len(batch.pairs),), float("nan"))
    return ExampleMetrics(
        kl=unknown,
        error=error,
        correct=_every(right, batch),
        exact_match=_every(same, batch),
        logit_difference=unknown,
        probability_difference=unknown,
        predicted=_by_example(best, batch),
    )


def _every(flags: Tensor, batch: Batch) -> Tensor:
    """[predicted] -> [batch], whether all of an example's are true."""
    return mean_by_example((~flags).float(), batch) == 0


def _by_example(values: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """[predicted] -> the values of each example, on the CPU."""
    return values.cpu().split([len(pair.target_ids) for pair in batch.pairs])


def _log_odds(logits: Tensor, answers: tuple[int, ...], distractors: tuple[int, ...]) -> Tensor:
    return logits[list(answers)].logsumexp(0) - logits[list(distractors)].logsumexp(0)
