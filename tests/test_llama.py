"""The Llama family: each member, with what makes it special, against Hugging Face."""

import pytest
import torch
from conftest import random_pairs
from naive import all_open, run_llama
from test_engine import random_gates
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from edgeprune.errors import ModelError
from edgeprune.methods.masks import CircuitMasks, combined_gates
from edgeprune.metrics import kl_per_token
from edgeprune.models import load, verify_parity, wrap_model
from edgeprune.prompts import collate

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}


FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama-one-kv-head": LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "llama-no-groups": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**SMALL, head_dim=12),
    "llama-rope-linear": LlamaConfig(**SMALL, **rope("linear", factor=4.0)),
    "llama-rope-dynamic": LlamaConfig(**SMALL, **rope("dynamic", factor=2.0)),
    "llama-rope-yarn": LlamaConfig(
        **SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "llama-rope-llama3": LlamaConfig(
        **SMALL,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16),
    ),
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "mistral-no-window": MistralConfig(**SMALL, sliding_window=None, head_dim=12),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-windows": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, layer_types=SLIDING
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=12, attention_bias=True),
    "qwen3-windows": Qwen3Config(
        **SMALL, head_dim=8, use_sliding_window=True, sliding_window=4, layer_types=SLIDING
    ),
    "gemma": GemmaConfig(**SMALL, head_dim=12),
    "gemma2": Gemma2Config(
        **SMALL, head_dim=12, query_pre_attn_scalar=20, sliding_window=4, layer_types=SLIDING,
        attn_logit_softcapping=0.5, final_logit_softcapping=2.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL, head_dim=8, query_pre_attn_scalar=20, sliding_window=4, layer_types=SLIDING,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        },
    ),
    "smollm3": SmolLM3Config(
        **SMALL, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=4,
        layer_types=SLIDING,
    ),
}  # fmt: skip


def random_llama(config, attention: str = "sdpa"):
    """Random weights, biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def mixed_lengths() -> list:
    return random_pairs(2, 11) + random_pairs(2, 7, seed=1, predicted=3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_open_gates_are_the_model_and_closed_gates_the_corrupted_prompt(name, attention):
    if attention == "sdpa" and name == "gemma2":
        pytest.skip("sdpa cannot cap scores")
    hf_model = random_llama(FAMILIES[name], attention)
    model = wrap_model(hf_model)
    batch = collate(mixed_lengths())
    _, corrupted = model.run_pair(batch)
    at = (batch.rows, batch.cols)
    for gate, ids in ((1.0, batch.clean_ids), (0.0, batch.corrupted_ids)):
        gates = torch.full((model.graph.num_edges,), gate)
        with torch.no_grad():
            wanted = hf_model(ids).logits[at]
            got = model.run_circuit(batch, gates, corrupted)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    verify_parity(model)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-biases", "mistral", "qwen3-windows", "gemma", "gemma2", "gemma3"],
)
@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_logits_and_gradients_equal_the_naive_engine(name, ablation):
    hf_model = random_llama(FAMILIES[name], "eager")
    model = wrap_model(hf_model)
    graph = model.graph
    batch = collate(mixed_lengths())
    gates = random_gates(graph)
    inputs = [gates.edge, gates.node]

    with torch.no_grad():
        naive_reference, _ = run_llama(hf_model, batch.clean_ids, all_open(graph), graph, None)
        _, outboxes = run_llama(hf_model, batch.corrupted_ids, all_open(graph), graph, None)
    closed = outboxes if ablation == "interchange" else None
    naive, _ = run_llama(hf_model, batch.clean_ids, gates, graph, closed)
    naive = naive[batch.rows, batch.cols]
    loss = kl_per_token(naive_reference[batch.rows, batch.cols], naive).mean()
    wanted = torch.autograd.grad(loss, inputs)

    reference, corrupted = model.run_pair(batch)
    mixed = combined_gates(gates, CircuitMasks(graph).edge_writers)
    logits = model.run_circuit(batch, mixed, corrupted if ablation == "interchange" else None)
    got = torch.autograd.grad(kl_per_token(reference, logits).mean(), inputs)

    torch.testing.assert_close(logits, naive, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in wanted) > 1e-3
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def break_rotation(block) -> None:
    block.rotate = lambda q, k, cos, sin: (q, k)


def break_grouping(block) -> None:
    rotate = block.rotate

    def with_keys_in_disorder(q, k, cos, sin):
        q, k = rotate(q, k, cos, sin)
        return q, k.flip(1)

    block.rotate = with_keys_in_disorder


def break_window(block) -> None:
    block.layer_type = "full_attention"


def break_norm(block) -> None:
    block.attention_norm = torch.nn.Identity()


@pytest.mark.parametrize("fault", [break_rotation, break_grouping, break_window, break_norm])
def test_the_check_catches_a_model_that_is_run_wrongly(fault):
    model = wrap_model(random_llama(MistralConfig(**SMALL, sliding_window=1000)))
    verify_parity(model)
    fault(model.architecture.blocks[1])
    with pytest.raises(ModelError, match="parity check failed"):
        verify_parity(model)
    assert model.architecture.body.config.sliding_window == 1000


@pytest.mark.parametrize("model_type", ["olmo2", "phi3", "granite", "cohere"])
def test_what_only_looks_like_llama_is_refused_by_name(model_type):
    assert model_type not in load.FAMILIES
