"""The memory plan against numbers worked out by hand, and the memory that is free."""

import math

import pytest
import torch
from conftest import random_gpt2, random_pairs
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeprune.engine.cache import KeptPasses
from edgeprune.models.load import wrap_model
from edgeprune.scale import memory
from edgeprune.scale.memory import free_memory, memory_allowed, plan_memory


def meta_model(config, dtype=torch.float32, **graph_settings):
    with torch.device("meta"):
        return wrap_model(AutoModelForCausalLM.from_config(config, dtype=dtype), **graph_settings)


def test_code_llama_13b():
    """One example of 72 tokens, in bfloat16."""
    model = meta_model(
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
    rotation = 1024  # the rotary frequencies' buffers
    assert plan.weights == pytest.approx(40 * layer + rest, abs=rotation)
    num_writers = 1 + 40 * 41
    num_readers = 40 * 121
    deltas = 2 * num_writers * 72 * 5120 * 2
    assert deltas <= plan.outboxes <= deltas + 1.05 * num_readers * 72 * 5120 * 2
    stream, heads, mlps = 81, 40, 40
    assert plan.corrupted == (1 + stream + heads + mlps) * 72 * 5120 * 2 + 3 * 32016 * 4
    assert plan.masks == 8 * 4 * 3_877_661
    assert plan.kept == 0  # more than MAX_KEPT
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
    assert packed.blocks == plan.blocks + 40 * 4 * 5120 * 5120 * 2  # dequantised q, k, v and o


def test_a_small_model_s_plan_agrees_with_the_model():
    hf_model = random_gpt2()
    pairs = random_pairs(6)
    plan = plan_memory(meta_model(hf_model.config), pairs, 4)
    assert plan.weights == sum(p.nbytes for p in hf_model.parameters())  # embeddings are tied
    assert plan.kept == KeptPasses.size(wrap_model(hf_model), pairs, corrupted=True)


def test_split_readers_take_more_inputs_and_nothing_else_of_weights():
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    pairs = random_pairs(2)
    models = [meta_model(config, split_kv_readers=choice) for choice in (False, True)]
    shared, split = (plan_memory(model, pairs, 2) for model in models)
    assert [len(model.graph.sites[0].readers) for model in models] == [12, 24]
    input_bytes = 2 * len(pairs[0].clean_ids) * 64 * 4  # of a reader
    # All readers' inputs are kept; the last layer's MLP and the output read predicted tokens only.
    assert split.outboxes - shared.outboxes >= 4 * 12 * input_bytes
    assert split.weights == shared.weights


def test_recomputing_and_smaller_batches_take_less():
    model = meta_model(random_gpt2(n_layer=24).config)
    pairs = random_pairs(8)
    whole, again = (plan_memory(model, pairs, 8, recompute=flag) for flag in (False, True))
    assert again.blocks < whole.blocks / 2
    assert again.outboxes < whole.outboxes
    assert again.weights == whole.weights
    half = plan_memory(model, pairs, 4)
    assert half.blocks < whole.blocks and half.outboxes < whole.outboxes


def test_free_memory_respects_the_limits_of_all_control_groups(tmp_path, monkeypatch):
    """As in a container or a SLURM job, whose limit is not set on the innermost group."""
    root, own = tmp_path / "cgroup", tmp_path / "own"

    def group(path: str, limit: object, current: int, inactive: int) -> float:
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nslab 1\n")
        return memory_allowed(root, own)

    assert memory_allowed(root, own) == math.inf  # no control groups
    own.write_text("4:memory:/older\n0::/job/step/task\n")
    assert memory_allowed(root, own) == math.inf  # version 1
    assert group("job", 1000, 700, 200) == 1000 - 700 + 200
    assert group("job/step/task", "max", 100, 0) == 500
    assert group("job/step", 900, 600, 50) == 900 - 600 + 50
    assert group("job/step", 900, 901, 0) == 0
    own.write_text("0::/elsewhere/of/the/host\n")  # a container, which sees its own as the root
    assert memory_allowed(root, own) == math.inf
    assert group("", 300, 100, 0) == 200

    monkeypatch.setattr(memory, "memory_allowed", lambda: 200)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory("cpu") == 100
