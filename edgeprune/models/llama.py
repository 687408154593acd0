"""The Llama family: names its parts and runs a block with a separate input per reader.

Covers models with Llama's block: norm, attention with rotary positions and grouped key/value heads,
norm, gated MLP. Differences (biases, norms of queries and keys, layers without rotation, sliding
windows, capped attention scores) are taken from the loaded modules; rotation and eager attention
are the functions of the model's own source file.

Gemma 2 and 3 also norm the outputs of attention and MLP. For the MLP this is one more module. The
norm of the heads' sum multiplies every head's outbox by the same factor per token, so the outboxes
still add up to the output: o_h -> w o_h / sqrt(mean((sum_h o_h)^2) + eps).
"""

import copy
import sys
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgeprune.engine.architecture import Architecture, Block
from edgeprune.engine.heads import attention_mask, project_to_heads

AttentionInputs = dict[str, tuple[Any, tuple[Tensor, Tensor]]]
"""Per layer type, an attention mask and (cos, sin) of the rotation, [1, pos, d_head] each."""


class LlamaBlock(Block):
    """Runs a loaded decoder layer head by head."""

    def __init__(self, layer: nn.Module, layer_type: str) -> None:
        attention = layer.self_attn
        self.layer = layer
        self.attention_norm = layer.input_layernorm
        self.attention_output = attention.o_proj
        if hasattr(layer, "pre_feedforward_layernorm"):  # outputs are normed
            if attention.o_proj.bias is not None:
                raise ValueError("a norm of the heads' outputs cannot be combined with a bias")
            self.heads_norm = layer.post_attention_layernorm
            self.mlp_norm = layer.pre_feedforward_layernorm
            self.mlp_output = layer.post_feedforward_layernorm
            self.mlp = nn.Sequential(layer.mlp, self.mlp_output)
        else:
            self.heads_norm = None
            self.mlp_norm = layer.post_attention_layernorm
            self.mlp = self.mlp_output = layer.mlp
        self.attention, self.layer_type = attention, layer_type
        self.num_heads = attention.config.num_attention_heads
        self.ungrouped = copy.copy(attention)  # tells the library's functions not to repeat keys
        self.ungrouped.num_key_value_groups = 1
        self.attention_copies = (self.ungrouped,)
        self.d_head = attention.head_dim
        source = sys.modules[type(attention).__module__]
        self.rotate = source.apply_rotary_pos_emb
        self.eager_attention = source.eager_attention_forward

    @property
    def heads_output(self) -> nn.Module:
        return self.attention_output if self.heads_norm is None else self.heads_norm

    def attend(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """[reader, batch, pos, d_model] -> [batch, pos, head * d_head]."""
        is_split = len(x) == 3 * self.num_heads  # keys and values per query head
        attention = self.ungrouped if is_split else self.attention
        mask, rotation = inputs[self.layer_type]
        q, k, v = self._project(x)  # [batch, head or kv_head, pos, d_head] each
        if getattr(attention, "use_rope", True):
            q, k = self.rotate(q, k, *rotation)
        implementation = attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.eager_attention)
        options = {"dropout": 0.0, "scaling": attention.scaling}
        if self.layer_type == "sliding_attention":
            options["sliding_window"] = attention.config.sliding_window
        if getattr(attention, "attn_logit_softcapping", None) is not None:
            options["softcap"] = attention.attn_logit_softcapping
        values, _ = attend(attention, q, k, v, mask, **options)
        return self.scale(rearrange(values, "batch pos head d_head -> batch pos (head d_head)"))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute queries, keys and values before rotation."""
        attention = self.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = (-1, self.d_head)  # weights are [head or kv_head, d_head, d_model] each
        weights = [_weight(linear, x.dtype).unflatten(0, heads) for linear in projections]
        bias = None
        if attention.q_proj.bias is not None:  # [head + 2 * kv_head, d_head]
            bias = torch.cat([linear.bias for linear in projections]).unflatten(0, heads)
        qkv = project_to_heads(x, self.attention_norm, weights, bias, self.fused)
        qkv = qkv.transpose(0, 1)  # [batch, reader, pos, d_head]
        num_kv_readers = (len(x) - self.num_heads) // 2
        q, k, v = qkv.split([self.num_heads, num_kv_readers, num_kv_readers], 1)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q, k, v

    def scale(self, values: Tensor) -> Tensor:
        """Multiply by the factor of the norm of the heads' sum, if there is such a norm."""
        if self.heads_norm is None:
            return values
        linear = self.attention_output
        written = nn.functional.linear(values, _weight(linear, values.dtype), linear.bias)
        mean_square = written.float().square().mean(-1, keepdim=True)
        return values * torch.rsqrt(mean_square + self.heads_norm.eps).to(values.dtype)

    def output_weight(self, dtype: torch.dtype) -> Tensor:
        weight = _weight(self.attention_output, dtype)
        if self.heads_norm is not None:
            weight = (1 + self.heads_norm.weight)[:, None] * weight
        return weight.T.unflatten(0, (-1, self.d_head))


class Llama(Architecture):
    """A loaded model of the Llama family."""

    embeddings = ("embeds",)

    def __init__(self, model: nn.Module) -> None:
        self.body = model.model
        self.embedding_modules = [self.body.embed_tokens]
        config = self.body.config
        # Mistral has one window for all layers, or none; the other models list the layers' types.
        has_window = getattr(config, "sliding_window", None) is not None
        one_type = "sliding_attention" if has_window else "full_attention"
        types = getattr(config, "layer_types", None) or [one_type] * config.num_hidden_layers
        self.blocks = [LlamaBlock(*pair) for pair in zip(self.body.layers, types, strict=True)]
        self.final_norm = self.body.norm
        self.unembed = model.lm_head
        self.cap = getattr(config, "final_logit_softcapping", None)

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [1, batch, pos, d_model]: the token embeddings."""
        return self.body.embed_tokens(ids)[None]

    def logits(self, x: Tensor) -> Tensor:
        logits = self.unembed(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def attention_inputs(self, embeddings: Tensor) -> AttentionInputs:
        rotary, config = self.body.rotary_emb, self.body.config
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        layer_types = {block.layer_type for block in self.blocks}
        if hasattr(rotary, "layer_types"):  # frequencies differ by layer type
            rotations = {t: rotary(embeddings, positions, t) for t in layer_types}
        else:
            rotations = dict.fromkeys(layer_types, rotary(embeddings, positions))

        def mask(layer_type: str) -> Any:
            if layer_type == "sliding_attention":
                make, window = create_sliding_window_causal_mask, config.sliding_window
                return attention_mask(make, config, embeddings, window)
            return attention_mask(create_causal_mask, config, embeddings)

        return {layer_type: (mask(layer_type), rotations[layer_type]) for layer_type in layer_types}


def _weight(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight, [out, in], dequantised if it was loaded in 4 or 8 bits."""
    weight = linear.weight
    if not weight.is_floating_point():
        # This module is slow to import.
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, getattr(linear, "state", None))
    return weight.to(dtype)
