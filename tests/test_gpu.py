"""The engine on a GPU, against the same on the CPU; skipped where there is no GPU."""

import json

import pytest
import torch
from conftest import DEVICE, random_gpt2, random_pairs, run_cli
from test_cuda_graphs import some_inputs
from test_llama import FAMILIES, random_llama
from torch import Tensor

from edgeprune.engine.cuda_graphs import CudaGraphs
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.models.load import fuse, wrap_model
from edgeprune.models.parity import verify_parity
from edgeprune.prompts import collate

if DEVICE == "cpu":
    pytest.skip("there is no GPU", allow_module_level=True)


def make(family: str):
    """A small model with random weights, on the CPU."""
    if family == "gpt2":
        return random_gpt2()
    return random_llama(FAMILIES[family], "eager" if family == "gemma2" else "sdpa")


def gradient(family: str, device: str, ablation: str, recompute: bool) -> tuple[Tensor, Tensor]:
    inputs = some_inputs(wrap_model(make(family)), ablation).map(lambda x: x.detach().to(device))
    inputs.gates.requires_grad_()
    model = wrap_model(make(family).to(device))
    return tuple(x.cpu() for x in differentiate(model, inputs, recompute=recompute))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_gradients_equal_those_of_the_cpu(family, ablation, recompute):
    expected = gradient(family, "cpu", ablation, recompute)
    got = gradient(family, "cuda", ablation, recompute)
    assert expected[1].abs().max() > 1e-4
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_open_gates_give_the_full_model(family):
    verify_parity(wrap_model(make(family).cuda()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral"])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(family, fused):
    exact, rounded = make(family).cuda(), make(family).cuda().bfloat16()
    pairs = random_pairs(16, 9) + random_pairs(16, 7, seed=1)
    results = []
    for hf_model in (exact, rounded):
        model = wrap_model(hf_model)
        if fused and hf_model is rounded:
            fuse(model)
        batch = collate(pairs).to("cuda")
        gates = torch.full((model.graph.num_edges,), 0.5, device="cuda", requires_grad=True)
        inputs = StepInputs(batch, *model.run_pair(batch), gates)
        results.append(differentiate(model, inputs)[1])
    assert torch.cosine_similarity(*results, dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_replayed_graphs_equal_runs(family, recompute, dtype):
    model = wrap_model(make(family).cuda().to(dtype))
    graphs = CudaGraphs(model, recompute=recompute)
    results: list[tuple[Tensor, ...]] = []
    for seed, width in enumerate([5, 7, 5, 7, 5, 7, 5, 7]):
        pairs = random_pairs(4, width, seed=seed)
        batch = collate(pairs).to("cuda")
        gates = torch.rand(model.graph.num_edges, device="cuda").requires_grad_()
        inputs = StepInputs(batch, *model.run_pair(batch), gates)
        got = graphs.differentiate(inputs, share=0.25)
        results.append((*got, *differentiate(model, inputs, share=0.25, recompute=recompute)))
    for value, grad, *expected in results:  # no replay overwrites earlier results
        torch.testing.assert_close((value, grad), tuple(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [(), ("model.dtype=bfloat16", "model.fused=true")], ids=str)
def test_a_run_with_graphs_equals_one_without(tmp_path, settings):
    scores = []
    for name, cuda_graph in (("run", "false"), ("graph", "true")):
        run_dir = tmp_path / name
        done = run_cli(
            "prune", "experiment=ioi", "trainer.steps=12", "task.train=64", "task.test=20",
            "task.validation=20", "model.device=cuda", f"trainer.cuda_graph={cuda_graph}",
            "num_edges=300", f"run_dir={run_dir}", *settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["kl"] for line in lines])
    assert len(scores[0]) == 12
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
