"""The Llama family: where its parts are, and how a block runs on a separate input for each reader.

Covers what shares Llama's block: norm, attention with rotary positions over grouped key/value
heads, norm, gated MLP, and nothing between a head's output projection and the residual stream. What
differs inside (biases, norms of queries and keys, layers without rotation, sliding windows) is read
off the loaded modules; rotation and eager attention are those of the model's own source file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgeprune.graph import CircuitGraph
from edgeprune.modeling.heads import project_from_heads, project_to_heads

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
"""Layer type -> what makes its mask."""


def build_graph(config: Any, *, embedding_writers: bool) -> CircuitGraph:
    return CircuitGraph(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        embedding_writers=Llama.embedding_writers if embedding_writers else (),
    )


@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs beside the states.

    Attributes:
        masks: one for each layer type.
        rotation: (cos, sin), [1, pos, d_head] each.
    """

    masks: dict[str, Any]
    rotation: tuple[Tensor, Tensor]


class LlamaBlock:
    """Runs the parts of a loaded decoder layer head by head."""

    def __init__(self, layer: nn.Module, layer_type: str) -> None:
        attention = layer.self_attn
        self.attention_norm = layer.input_layernorm
        self.attention_output = attention.o_proj
        self.mlp_norm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.attention = attention
        self.layer_type = layer_type
        self.num_heads = attention.config.num_attention_heads
        self.num_kv_heads = attention.config.num_key_value_heads
        self.d_head = attention.head_dim
        source = sys.modules[type(attention).__module__]
        self.rotate = source.apply_rotary_pos_emb
        self.eager_attention = source.eager_attention_forward

    def attend(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Queries, keys and values from an input of their own each.

        Args:
            x: [head + 2 * kv_head, batch, pos, d_model]; all q, then k, then v.
            inputs: masks and rotation.

        Returns:
            The heads' values, [batch, pos, head * d_head].
        """
        attention = self.attention
        _, batch, pos, _ = x.shape
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [
            _weight(linear).to(x.dtype).view(-1, self.d_head, x.shape[-1]) for linear in projections
        ]
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([linear.bias for linear in projections]).view(len(x), self.d_head)
        qkv = project_to_heads(x, self.attention_norm, weights, bias).transpose(0, 1)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        if getattr(attention, "use_rope", True):
            q, k = self.rotate(q, k, *inputs.rotation)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, self.eager_attention
        )
        is_sliding = self.layer_type == "sliding_attention"
        values, _ = attend(
            attention,
            q,
            k,
            v,
            inputs.masks[self.layer_type],
            dropout=0.0,
            scaling=attention.scaling,
            sliding_window=attention.config.sliding_window if is_sliding else None,
        )
        return values.reshape(batch, pos, self.num_heads * self.d_head)

    def head_delta(self, values: Tensor, corrupted: Tensor | None) -> Tensor:
        """See `project_from_heads`."""
        linear = self.attention_output
        weight = _weight(linear).to(values.dtype).view(-1, self.num_heads, self.d_head)
        return project_from_heads(values, corrupted, weight.permute(1, 2, 0), linear.bias)


class Llama:
    """A loaded model of the Llama family with its parts named."""

    embedding_writers = ("embeds",)

    def __init__(self, model: nn.Module) -> None:
        self.body = model.model
        config = self.body.config
        # Mistral has a window for all layers, or none; the others name each layer's type.
        has_window = getattr(config, "sliding_window", None) is not None
        one_type = "sliding_attention" if has_window else "full_attention"
        types = getattr(config, "layer_types", None) or [one_type] * config.num_hidden_layers
        self.blocks = [LlamaBlock(*pair) for pair in zip(self.body.layers, types, strict=True)]
        self.final_norm = self.body.norm
        self.logits = model.lm_head

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [1, batch, pos, d_model]: the token embeddings."""
        return self.body.embed_tokens(ids)[None]

    def attention_inputs(self, embeddings: Tensor) -> AttentionInputs:
        config = self.body.config
        masks = {
            layer_type: MASKS[layer_type](
                config, embeddings, attention_mask=None, past_key_values=None
            )
            for layer_type in {block.layer_type for block in self.blocks}
        }
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        return AttentionInputs(masks, self.body.rotary_emb(embeddings, position_ids=positions))


def _weight(linear: nn.Linear) -> Tensor:
    """[out, in]; unpacked if it was loaded in 4 or 8 bits."""
    if linear.weight.is_floating_point():
        return linear.weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # slow to import

    return dequantize_bnb_weight(linear.weight, getattr(linear, "state", None))
