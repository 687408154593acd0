"""What `edgeprune benchmark` compares and counts; how long anything takes is no test."""

import json

import pytest
import torch
from conftest import random_gpt2, random_pairs, run_cli
from test_engine import random_gates
from test_llama import SMALL, random_llama
from transformers import LlamaConfig

from edgeprune.evaluation import benchmark, naive
from edgeprune.metrics import kl_per_token
from edgeprune.models import wrap_model
from edgeprune.prompts import collate


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_published_way_gives_the_same_logits_and_gradients(family):
    hf_model = random_gpt2() if family == "gpt2" else random_llama(LlamaConfig(**SMALL))
    model = wrap_model(hf_model)
    batch = collate(random_pairs(3, 7))
    at = (batch.rows, batch.cols)
    results = []
    for engine in ("ours", "naive"):
        gates = random_gates(model.graph, node=False).edge
        if engine == "ours":
            reference, corrupted = model.run_pair(batch)
            logits = model.run_circuit(batch, gates, corrupted)
        else:
            everywhere, corrupted = naive.run_pair(model, batch)
            logits, _ = naive.run(model, batch.clean_ids, gates, corrupted)
            reference, logits = everywhere[at], logits[at]
        kl_per_token(reference, logits).mean().backward()
        results.append((reference, logits, gates.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_operations_are_those_of_the_formula():
    """By hand: 3 layers, 4 heads of 8, 32 dimensions, 50 tokens known; 2 prompts of 5 tokens."""
    model = wrap_model(random_gpt2())
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 128)
    assert benchmark.weight_numbers(model) == weights
    blocks = 10 * (2 * weights + 2 * 3 * 5 * 32)
    logits = 2 * 2 * 50 * 32
    reading = 2 * model.graph.num_edges * 32 * 10
    counted = benchmark.count("ours", model, 2, 5, 2, False).operations
    assert counted == 4 * (blocks + logits) + 3 * reading
    assert benchmark.count("stock", model, 2, 5, 2, False).operations == 4 * (blocks + logits)


def test_exponents():
    assert benchmark.exponent([0.5, 1, 2], [3 * f**1.7 for f in (0.5, 1, 2)]) == pytest.approx(1.7)


def test_growth_is_predicted_from_the_shapes(monkeypatch):
    middle = {"d_model": 512, "layers": 2, "heads": 2, "tokens": 4, "batch": 2}
    monkeypatch.setitem(benchmark.GROWTH_BASE, "cpu", middle)
    rows = {row["quantity"]: row for row in benchmark.growth("cpu", "float32", repetitions=1)}
    assert list(rows) == ["layers", "heads", "tokens", "batch"]
    assert rows["heads"]["values"] == [1, 2, 4]
    assert rows["batch"]["predicted_time_exponent"] == pytest.approx(1)
    assert rows["tokens"]["predicted_memory_exponent"] == pytest.approx(1)
    # attention grows faster than the tokens, the logits of the one predicted token do not grow
    assert rows["tokens"]["predicted_time_exponent"] == pytest.approx(1, abs=0.1)
    assert all(len(row["seconds"]) == 3 for row in rows.values())


def test_the_command_measures_any_shape(tmp_path):
    shape = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    output = tmp_path / "benchmark.json"
    done = run_cli(
        "benchmark", f"shape={tmp_path}", "batch_size=2", "micro_batch_size=1", "length=4",
        "repetitions=1", "device=cpu", f"output={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report["engines"]) == ["ours", "ours_kept", "naive", "stock"]
    assert report["num_edges"] == 6 * 2 + 4 + 6 * 5 + 7 + 8
    for measured in report["engines"].values():
        assert measured["seconds"] > 0
        assert measured["times_the_floor"] > 0
    for engine, message in (("theirs", "choose ours"), ("ours_graph", "is for a GPU")):
        refused = run_cli("benchmark", f"engines=[{engine}]", "device=cpu")
        assert refused.returncode == 2
        assert message in refused.stderr
