"""What a model family has to provide: `Block` and `Architecture`, implemented in `models/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from edgeprune.metrics import Output


class Block(Protocol):
    """One transformer block, run with a separate input per reader."""

    layer: nn.Module  # the loaded module of the whole block
    d_head: int
    attention_norm: nn.Module  # the norm of the queries', keys' and values' inputs
    attention_output: nn.Module  # the output projection of the heads
    mlp_norm: nn.Module  # the norm of the MLP's input
    mlp: nn.Module  # everything between `mlp_norm` and the residual stream
    mlp_output: nn.Module  # the loaded module whose output is added to the residual stream
    fused: bool  # whether Triton kernels apply `attention_norm` and project; may be set

    def attend(self, x: Tensor, inputs: Any) -> Tensor:
        """Compute the heads' values, [batch, pos, head * d_head], after `scale`.

        Args:
            x: [reader, batch, pos, d_model], for queries, then keys, then values; with zero mean
                over d_model if the norm is a LayerNorm. The backward pass may overwrite it with its
                gradient.
            inputs: the result of `Architecture.attention_inputs`.
        """
        ...

    def scale(self, values: Tensor) -> Tensor:
        """Scale the heads' values so that the heads' outboxes are linear in them."""
        ...

    def head_delta(self, values: Tensor, ablated: Tensor | None, *, centred: bool) -> Tensor:
        """The heads' deltas, [head, ..., d_model]; see `heads.project_from_heads`."""
        ...


class Architecture(Protocol):
    """A loaded model with its parts named."""

    embedding_writers: tuple[str, ...]  # in order
    output: Output  # what `logits` returns
    may_pad: bool  # whether padding on the right leaves the positions before it unchanged
    blocks: Sequence[Block]
    body: nn.Module  # the model without `unembed`
    final_norm: nn.Module
    unembed: nn.Module  # the projection to the vocabulary

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [embedding writer, batch, pos, d_model]."""
        ...

    def attention_inputs(self, embeddings: Tensor) -> Any:
        """Masks and rotary embeddings for `Block.attend`, given [batch, pos, d_model]."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Normed final hidden states [..., d_model] -> [..., vocabulary]."""
        ...
