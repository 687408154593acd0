"""GPT-2: names its parts and runs a block with a separate input per reader."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from edgeprune.engine.architecture import Architecture, Block
from edgeprune.engine.heads import attention_mask, project_to_heads


class GPT2Block(Block):
    """Runs a loaded block head by head."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.attention_norm = layer.ln_1
        self.attention_output = layer.attn.c_proj
        self.mlp_norm = layer.ln_2
        activation = layer.mlp.act
        if isinstance(activation, NewGELUActivation):  # runs each product and sum separately
            activation = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(layer.mlp.c_fc, activation, layer.mlp.c_proj)
        self.mlp_output = layer.mlp
        self.attention = layer.attn
        self.d_head = layer.attn.head_dim

    def attend(self, x: Tensor, mask: Any) -> Tensor:
        """[3 * head, batch, pos, d_model] -> [batch, pos, head * d_head]."""
        project, heads = self.attention.c_attn, (-1, self.d_head)
        weight = project.weight.T.unflatten(0, heads)  # [reader, d_head, d_model]
        bias = project.bias.unflatten(0, heads)  # [reader, d_head]
        qkv = project_to_heads(x, self.attention_norm, [weight], bias, self.fused)
        qkv = rearrange(qkv, "(part head) batch pos d_head -> part batch head pos d_head", part=3)
        implementation = self.attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        scaling = self.attention.scaling
        values, _ = attend(self.attention, *qkv, mask, dropout=0.0, scaling=scaling)
        return rearrange(values, "batch pos head d_head -> batch pos (head d_head)")

    def output_weight(self, dtype: torch.dtype) -> Tensor:
        return self.attention_output.weight.unflatten(0, (-1, self.d_head))


class GPT2(Architecture):
    """A loaded GPT-2."""

    embeddings = ("tok_embeds", "pos_embeds")

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.body = model.transformer
        self.embedding_modules = [self.body.wte, self.body.wpe]
        self.blocks = [GPT2Block(layer) for layer in self.body.h]
        self.final_norm = self.body.ln_f
        self.unembed = model.lm_head

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [2, batch, pos, d_model]: token and position embeddings."""
        tokens = self.body.wte(ids)
        positions = self.body.wpe(torch.arange(ids.shape[1], device=ids.device))
        return torch.stack([tokens, positions.expand_as(tokens)])

    def attention_inputs(self, embeddings: Tensor) -> Any:
        return attention_mask(create_causal_mask, self.body.config, embeddings)
