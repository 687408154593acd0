"""What a model family has to provide (implemented in `models/`), and a model's fingerprint."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from edgeprune.engine.heads import centre
from edgeprune.errors import ModelError
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import Output

CHUNK_SIZE = 2**22
"""Number of elements of a weight that `fingerprint` converts to int64 at a time."""


PROBED = "edgeprune"
"""The name by which the library knows `heads.attend`."""


class Block:
    """One transformer block, run with a separate input per reader."""

    layer: nn.Module  # the loaded module of the whole block
    attention: nn.Module  # the loaded module that computes the heads' values
    attention_copies: Sequence[nn.Module] = ()  # copies that `attend` may run instead
    d_head: int
    attention_norm: nn.Module  # the norm of the queries', keys' and values' inputs
    attention_output: nn.Module  # the output projection of the heads
    mlp_norm: nn.Module  # the norm of the MLP's input
    mlp: nn.Module  # everything between `mlp_norm` and the residual stream
    mlp_output: nn.Module  # the loaded module whose output is added to the residual stream
    fused = False  # whether Triton kernels apply `attention_norm` and project

    @property
    def heads_output(self) -> nn.Module:
        """The loaded module whose output is added to the residual stream for all heads."""
        return self.attention_output

    def attend(self, x: Tensor, inputs: Any) -> Tensor:
        """Compute the heads' values, [batch, pos, head * d_head], after `scale`.

        Args:
            x: [reader, batch, pos, d_model], for queries, then keys, then values, of which there
                may be one per query head (`Architecture.graph`); with zero mean over d_model if the
                norm is a LayerNorm. The backward pass may overwrite it with its gradient.
            inputs: the result of `Architecture.attention_inputs`.
        """
        raise NotImplementedError

    def scale(self, values: Tensor) -> Tensor:
        """Scale the heads' values so that the heads' outboxes are linear in them."""
        return values

    def output_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight by which the heads write, [head, d_head, d_model]."""
        raise NotImplementedError

    def head_delta(self, values: Tensor, ablated: Tensor | None, *, centred: bool) -> Tensor:
        """Compute the heads' deltas, [head, ..., d_model]: their outboxes minus ablation values.

        Args:
            values: [..., head * d_head].
            ablated: the values of ablated edges, of the same shape; None for zero outboxes.
            centred: whether to subtract the mean over d_model.
        """
        weight, bias = self.output_weight(values.dtype), self.attention_output.bias
        num_heads, _, d_model = weight.shape
        weight = centre(weight) if centred else weight  # weights are smaller than outboxes
        delta = values if ablated is None else values - ablated
        by_head = rearrange(delta, "... (head d_head) -> head (...) d_head", head=num_heads)
        if ablated is None and bias is not None:  # it cancels in a difference
            share = (centre(bias) if centred else bias) / num_heads
            outboxes = torch.baddbmm(share.expand(num_heads, 1, d_model), by_head, weight)
        else:
            outboxes = torch.bmm(by_head, weight)  # [head, token, d_model]
        return outboxes.view(num_heads, *values.shape[:-1], d_model)

    def sum_heads(self, values: Tensor) -> Tensor:
        """Sum the heads' outboxes: [..., head * d_head] -> [..., d_model]."""
        weight, bias = self.output_weight(values.dtype), self.attention_output.bias
        summed = values @ weight.flatten(0, 1)
        return summed if bias is None else summed + bias


class Architecture:
    """A loaded model with its parts named."""

    embeddings: tuple[str, ...]  # their names in order, the tokens' first
    embedding_modules: Sequence[nn.Module]  # whose outputs they are, in the full model
    output = Output.logits  # what `logits` returns
    may_pad = True  # whether padding on the right leaves the positions before it unchanged
    blocks: Sequence[Block]
    body: nn.Module  # the model without `unembed`
    final_norm: nn.Module
    unembed: nn.Module  # the projection to the vocabulary

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [embedding, batch, pos, d_model]."""
        raise NotImplementedError

    def graph(
        self,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        embedding_writers: str = "all",
        split_kv_readers: bool = False,
    ) -> CircuitGraph:
        """The model's graph.

        Args:
            num_layers, num_heads, num_kv_heads: the model's.
            embedding_writers: which embeddings are writers with edges of their own: "all", only
                the "tokens", or "none". The others always flow: they reach every reader.
            split_kv_readers: whether query heads that share keys and values have key and value
                readers of their own, as in EAP-IG and MIB; `a5.h1.k` is then query head 1's.

        Raises ModelError for another value of `embedding_writers`.
        """
        writers = {"all": self.embeddings, "tokens": self.embeddings[:1], "none": ()}
        if embedding_writers not in writers:
            raise ModelError(
                f"embedding_writers={embedding_writers!r} is not one of {', '.join(writers)}"
            )
        num_kv_readers = num_heads if split_kv_readers else num_kv_heads
        return CircuitGraph(num_layers, num_heads, num_kv_readers, writers[embedding_writers])

    def attention_inputs(self, embeddings: Tensor) -> Any:
        """Masks and rotary embeddings for `Block.attend`, given [batch, pos, d_model]."""

    @contextmanager
    def probe_attention(self, probe: Callable[[int, str, Tensor], Tensor]) -> Iterator[None]:
        """Let `probe(layer, part, x)` read and replace the parts of attention.

        See `heads.attend` for the parts. The attention implementation is `attend` meanwhile.
        """
        config = self.body.config
        before = config._attn_implementation
        modules = [(block.attention, *block.attention_copies) for block in self.blocks]
        for layer, module in ((n, module) for n, own in enumerate(modules) for module in own):
            module.probe = partial(probe, layer)
        config._attn_implementation = PROBED
        try:
            yield
        finally:
            config._attn_implementation = before
            for module in chain(*modules):
                module.probe = None

    def logits(self, x: Tensor) -> Tensor:
        """Normed final hidden states [..., d_model] -> [..., vocabulary]."""
        return self.unembed(x)


def fingerprint(architecture: Architecture, tokenizer: Any, settings: dict[str, Any]) -> str:
    """SHA-256 that changes with any weight, any setting (JSON values) and a fast tokenizer."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for changed_by_use in ("padding", "truncation"):
            content.pop(changed_by_use, None)
        digest.update(json.dumps(content, sort_keys=True).encode())
    weights = dict(architecture.body.named_parameters())
    weights |= {f"unembed.{name}": w for name, w in architecture.unembed.named_parameters()}
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        for sums in _bit_sums(weight.detach()):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _bit_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a weight's bit patterns, as integers, over its rows and over its columns.

    Integer sums are exact, so they are the same on every device, and any single edit changes them.
    The scales of weights in 4 or 8 bits are not included.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weight.view(integer[weight.element_size()]).reshape(len(weight), -1)  # [row, column]
    chunks = bits.split(max(1, CHUNK_SIZE // bits.shape[1]))
    over_rows = sum(chunk.sum(0, dtype=torch.int64) for chunk in chunks)  # [column]
    return over_rows, torch.cat([chunk.sum(1, dtype=torch.int64) for chunk in chunks])  # [row]
