"""Activations: what the full model computes on some prompts, as values for ablated edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """What the full model computes on a batch of prompts.

    Attributes:
        embeddings: [embedding writer, batch, pos, d_model].
        head_values: per layer, [batch, pos, head * d_head]: the input of the output projection,
            after `Block.scale`.
        mlp_outputs: per layer, [batch, pos, d_model].
        residuals: per site, [batch, pos, d_model]: the residual stream, without its mean over
            d_model if all norms are LayerNorms.
    """

    embeddings: Tensor
    head_values: Sequence[Tensor] | Tensor
    mlp_outputs: Sequence[Tensor] | Tensor
    residuals: Sequence[Tensor] | Tensor

    def stacked(self) -> Activations:
        """Stack each sequence into one tensor, so that `map` makes four calls."""
        fields = vars(self).values()
        return Activations(*(x if isinstance(x, Tensor) else torch.stack(x) for x in fields))

    def map(self, function: Callable[..., Tensor], *others: Activations) -> Activations:
        """Apply a function to every tensor (and to the corresponding tensors of the others)."""

        def map_field(name: str) -> Tensor | tuple[Tensor, ...]:
            items = [getattr(activations, name) for activations in (self, *others)]
            if isinstance(items[0], Tensor):
                return function(*items)
            return tuple(function(*tensors) for tensors in zip(*items, strict=True))

        return Activations(*(map_field(name) for name in vars(self)))
