"""Pairs of clean and corrupted token ids, and the batches made of them.

Batches are padded on the right: under causal attention padding cannot influence the tokens before
it, so no attention mask is needed.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt as token ids, with the tokens to predict.

    Attributes:
        clean_ids, corrupted_ids: the model's inputs, of equal length: each prompt and all but the
            last token of its prediction.
        target_ids: the tokens to predict, at the last positions; -1 where unknown.
        answer_ids, distractor_ids: the right and the wrong tokens at target `contrast`, if any.
        contrast: index of the target at which answers and distractors are compared.
        text: the clean prompt, for display.
        target_values: the numbers to predict if the model outputs numbers, NaN where unknown;
            `target_ids` are then all 0, the only column.
        also_right: (index of the target, token) of the answers that differ from it elsewhere.
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

    def token_ids(self, with_predictions: bool = True) -> tuple[int, ...]:
        """All token ids of the prompts and, unless left out, of what can be predicted."""
        prompts = self.clean_ids + self.corrupted_ids
        predictions = self.target_ids + self.answer_ids + self.distractor_ids
        return prompts + predictions if with_predictions else prompts


@dataclass(frozen=True)
class Batch:
    """Padded token ids of several pairs, and the positions that predict their targets.

    Attributes:
        clean_ids, corrupted_ids: [batch, pos], padded on the right.
        lengths: [batch], number of tokens without padding.
        rows, cols: [predicted], batch and position index of each predicting position.
        shares: [predicted], 1 / number of the example's targets.
        target_ids: [predicted], the tokens to predict; -1 where unknown.
        target_values: [predicted], the numbers to predict; NaN where there is none.
        contrasts: [batch], index into `predicted` of each pair's target `contrast`.
        answer_ids, distractor_ids: [batch, up to the most of a pair], padded with -1.
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
    answer_ids: Tensor
    distractor_ids: Tensor
    pairs: tuple[Pair, ...]

    def map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply a function to each tensor and the tensors of the same name in `others`."""
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        batches = (self, *others)
        return replace(self, **{n: function(*(getattr(b, n) for b in batches)) for n in names})

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pad pairs to the longest one and index their predicting positions."""
    sizes = [(len(pair.clean_ids), len(pair.target_ids), pair.contrast) for pair in pairs]
    lengths, counts, contrasts = torch.tensor(sizes).T.contiguous()  # each [batch]
    firsts = counts.cumsum(0) - counts  # [batch], index of each pair's first target
    rows = torch.tensor([row for row, pair in enumerate(pairs) for _ in pair.target_ids])
    values = (pair.target_values or [math.nan] * len(pair.target_ids) for pair in pairs)

    def padded(field: str, value: int = 0) -> Tensor:
        rows = [torch.tensor(getattr(pair, field), dtype=torch.long) for pair in pairs]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    return Batch(
        clean_ids=padded("clean_ids"),
        corrupted_ids=padded("corrupted_ids"),
        lengths=lengths,
        rows=rows,
        cols=torch.arange(len(rows)) + (lengths - counts - firsts)[rows],
        shares=(1 / counts)[rows],
        target_ids=torch.tensor([*chain(*(pair.target_ids for pair in pairs))]),
        target_values=torch.tensor([*chain(*values)]),
        contrasts=contrasts + firsts,
        answer_ids=padded("answer_ids", -1),
        distractor_ids=padded("distractor_ids", -1),
        pairs=tuple(pairs),
    )


def iterate_batches(dataset: Sequence[Pair], batch_size: int) -> Iterator[Batch]:
    """Yield every example once, grouped by length to minimise padding; for evaluation."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    pairs = sorted(dataset, key=lambda pair: len(pair.clean_ids))
    for start in range(0, len(pairs), batch_size):
        yield collate(pairs[start : start + batch_size])


def draw_pairs(pairs: Sequence[Pair], count: int, seed: int = 0) -> list[Pair]:
    """That many of the pairs, drawn at random; all of them, in order, if there are fewer."""
    if len(pairs) <= count:
        return list(pairs)
    return random.Random(seed).sample(list(pairs), count)


def training_pairs(dataset: Sequence[Pair], batch_size: int, seed: int, step: int) -> list[Pair]:
    """Choose the pairs of one optimisation step, from (seed, step) alone, so that runs can resume.

    Each epoch is a new permutation of the data without a last, smaller batch, so that every step
    has the same weight (the published trainer keeps it). A smaller dataset forms one batch.
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
