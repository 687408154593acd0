"""Steps recorded as CUDA graphs, on a stand-in for CUDA that records operations on the CPU.

A recording keeps every operation with the very tensors that it read and wrote; a replay repeats the
operations on these tensors without running any Python of ours. So the tests fail if a step does
anything but tensor operations, or does something else the second time.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import random_gpt2, random_pairs
from test_engine import random_gates
from test_llama import FAMILIES, random_llama
from test_trainer import trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import masking_utils

from edgeprune.engine import cuda_graphs
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cuda_graphs import CudaGraphs
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.errors import ConfigError
from edgeprune.metrics import OBJECTIVES
from edgeprune.models.load import wrap_model
from edgeprune.prompts import collate


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
def calls(monkeypatch) -> list:
    """Grows with each call of `differentiate` by CudaGraphs."""
    calls = []

    def count(*args, **settings):
        calls.append(1)
        return differentiate(*args, **settings)

    monkeypatch.setattr(cuda_graphs, "differentiate", count)
    return calls


def random_model(family: str):
    hf_model = random_gpt2() if family == "gpt2" else random_llama(FAMILIES[family])
    return wrap_model(hf_model, split_kv_readers=family == "llama")


def some_inputs(model, ablation: str = "interchange", seed: int = 0, width: int = 7) -> StepInputs:
    pairs = random_pairs(2, width, seed=seed) + random_pairs(2, width - 2, seed=seed, predicted=2)
    batch = collate(pairs)
    reference, corrupted = model.run_pair(batch)
    values = Ablation(model, ablation, pairs).values(batch, corrupted)
    return StepInputs(batch, reference, values, random_gates(model.graph, seed))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_replays_equal_runs(stand_in, calls, family, ablation, recompute):
    model = random_model(family)
    graphs = CudaGraphs(model, recompute=recompute)
    results = []
    # The shapes alternate, and the buffers of the second replace those of the first.
    for seed, width in enumerate([5, 7, 5, 7, 5, 7, 5, 7]):
        inputs = some_inputs(model, ablation, seed, width)
        got = graphs.differentiate(inputs, share=0.25)
        expected = differentiate(model, inputs, share=0.25, recompute=recompute)
        assert expected[1].abs().max() > 1e-4
        results.append((*got, *expected))
    for distance, gradient, *expected in results:  # no replay overwrites earlier results
        assert all(map(torch.equal, (distance, gradient), expected))
    assert len(calls) == 4  # each shape is run once and recorded once


def test_a_step_is_recorded_again_when_its_buffers_are_replaced(stand_in, calls, model):
    graphs = CudaGraphs(model, recompute=False)

    def num_runs(width: int) -> int:
        before = len(calls)
        graphs.differentiate(some_inputs(model, width=width), share=1.0)
        return len(calls) - before

    # run, recorded, replayed; a longer batch takes larger buffers; recorded again, replayed
    assert [num_runs(width) for width in (5, 5, 5, 7, 5, 5)] == [1, 1, 0, 1, 1, 0]
    model.release()
    assert [num_runs(width) for width in (5, 5)] == [1, 0]


def test_shapes_beyond_the_maximum_are_run(stand_in, calls, model, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    graphs = CudaGraphs(model, recompute=False)
    for width in (5, 7, 5, 7, 7):
        inputs = some_inputs(model, width=width)
        got, expected = graphs.differentiate(inputs, share=1.0), differentiate(model, inputs)
        assert torch.equal(got[1], expected[1])
    assert len(calls) == 5  # width 5 is recorded; 7 is run each time


def test_a_step_that_cannot_be_recorded_is_refused_with_the_reason(stand_in, model, monkeypatch):
    logits = model.architecture.logits
    monkeypatch.setattr(model.architecture, "logits", lambda x: logits(x) * x.sum().item())
    graphs = CudaGraphs(model, recompute=False)
    inputs = some_inputs(model)
    graphs.differentiate(inputs, share=1.0)
    with pytest.raises(ConfigError, match="not permitted when stream"):
        graphs.differentiate(inputs, share=1.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_sdpa_gets_no_mask_even_if_the_library_would_make_one(family, monkeypatch):
    """Some versions make one while a graph is recorded, and then choose another kernel."""
    model = random_model(family)
    embeddings = model.run_pair(collate(random_pairs(2, 3)))[1].embeddings[0]
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **more: False)

    def masks() -> list:
        inputs = model.architecture.attention_inputs(embeddings)
        return [inputs] if family == "gpt2" else [mask for mask, _ in inputs.values()]

    assert all(mask is None for mask in masks())
    model.architecture.body.config._attn_implementation = "eager"  # which needs one
    assert all(mask is not None for mask in masks())


@pytest.mark.parametrize("method", ["every_size", "lagrangian"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_with_graphs_equals_training_without(stand_in, calls, model, method, objective):
    values, scores = [], []
    for cuda_graph in (False, True):
        run = trainer(model, method, of_trainer={"micro_batch_size": 2, "objective": objective})
        if cuda_graph:  # as with trainer.cuda_graph=true, which requires a GPU
            options = {"objective": OBJECTIVES[objective], "recompute": False}
            run.differentiate_batch = CudaGraphs(run.model, **options).differentiate
        values.append([run.train_step().value for _ in range(6)])
        scores.append(run.scores().values)
    assert values[0] == values[1]
    assert torch.equal(*map(torch.as_tensor, scores))
    assert 0 < len(calls) < 12
