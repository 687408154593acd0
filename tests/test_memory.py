"""The plan of a run's memory: against numbers worked out by hand, and refused before loading."""

import json
import shutil

import pytest
import torch
from conftest import assert_refused, random_gpt2, random_pairs, run_cli
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeprune.engine.cache import KeptPasses
from edgeprune.models import wrap_model
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.scale.memory import plan_memory


def shape_of(config, dtype=torch.float32):
    with torch.device("meta"):
        return wrap_model(AutoModelForCausalLM.from_config(config, dtype=dtype))


def test_code_llama_13b():
    """One example of 72 tokens, in bfloat16."""
    model = shape_of(
        LlamaConfig(
            vocab_size=32016, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
            num_attention_heads=40, num_key_value_heads=40, max_position_embeddings=16384,
        ),
        torch.bfloat16,
    )  # fmt: skip
    pairs = random_pairs(3000, length=72)
    assert model.graph.num_edges == 3_877_661
    layer = 2 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120)
    rest = 2 * (2 * 32016 * 5120 + 5120)
    plan = plan_memory(model, pairs, 1)
    rotation = 1024  # bytes of buffers
    assert plan.weights == pytest.approx(40 * layer + rest, abs=rotation)
    num_writers = 1 + 40 * 41
    num_readers = 40 * 121
    deltas = 2 * num_writers * 72 * 5120 * 2
    assert deltas <= plan.outboxes <= deltas + 1.05 * num_readers * 72 * 5120 * 2
    stream, heads, mlps = 81, 40, 40
    assert plan.corrupted == (1 + stream + heads + mlps) * 72 * 5120 * 2 + 3 * 32016 * 4
    assert plan.masks == 8 * 4 * 3_877_661
    assert plan.kept == 0  # too many to be kept
    assert 30e9 < plan.total < 60e9

    four = plan_memory(model, pairs, 4)
    assert four.outboxes == 4 * plan.outboxes
    assert plan.blocks < four.blocks < 4.1 * plan.blocks  # the folded weights are the same
    shared = plan_memory(model, pairs, 1, shares=8)
    assert shared.weights == pytest.approx(6 * layer + rest, abs=rotation)
    away = plan_memory(model, pairs, 1, shares=8, offload=True)
    assert away.weights == pytest.approx(layer + rest, abs=rotation)
    packed = plan_memory(model, pairs, 1, bits=4)
    assert packed.weights == pytest.approx(40 * layer / 4 + rest, rel=0.01)
    assert packed.blocks == plan.blocks + 40 * 4 * 5120 * 5120 * 2  # unpacked q, k, v and o


def test_the_plan_of_a_small_model_is_that_of_the_real_one():
    hf_model = random_gpt2()
    model, shape = wrap_model(hf_model), shape_of(hf_model.config)
    pairs = random_pairs(6)
    plan = plan_memory(shape, pairs, 4)
    assert plan.weights == sum(p.nbytes for p in hf_model.parameters())  # embeddings are tied
    assert plan.kept == KeptPasses.size(model, pairs, corrupted=True)
    assert "outboxes 0.000 GB" in str(plan)


def test_running_blocks_again_takes_less_and_fewer_pairs_at_a_time_too():
    shape = shape_of(random_gpt2(n_layer=24).config)
    pairs = random_pairs(8)
    whole, again = (plan_memory(shape, pairs, 8, recompute=flag) for flag in (False, True))
    assert again.blocks < whole.blocks / 2
    assert again.outboxes < whole.outboxes
    assert again.weights == whole.weights
    half = plan_memory(shape, pairs, 4)
    assert half.blocks < whole.blocks and half.outboxes < whole.outboxes


def test_what_cannot_fit_is_refused_before_it_is_loaded(tmp_path):
    """There are no weights at all here, but a shape of 550 GB."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig(
        vocab_size=json.loads((model / "config.json").read_text())["vocab_size"],
        hidden_size=65536, intermediate_size=4 * 65536, num_hidden_layers=2,
        num_attention_heads=16,
    )  # fmt: skip
    config.save_pretrained(model)
    done = run_cli("prune", "model=custom", "model.name=giant", f"model.path={model}",
                   "task.train=8", "sparsity=0.9", f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert_refused(
        done, 2, "giant needs about", "weights 550.", "outboxes", "less are free for a process",
        "Take fewer examples at a time", "launcher.shard=true",
    )  # fmt: skip
