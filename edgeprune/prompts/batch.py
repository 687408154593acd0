"""Pairs of clean and corrupted token ids, and the batches made of them.

Batches are padded on the right: under causal attention padding cannot influence the tokens before
it, so no attention mask is needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt as token ids, with the tokens to predict.

    Attributes:
        clean_ids: the model's input on the clean prompt: the prompt and all but the last token of
            the prediction.
        corrupted_ids: the input on the corrupted prompt, with the same number of tokens.
        target_ids: the tokens to predict, at the last `len(target_ids)` positions; -1 where the
            right token is unknown.
        answer_ids, distractor_ids: the right and the wrong tokens at target `contrast`; empty if
            the example has no answers or distractors.
        contrast: index of the target at which answers and distractors are compared.
        text: the clean prompt, for display.
        target_values: the numbers to predict if the model outputs numbers, NaN where unknown;
            `target_ids` are then all 0, the only column.
        also_right: (index of the target, token) of the answers that differ from the target at
            another token than `contrast`.
    """

    clean_ids: tuple[int, ...]
    corrupted_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    distractor_ids: tuple[int, ...] = ()
    contrast: int = 0
    text: str = ""
    target_values: tuple[float, ...] = ()
    also_right: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Padded token ids of several pairs, and the positions that predict their targets.

    Attributes:
        clean_ids, corrupted_ids: [batch, pos], padded on the right.
        lengths: [batch], number of tokens without padding.
        rows, cols: [predicted], batch and position index of each predicting position.
        shares: [predicted], weight in the mean over an example's targets: 1 / number of targets.
        target_ids: [predicted], the tokens to predict; -1 where unknown.
        target_values: [predicted], the numbers to predict; NaN where there is none.
        contrasts: [batch], index into `predicted` of the target at which answers and distractors
            are compared.
        pairs: the examples, in order.
    """

    clean_ids: Tensor
    corrupted_ids: Tensor
    lengths: Tensor
    rows: Tensor
    cols: Tensor
    shares: Tensor
    target_ids: Tensor
    target_values: Tensor
    contrasts: Tensor
    pairs: tuple[Pair, ...]

    def map(self, function: Callable[..., Tensor], *others: Batch) -> Batch:
        """Apply a function to each tensor and the tensors of the same name in `others`."""
        mapped = {
            name: function(value, *(getattr(other, name) for other in others))
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **mapped)

    def to(self, device: torch.device | str) -> Batch:
        """Move all tensors to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pad pairs to the longest one and index their predicting positions."""
    lengths = [len(pair.clean_ids) for pair in pairs]
    clean = torch.zeros(len(pairs), max(lengths), dtype=torch.long)  # padding may be any token
    corrupted = torch.zeros_like(clean)
    rows, cols, shares, targets, values, contrasts = [], [], [], [], [], []
    for row, pair in enumerate(pairs):
        length = len(pair.clean_ids)
        clean[row, :length] = torch.tensor(pair.clean_ids)
        corrupted[row, :length] = torch.tensor(pair.corrupted_ids)
        contrasts.append(len(rows) + pair.contrast)
        num_targets = len(pair.target_ids)
        rows += [row] * num_targets
        cols += range(length - num_targets, length)
        shares += [1 / num_targets] * num_targets
        targets += pair.target_ids
        values += pair.target_values or [math.nan] * num_targets
    return Batch(
        clean_ids=clean,
        corrupted_ids=corrupted,
        lengths=torch.tensor(lengths),
        rows=torch.tensor(rows),
        cols=torch.tensor(cols),
        shares=torch.tensor(shares),
        target_ids=torch.tensor(targets),
        target_values=torch.tensor(values),
        contrasts=torch.tensor(contrasts),
        pairs=tuple(pairs),
    )


def iterate_batches(dataset: Sequence[Pair], batch_size: int) -> Iterator[Batch]:
    """Yield every example once, grouped by length to minimise padding; for evaluation.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    pairs = sorted(dataset, key=lambda pair: len(pair.clean_ids))
    for start in range(0, len(pairs), batch_size):
        yield collate(pairs[start : start + batch_size])


def training_pairs(dataset: Sequence[Pair], batch_size: int, seed: int, step: int) -> list[Pair]:
    """Choose the pairs of one optimisation step, from (seed, step) alone, so that runs can resume.

    Each epoch is a new permutation of the data. Pairs left over after the last full batch of an
    epoch are skipped, so that every step has the same weight; the published trainer instead ends
    an epoch with a smaller batch. A dataset smaller than `batch_size` forms one batch.
    """
    size = min(batch_size, len(dataset))
    epoch, index = divmod(step, len(dataset) // size)
    order = _epoch_order(len(dataset), seed, epoch)
    return [dataset[i] for i in order[index * size : (index + 1) * size]]


@lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
