"""Model files as people have them: incomplete, damaged, adapted, with large activations."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import random_gpt2, random_pairs
from safetensors.torch import load_file, save_file
from test_llama import FAMILIES, SMALL, random_llama
from test_quantized import write_gguf
from transformers import LlamaConfig

from edgeprune.errors import DataError, ModelError
from edgeprune.models import gguf
from edgeprune.models.load import load_model, wrap_model
from edgeprune.models.parity import verify_parity

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A Llama as `save_pretrained` writes it, with the embedded model's tokenizer."""
    folder = tmp_path / "llama"
    random_llama(LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewrite(folder, change) -> None:
    """Replace the weights, a dictionary, by what a function makes of them."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def without(name):
    return lambda weights: {key: w for key, w in weights.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("layers.1.mlp.up_proj"), "layers.1.mlp.up_proj.weight"),
        (without("lm_head"), "lm_head.weight"),
        (without("norm.weight"), "model.layers.0.input_layernorm.weight"),
        (lambda w: {f"wrapper.{key}": value for key, value in w.items()}, "wrapper."),
        (lambda w: {k: v[:-1].clone() if "down" in k else v for k, v in w.items()}, "down_proj"),
    ],
    ids=["tensor", "head", "norms", "prefix", "shape"],
)
def test_weights_that_would_be_random_are_refused_by_name(folder, change, named):
    load_model(folder)
    rewrite(folder, change)
    with pytest.raises(ModelError, match=named):
        load_model(folder)


def test_a_missing_weight_in_one_of_several_files_is_refused(folder):
    model = random_llama(LlamaConfig(**SMALL))
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(key for key, shard in index["weight_map"].items() if shard == shards[1].name)
    save_file(without(name)(load_file(shards[1])), shards[1], {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        load_model(folder)
    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name):
        load_model(folder)


def test_tied_and_unused_weights_may_be_missing_or_left_over(tmp_path, tokenizer):
    hf_model = random_llama(FAMILIES["llama-tied"])
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / WEIGHTS))
    rewrite(tmp_path, lambda w: w | {"model.layers.0.rotary_emb.inv_freq": torch.ones(4)})
    load_model(tmp_path)


@pytest.mark.skipif(find_spec("peft") is not None, reason="peft merges the adapter")
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_not_left_out(folder, tmp_path, alone):
    adapter = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    adapted = tmp_path / "adapted"
    if alone:
        adapted.mkdir()
    else:
        shutil.copytree(folder, adapted)
    (adapted / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ModelError, match=r"LoRA.*peft"):
        load_model(adapted)


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "config.json"])
def test_git_lfs_pointers_are_named(folder, file):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 193656\n"
    (folder / file).write_text(pointer)
    with pytest.raises(ModelError, match=rf"{file}.*Git LFS"):
        load_model(folder)


def test_a_file_that_is_cut_off_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=rf"{WEIGHTS}.*cut off"):
        load_model(folder)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_llama(LlamaConfig(**SMALL)))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="tiny.gguf.*cut off"):
        load_model(path)


def test_weights_that_are_not_finite_are_named(folder):
    rewrite(folder, lambda w: {k: v / 0 if "layers.2.mlp.up" in k else v for k, v in w.items()})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model(folder)


@pytest.mark.parametrize("field", ["clean_ids", "corrupted_ids", "target_ids", "distractor_ids"])
def test_tokens_that_the_model_lacks_are_named(field):
    model = wrap_model(random_gpt2())  # of 50 tokens
    pairs = random_pairs(3)
    model.check_prompts(pairs)
    bad = replace(pairs[1], **{field: (*getattr(pairs[1], field)[:-1], 50)})
    with pytest.raises(DataError, match="token 50"):
        model.check_prompts([*pairs, bad])


def with_large_activations(hf_model):
    """Scale what the first MLP writes, so that the stream is a thousand times its usual size."""
    layers = hf_model.transformer.h if hasattr(hf_model, "transformer") else hf_model.model.layers
    mlp = layers[0].mlp
    last = mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj
    last.weight.data *= 1000
    return hf_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_large_activations_in_16_bits_are_only_rounding(family, dtype):
    attention = "eager" if family == "gemma2" else "sdpa"
    hf_model = random_gpt2() if family == "gpt2" else random_llama(FAMILIES[family], attention)
    weights = {name: w.clone() for name, w in with_large_activations(hf_model).to(dtype)
               .named_parameters()}  # fmt: skip
    model = wrap_model(hf_model)
    verify_parity(model)
    for name, weight in hf_model.named_parameters():  # cast meanwhile, and back
        assert weight.dtype == dtype and torch.equal(weight, weights[name])


def test_a_fault_smaller_than_the_rounding_is_found():
    model = wrap_model(random_llama(FAMILIES["llama"]).bfloat16())
    verify_parity(model)
    block = model.architecture.blocks[1]
    mlp = block.mlp
    block.mlp = lambda x: 1.002 * mlp(x)  # numbers in bfloat16 are .004 to .008 apart
    with pytest.raises(ModelError, match="parity"):
        verify_parity(model)


def test_overflow_is_not_blamed_on_the_model():
    hf_model = with_large_activations(random_llama(FAMILIES["llama"]))
    hf_model.model.layers[0].mlp.up_proj.weight.data *= 1000
    verify_parity(wrap_model(hf_model.bfloat16()))
    with pytest.raises(ModelError, match=r"overflow in float16.*bfloat16"):
        verify_parity(wrap_model(hf_model.half()))


def test_a_gguf_file_is_expanded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_llama(LlamaConfig(**SMALL)))
    first = load_model(path, device="cpu")
    monkeypatch.setattr(gguf, "_expand", None)  # would fail
    second = load_model(path, device="cpu")
    assert first.fingerprint() == second.fingerprint()
    # Another file of the same name is another model.
    monkeypatch.undo()
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    other = random_llama(LlamaConfig(**SMALL))
    other.model.embed_tokens.weight.data *= 2
    write_gguf(path, other)
    assert load_model(path, device="cpu").fingerprint() != first.fingerprint()
