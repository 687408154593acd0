"""What run_scripts/benchmark.py compares and counts; times are not tested."""

import json

import benchmark
import published
import pytest
import torch
from conftest import random_gpt2, random_pairs
from test_llama import SMALL, random_llama
from transformers import LlamaConfig

from edgeprune.metrics import kl_per_token
from edgeprune.models.load import wrap_model
from edgeprune.prompts import collate


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_published_way_gives_the_same_logits_and_gradients(family):
    hf_model = random_gpt2() if family == "gpt2" else random_llama(LlamaConfig(**SMALL))
    model = wrap_model(hf_model)
    batch = collate(random_pairs(3, 7))
    at = (batch.rows, batch.cols)
    results = []
    for engine in ("ours", "naive"):
        noise = torch.Generator().manual_seed(0)
        gates = benchmark.sample_gates(torch.zeros(model.graph.num_edges), noise).requires_grad_()
        if engine == "ours":
            reference, corrupted = model.run_pair(batch)
            logits = model.run_circuit(batch, gates, corrupted)
        else:
            everywhere, corrupted = published.run_pair(model, batch)
            logits, _ = published.run(model, batch.clean_ids, gates, corrupted)
            reference, logits = everywhere[at], logits[at]
        kl_per_token(reference, logits).mean().backward()
        results.append((reference, logits, gates.grad))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-4)


def test_operations_by_hand():
    """3 layers, 4 heads of 8, 32 dimensions, 50 tokens known; 2 prompts of 5 tokens."""
    model = wrap_model(random_gpt2())
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 128)
    assert benchmark.num_block_weights(model) == weights
    blocks = 10 * (2 * weights + 2 * 3 * 5 * 32)
    logits = 2 * 2 * 50 * 32
    reading = 2 * model.graph.num_edges * 32 * 10
    args = benchmark.parse(["--batch-size=2", "--length=5"])
    counted = benchmark.count("ours", model, args).operations
    assert counted == 4 * (blocks + logits) + 3 * reading
    assert benchmark.count("stock", model, args).operations == 4 * (blocks + logits)


def test_growth_is_predicted_from_the_shapes(monkeypatch):
    base = {"d_model": 512, "layers": 2, "heads": 2, "tokens": 4, "batch": 2}
    monkeypatch.setitem(benchmark.GROWTH_BASE, "cpu", base)
    found = benchmark.measure_growth(benchmark.parse(["--device=cpu", "--repetitions=1"]))
    assert {row["quantity"]: row["values"] for row in found} == {
        name: [size // 2, size, size * 2] for name, size in list(base.items())[1:]
    }
    exponents = {row["quantity"]: row["exponents"] for row in found}
    assert exponents["batch"]["operations"] == pytest.approx(1)
    assert exponents["tokens"]["predicted_memory"] == pytest.approx(1)
    # attention grows faster than the tokens; the logits of the one predicted token do not grow
    assert exponents["tokens"]["operations"] == pytest.approx(1, abs=0.1)


def test_any_shape_is_measured(tmp_path, capsys):
    shape = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    output = tmp_path / "benchmark.json"
    benchmark.main(
        f"--shape {tmp_path} --batch-size 2 --micro-batch-size 1 --length 4 --repetitions 1 "
        f"--device cpu --output {output}".split()
    )
    report = json.loads(output.read_text())
    assert list(report["engines"]) == ["ours", "ours_kept", "naive", "stock"]
    assert report["num_edges"] == 6 * 2 + 4 + 6 * 5 + 7 + 8
    printed = capsys.readouterr().out
    for name, measured in report["engines"].items():
        assert measured["times_the_floor"] > 0
        assert f"\n{name} " in printed


@pytest.mark.parametrize(
    "options",
    ["--engines theirs", "--engines ours_graph --device cpu", "--shape nowhere", "--length 0",
     "--micro-batch-size 3", "--length 2000 --device cpu --repetitions 1"],
)  # fmt: skip
def test_impossible_options_are_refused_without_a_traceback(options, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_limits", lambda *_: benchmark.Cost(1, 1))
    with pytest.raises(SystemExit) as refused:
        benchmark.main(options.split())
    assert refused.value.code not in (0, None)
