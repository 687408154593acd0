"""Weights from GGUF files, and weights in 4 and 8 bits."""

import pytest
import torch
from test_llama import SMALL, random_llama
from transformers import LlamaConfig

from edgeprune.errors import ModelError
from edgeprune.evaluation.ablate import ablate
from edgeprune.evaluation.heads import score_heads
from edgeprune.evaluation.tokens import attribute_tokens
from edgeprune.models.load import load_model
from edgeprune.prompts import collate, encode_pair

TOKENS = [chr(code) for code in range(ord("!"), ord("!") + 48)] + ["Ġ", "ĠA"]


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The order of the rows of q and k in a GGUF file: each head's halves are interleaved."""
    rows, width = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, width)
    return halves.transpose(1, 2).reshape(rows, width)


def write_gguf(path, model) -> None:
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["Ġ A"])
    writer.add_token_types([1] * len(TOKENS))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = model.state_dict()
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = "attention" if theirs == "attn_q" else "key_value"
                weight = permuted(weight, getattr(config, f"num_{heads}_heads"))
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_model_that_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    hf_model = random_llama(config)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, hf_model)
    model = load_model(path, device="cpu")
    record = {"clean": '"#$ <predict>A</predict>', "corrupted": "#$% <predict>A</predict>"}
    batch = collate([encode_pair(model.tokenizer, record)])
    assert TOKENS[batch.target_ids[0]] == "ĠA"
    with torch.no_grad():
        wanted = hf_model(batch.clean_ids).logits[:, -1]
    torch.testing.assert_close(model.run_pair(batch)[0], wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="GGUF"):
        load_model(path, bits=4)
    with pytest.raises(ModelError, match="other.gguf"):
        load_model(tmp_path / "other.gguf")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="tiny.gguf"):
        load_model(path)


@pytest.mark.parametrize(("bits", "split"), [(4, False), (8, False), (4, True)])
def test_weights_in_few_bits_give_the_library_s_logits(tmp_path, bits, split, tokenizer):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": len(tokenizer)}
    config = LlamaConfig(**{**SMALL, **sizes})
    hf_model = random_llama(config)
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # includes the parity check
    model = load_model(tmp_path, device="cpu", bits=bits, split_kv_readers=split)
    weight = model.architecture.body.layers[0].self_attn.q_proj.weight
    assert weight.dtype in (torch.uint8, torch.int8)
    gates = torch.full((model.graph.num_edges,), 0.5, requires_grad=True)
    pair = encode_pair(tokenizer, {"clean": "Then Mary<predict> and</predict>",
                                   "corrupted": "Then John<predict> and</predict>"})  # fmt: skip
    batch = collate([pair])
    reference, corrupted = model.run_pair(batch)
    with torch.no_grad(), model.intervene({"a1.h1": 0}) as run:  # an outbox, also in few bits
        head = run.states(batch.clean_ids, ["a1.h1", "a1.h0.pattern"])[1]["a1.h0.pattern"]
    torch.testing.assert_close(head.sum(-1), torch.ones(head.shape[:2]))
    assert score_heads(model, num_random=2, length=5).scores
    ablated = ablate(model, ["a1.h1"], [pair, pair], generate=2, num_random=1)
    assert ablated.ablated.mean("kl") > 0 == ablated.full.mean("kl")
    (answer,) = attribute_tokens(model, [pair]).answers
    assert answer.through["full model"].error <= 0.01
    (model.run_circuit(batch, gates, corrupted) - reference).square().mean().backward()
    assert gates.grad.abs().max() > 0


def test_unsupported_bits_are_refused():
    with pytest.raises(ModelError, match="8 bits .*gpt2"):
        load_model("embedded", bits=8)
    with pytest.raises(ModelError, match="5 bits .*4 or 8"):
        load_model("embedded", bits=5)
