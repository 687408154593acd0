"""What a model family has to provide: `Block` and `Architecture`, implemented in `models/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from edgeprune.metrics import Output


class Block(Protocol):
    """One transformer block, run with a separate input per reader.

    Attributes:
        layer: the loaded module of the whole block.
        d_head: width of a head.
        attention_norm: the norm of the queries', keys' and values' inputs.
        attention_output: the output projection of the heads.
        mlp_norm: the norm of the MLP's input.
        mlp: everything between `mlp_norm` and the residual stream.
        mlp_output: the loaded module whose output the MLP adds to the residual stream.
        fused: whether a Triton kernel applies `attention_norm` and projects; may be set.
    """

    layer: nn.Module
    d_head: int
    attention_norm: nn.Module
    attention_output: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    mlp_output: nn.Module
    fused: bool

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

    def head_delta(
        self, values: Tensor, ablation_values: Tensor | None, *, centred: bool
    ) -> Tensor:
        """The heads' deltas, [head, ..., d_model]; see `heads.project_from_heads`."""
        ...


class Architecture(Protocol):
    """A loaded model with its parts named.

    Attributes:
        embedding_writers: names of the embedding writers, in order.
        output: what `logits` returns.
        may_pad: whether padding on the right leaves the positions before it unchanged.
        blocks: one per layer.
        body: the model without `unembed`.
        final_norm: the norm before `unembed`.
        unembed: the projection to the vocabulary.
    """

    embedding_writers: tuple[str, ...]
    output: Output
    may_pad: bool
    blocks: Sequence[Block]
    body: nn.Module
    final_norm: nn.Module
    unembed: nn.Module

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [embedding writer, batch, pos, d_model]."""
        ...

    def attention_inputs(self, embeddings: Tensor) -> Any:
        """Masks and rotary embeddings for `Block.attend`, given [batch, pos, d_model]."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Normed final hidden states [..., d_model] -> [..., vocabulary]."""
        ...
