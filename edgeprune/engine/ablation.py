"""What an ablated edge carries: the corrupted prompt's value, zero, or a mean.

With zero ablation it carries nothing of its writer. A head's share of the bias of the attention's
output is part of what the head writes (Bhaskar et al. 2024, arXiv:2406.16778, and their code), and
so is ablated with it. EAP-IG and MIB count this bias, like a GPT-2's positions, to no node, so that
it always flows there; for models with either, zero ablation gives other values there. Under
interchange ablation both cancel: they are the same on the clean and the corrupted prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.errors import ConfigError, DataError
from edgeprune.prompts import Batch, Pair, iterate_batches

log = logging.getLogger("edgeprune")

ABLATIONS = ("interchange", "zero", "mean")
"""The supported kinds of ablation."""


class Ablation:
    """Provides the ablation values of each batch.

    Args:
        kind: `interchange`, `zero` or `mean`.
        reference_set: the prompts; mean ablation averages over the clean ones.
        per_position: whether mean ablation uses one mean per position, or one over all positions.
        batch_size: pairs per forward pass of mean ablation.

    Attributes:
        needs_corrupted: whether the values are activations on the corrupted prompts.
        means: the mean activations of mean ablation, with a batch axis of length 1, and a position
            axis of length 1 unless `per_position`.

    Raises DataError for interchange ablation if every corrupted prompt equals its clean prompt.
    """

    def __init__(
        self,
        model: CircuitModel,
        kind: str,
        reference_set: Sequence[Pair],
        *,
        per_position: bool = True,
        batch_size: int = 64,
    ) -> None:
        if kind not in ABLATIONS:
            raise ConfigError(f"unknown ablation {kind!r}; choose {', '.join(ABLATIONS)}")
        self.kind, self.per_position = kind, per_position
        self.needs_corrupted = kind == "interchange"
        num_same = sum(pair.clean_ids == pair.corrupted_ids for pair in reference_set)
        if self.needs_corrupted and num_same == len(reference_set):
            raise DataError(
                "interchange ablation changes nothing, because all corrupted prompts equal their "
                "clean prompts; give other corrupted prompts, or use ablation zero or mean"
            )
        if self.needs_corrupted and num_same:
            log.warning(
                f"{num_same:,} of {len(reference_set):,} corrupted prompts are the same as their "
                "clean prompts: nothing can be learned from them, and they lower every KL"
            )
        self.means: Activations | None = None
        if kind == "mean":
            self.means = _mean_activations(model, reference_set, batch_size, per_position)

    @classmethod
    def of(
        cls,
        model: CircuitModel,
        ablation: Ablation | str,
        reference_set: Sequence[Pair],
        batch_size: int = 64,
    ) -> Ablation:
        """Return an ablation unchanged, or make one from the name of its kind."""
        if isinstance(ablation, Ablation):
            return ablation
        return cls(model, ablation, reference_set, batch_size=batch_size)

    def values(self, batch: Batch, corrupted: Activations | None) -> Activations | None:
        """The ablation values of a batch, given its corrupted activations; None: zeros."""
        if self.means is None:
            return corrupted if self.needs_corrupted else None
        num_examples, length = batch.clean_ids.shape
        known = self.means.residuals[0].shape[-2]
        if self.per_position and length > known:
            raise ValueError(
                f"a prompt has {length} tokens, but the reference set of the per-position means "
                f"only {known}; give longer prompts there, or use per_position=false"
            )

        def expand(x: Tensor) -> Tensor:
            x = x[..., :length, :] if self.per_position else x
            return x.expand(*x.shape[:-3], num_examples, length, x.shape[-1])

        return self.means.map(expand)


@torch.no_grad()
def _mean_activations(
    model: CircuitModel, pairs: Sequence[Pair], batch_size: int, per_position: bool
) -> Activations:
    """Average the activations on the clean prompts; padding is left out."""
    totals: Activations | None = None
    width = max(len(pair.clean_ids) for pair in pairs)
    counts = torch.zeros(width)
    for batch in iterate_batches(pairs, batch_size):
        model.check_padding(batch)
        batch = batch.to(model.device)
        _, activations = model.run_full(batch.clean_ids, slice(None))
        length = batch.clean_ids.shape[1]
        is_token = torch.arange(length, device=model.device) < batch.lengths[:, None]
        counts[:length] += is_token.sum(0).cpu()
        sums = activations.map(partial(_sum_examples, is_token, width))
        totals = sums if totals is None else totals.map(torch.add, sums)
    if not per_position:
        totals = totals.map(lambda x: x.sum(-2, keepdim=True))
        counts = counts.sum(0, keepdim=True)
    like = next(model.architecture.body.parameters())
    return totals.map(lambda x: (x / counts.clamp(min=1)[:, None]).to(like.dtype).to(like.device))


def _sum_examples(is_token: Tensor, width: int, x: Tensor) -> Tensor:
    """Sum [..., batch, pos, d] over the examples without padding -> [..., 1, width, d]."""
    summed = (x.float() * is_token[..., None]).sum(-3, keepdim=True)
    summed = summed.cpu().double()  # Apple's GPUs have no float64
    return nn.functional.pad(summed, (0, 0, 0, width - summed.shape[-2]))
