"""The Llama family: each member, with its special features, against Hugging Face."""

import copy

import pytest
import torch
from naive import run_llama
from test_engine import (
    assert_close,
    check_against_naive,
    check_ends,
    mixed_lengths,
    random_gates,
)
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
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import kl_per_token
from edgeprune.models.load import load_model, wrap_model
from edgeprune.models.parity import verify_parity
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
    own = copy.deepcopy(config)  # tests may change it
    model = AutoModelForCausalLM.from_config(own, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gates_of_1_give_the_full_model_and_gates_of_0_the_corrupted_prompt(name, attention, split):
    if attention == "sdpa" and name == "gemma2":
        pytest.skip("sdpa does not support capped scores")
    hf_model = random_llama(FAMILIES[name], attention)
    model = wrap_model(hf_model, split_kv_readers=split)
    check_ends(hf_model, model)
    verify_parity(model)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-biases", "mistral", "qwen3-windows", "gemma", "gemma2", "gemma3"],
)
@pytest.mark.parametrize("ablation", ["interchange", "zero"])
@pytest.mark.parametrize("split", [False, True])
def test_logits_and_gradients_equal_the_naive_engine(name, ablation, split):
    hf_model = random_llama(FAMILIES[name], "eager")
    model = wrap_model(hf_model, split_kv_readers=split)
    check_against_naive(run_llama, hf_model, model, ablation)


# --------------------------------------------------------------------- readers per query head


def test_readers_are_split_only_where_heads_share_them():
    shared, split = (
        wrap_model(random_llama(FAMILIES["llama"]), split_kv_readers=choice).graph
        for choice in (False, True)
    )
    assert (shared.num_kv_heads, split.num_kv_heads) == (2, 4)
    assert split.nodes_fed_by("a0.h1.k") == ["a0.h1"]
    assert CircuitGraph.from_dict(split.to_dict()) == split
    alike = wrap_model(random_llama(FAMILIES["llama-no-groups"]), split_kv_readers=True).graph
    assert alike == split


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-one-kv-head", "qwen2", "qwen3", "gemma2"])
def test_a_shared_reader_acts_as_those_of_its_heads_together(name, recompute):
    """With equal gates in a group, logits agree, and gradients add up over the group."""
    hf_model, batch = random_llama(FAMILIES[name], "eager"), collate(mixed_lengths())
    shared, split = (wrap_model(hf_model, split_kv_readers=choice) for choice in (False, True))
    # For every edge of the split graph, the number of the shared graph's edge.
    group = shared.graph.heads_per_kv_head
    place = []
    for writer, reader in split.graph.edges:
        node, _, kind = reader.rpartition(".")
        if kind in ("k", "v"):
            layer, head = node.split(".h")
            reader = f"{layer}.h{int(head) // group}.{kind}"
        place.append(shared.graph.edge_index((writer, reader)))
    place = torch.tensor(place)
    gates = random_gates(shared.graph)
    split_gates = gates.detach()[place].requires_grad_()
    results = []
    for model, own_gates in ((shared, gates), (split, split_gates)):
        reference, corrupted = model.run_pair(batch)
        logits = model.run_circuit(batch, own_gates, corrupted, recompute=recompute)
        gradient = torch.autograd.grad(kl_per_token(reference, logits).mean(), own_gates)[0]
        results.append((logits, gradient))
    (logits, expected), (split_logits, gradient) = results
    assert_close(split_logits, logits)
    assert expected.abs().max() > 1e-3
    assert_close(torch.zeros_like(expected).index_add_(0, place, gradient), expected, atol=1e-6)


def test_graphs_of_eap_ig_and_mib_are_made_from_configurations():
    config = Qwen2Config(  # Qwen2.5-0.5B
        vocab_size=9, hidden_size=896, intermediate_size=9, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(config)
    model = wrap_model(hf_model, embedding_writers="tokens", split_kv_readers=True)
    assert model.graph.num_edges == 179_749


FAULTS = {
    "rotation": lambda block: {"rotate": lambda q, k, cos, sin: (q, k)},
    "grouping": lambda block: {
        "rotate": lambda q, k, cos, sin, own=block.rotate: own(q, k.flip(1), cos, sin)
    },
    "window": lambda block: {"layer_type": "full_attention"},
    "norm": lambda block: {"attention_norm": torch.nn.Identity()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_check_catches_a_wrong_circuit_pass(fault):
    model = wrap_model(random_llama(MistralConfig(**SMALL, sliding_window=1000)))
    verify_parity(model)
    block = model.architecture.blocks[1]
    vars(block).update(FAULTS[fault](block))
    with pytest.raises(ModelError, match="parity"):
        verify_parity(model)
    assert model.architecture.body.config.sliding_window == 1000


@pytest.mark.parametrize("model_type", ["gpt_neox", "olmo2", "phi3", "granite", "cohere"])
def test_models_that_only_resemble_others_are_refused_by_name(model_type, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(ModelError, match=model_type):
        load_model(tmp_path)
