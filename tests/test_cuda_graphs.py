"""Steps recorded as CUDA graphs, on a stand-in for CUDA that records operations on the processor.

A recording keeps every operation with the very tensors that it read and wrote; a replay repeats the
operations on these, and no Python of ours runs. So whatever a step does besides tensor operations,
or does otherwise the second time, shows.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_gpt2, random_pairs
from test_engine import random_gates
from test_llama import FAMILIES, random_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import masking_utils

from edgeprune.config import AblationConfig, AblationKind, TrainerConfig
from edgeprune.engine import gradient
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.gradient import CudaGraphs, StepInputs, differentiate
from edgeprune.errors import ConfigError
from edgeprune.models import wrap_model
from edgeprune.prompts import collate
from edgeprune.training.trainer import Trainer


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.operations.append((operation, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, outputs in self.operations:
                again = operation(*args, **kwargs)
                for old, new in zip(tree_flatten(outputs)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def stand_in(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def record(graph, pool, stream):
        with graph:
            yield

    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
        "CUDAGraph": Graph,
        "graph": record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def counted(monkeypatch) -> list:
    """Grows with each call of `differentiate` by CudaGraphs."""
    calls = []

    def differentiate_(*args, **kwargs):
        calls.append(1)
        return differentiate(*args, **kwargs)

    monkeypatch.setattr(gradient, "differentiate", differentiate_)
    return calls


def some_inputs(model, ablation: str, *, seed: int, width: int = 7) -> StepInputs:
    pairs = random_pairs(2, width, seed=seed) + random_pairs(2, width - 2, seed=seed, predicted=2)
    batch = collate(pairs)
    reference, corrupted = model.run_pair(batch)
    closed = Ablation(model, AblationConfig(AblationKind[ablation]), pairs).values(batch, corrupted)
    return StepInputs(batch, reference, closed, random_gates(model.graph, seed, node=False).edge)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_replays_equal_runs(stand_in, counted, family, ablation, recompute):
    hf_model = random_gpt2() if family == "gpt2" else random_llama(FAMILIES[family])
    model = wrap_model(hf_model)
    graphs = CudaGraphs(model, recompute=recompute)
    # shapes take turns, and the second one's buffers take the first one's place
    for seed, width in enumerate([5, 7, 5, 7, 5, 7, 5, 7]):
        inputs = some_inputs(model, ablation, seed=seed, width=width)
        got = graphs.differentiate(inputs, share=0.25)
        wanted = differentiate(model, inputs, share=0.25, recompute=recompute)
        assert wanted[1].abs().max() > 1e-4
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
    assert len(counted) == 4  # each shape is run once, and recorded once


def test_what_has_been_given_is_not_overwritten(stand_in):
    model = wrap_model(random_gpt2())
    graphs = CudaGraphs(model, recompute=False)
    given = [
        graphs.differentiate(some_inputs(model, "interchange", seed=seed), share=1.0)
        for seed in range(4)
    ]
    assert len({distance.item() for distance, _ in given}) == 4


def test_what_used_other_buffers_is_recorded_again(stand_in, counted):
    model = wrap_model(random_gpt2())
    graphs = CudaGraphs(model, recompute=False)

    def runs(width: int) -> int:
        before = len(counted)
        inputs = some_inputs(model, "interchange", seed=width, width=width)
        graphs.differentiate(inputs, share=1.0)
        return len(counted) - before

    # run, recorded, replayed; a longer batch takes larger buffers; recorded anew, replayed
    assert [runs(width) for width in (5, 5, 5, 7, 5, 5)] == [1, 1, 0, 1, 1, 0]
    model.release()
    assert [runs(width) for width in (5, 5)] == [1, 0]


def test_shares_are_told_apart(stand_in):
    model = wrap_model(random_gpt2())
    graphs = CudaGraphs(model, recompute=False)
    inputs = some_inputs(model, "interchange", seed=0)
    whole = [graphs.differentiate(inputs, share=1.0)[0] for _ in range(3)][-1]
    half = [graphs.differentiate(inputs, share=0.5)[0] for _ in range(3)][-1]
    assert half == whole / 2


def test_shapes_beyond_the_most_are_run(stand_in, monkeypatch):
    monkeypatch.setattr(gradient, "MAX_GRAPHS", 1)
    model = wrap_model(random_gpt2())
    graphs = CudaGraphs(model, recompute=False)
    for width in (5, 7, 5, 7, 7):
        inputs = some_inputs(model, "interchange", seed=width, width=width)
        assert torch.equal(
            graphs.differentiate(inputs, share=1.0)[1], differentiate(model, inputs)[1]
        )
    assert len(graphs._recordings) == 1


def test_what_cannot_be_recorded_is_refused_in_words(stand_in, monkeypatch):
    model = wrap_model(random_gpt2())
    logits = model.architecture.logits
    monkeypatch.setattr(model.architecture, "logits", lambda x: logits(x) * x.sum().item())
    graphs = CudaGraphs(model, recompute=False)
    inputs = some_inputs(model, "interchange", seed=0)
    graphs.differentiate(inputs, share=1.0)
    with pytest.raises(ConfigError, match="not permitted when stream.*trainer.cuda_graph=false"):
        graphs.differentiate(inputs, share=1.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_sdpa_is_given_no_mask_whatever_the_library_thinks(family, monkeypatch):
    """Some of its versions make one while a graph is recorded, and with it take another kernel."""
    hf_model = random_gpt2() if family == "gpt2" else random_llama(FAMILIES[family])
    model = wrap_model(hf_model)
    embeddings = model.run_pair(collate(random_pairs(2, 3)))[1].embeddings[0]
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **more: False)

    def masks() -> list:
        inputs = model.architecture.attention_inputs(embeddings)
        return [inputs] if family == "gpt2" else list(inputs.masks.values())

    assert all(mask is None for mask in masks())
    model.architecture.body.config._attn_implementation = "eager"  # which needs one
    assert all(mask is not None for mask in masks())


def test_a_run_with_graphs_is_the_run_without(stand_in, monkeypatch):
    model = wrap_model(random_gpt2())
    config = TrainerConfig(steps=6, batch_size=4, micro_batch_size=2)
    pairs = random_pairs(6, 7) + random_pairs(6, 5)
    results = []
    for cuda_graph in (False, True):
        trainer = Trainer(
            model, pairs, config, target_sparsity=0.9, seed=0,
            ablation=Ablation(model, AblationConfig(), pairs),
        )  # fmt: skip
        trainer.config = replace(config, cuda_graph=cuda_graph)
        losses = [trainer.train_step().loss for _ in range(6)]
        results.append((losses, trainer.masks.edge_log_alpha.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_graphs_are_for_gpus():
    model = wrap_model(random_gpt2())
    pairs = random_pairs(4)
    with pytest.raises(ConfigError, match="cuda_graph=true is for a GPU, but the model is on cpu"):
        Trainer(
            model, pairs, TrainerConfig(cuda_graph=True), target_sparsity=0.9, seed=0,
            ablation=Ablation(model, AblationConfig(), pairs),
        )  # fmt: skip
