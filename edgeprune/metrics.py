"""Faithfulness and behaviour, as pure functions of logits.

Logits are [predicted, vocabulary], one row a predicted token; `Batch` says which example and which
tokens each row belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.dataset import Batch


def kl_per_token(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || circuit) of each predicted token, in nats, [predicted]."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(logits.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_by_example(values: Tensor, batch: Batch) -> Tensor:
    """[predicted] -> [batch], the mean over each example's predicted tokens."""
    num_examples = len(batch.clean_ids)
    sums = torch.zeros(num_examples, dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, batch.rows, values)
    counts = torch.bincount(batch.rows, minlength=num_examples)
    return sums / counts


@dataclass(frozen=True)
class ExampleScores:
    """What one model does on each example of a batch; every field is [batch].

    Attributes:
        kl: from the reference, nats per predicted token.
        correct: every predicted token is the most likely one (or one of several right answers).
        exact_match: every most likely token is the reference's.
        logit_difference: log-sum-exp of the answers' logits less that of the distractors'; NaN
            without distractors.
        probability_difference: the answers' probability less the distractors'; NaN likewise.
        predicted: the most likely token where answer and distractor part.
    """

    kl: Tensor
    correct: Tensor
    exact_match: Tensor
    logit_difference: Tensor
    probability_difference: Tensor
    predicted: Tensor


def score(batch: Batch, reference: Tensor, logits: Tensor) -> ExampleScores:
    """Compare logits with the reference's and with the right answers.

    Args:
        batch: says what is predicted where.
        reference: logits of the full model on the clean prompts.
        logits: of the model to be scored.
    """
    best = logits.argmax(-1)
    right = best == batch.target_ids
    for pair, at in zip(batch.pairs, batch.contrasts.tolist(), strict=True):
        if best[at].item() in pair.answer_ids:
            right[at] = True

    def every(flags: Tensor) -> Tensor:
        return mean_by_example(flags.float(), batch) == 1

    at_contrast = logits[batch.contrasts].float()
    differences = torch.full((len(batch.pairs), 2), float("nan"))
    for row, pair in enumerate(batch.pairs):
        if pair.distractor_ids:
            differences[row, 0] = _log_odds(at_contrast[row], pair.answer_ids, pair.distractor_ids)
            probabilities = at_contrast[row].softmax(-1)
            differences[row, 1] = (
                probabilities[list(pair.answer_ids)].sum()
                - probabilities[list(pair.distractor_ids)].sum()
            )
    return ExampleScores(
        kl=mean_by_example(kl_per_token(reference, logits), batch),
        correct=every(right),
        exact_match=every(best == reference.argmax(-1)),
        logit_difference=differences[:, 0],
        probability_difference=differences[:, 1],
        predicted=best[batch.contrasts],
    )


def _log_odds(logits: Tensor, answers: tuple[int, ...], distractors: tuple[int, ...]) -> Tensor:
    return logits[list(answers)].logsumexp(0) - logits[list(distractors)].logsumexp(0)
