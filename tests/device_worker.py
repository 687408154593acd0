"""Training steps on a device that only computes shapes, for test_device.py.

Arguments: FAMILY:MICRO_BATCH_SIZE:METHOD, any number of times. This is a process of its own because
the device's name cannot be unregistered. Blocks are not recomputed: PyTorch's engine aborts at that
on a device without a library of its own.
"""

import sys

import torch
from conftest import random_gpt2, random_pairs
from test_llama import FAMILIES, random_llama
from test_trainer import METHODS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from edgeprune.config import TrainerConfig
from edgeprune.engine.ablation import Ablation
from edgeprune.methods.every_size import EverySize, grad_scores
from edgeprune.models.load import wrap_model
from edgeprune.training.trainer import Trainer


def moved(value):
    """Tensors, also those in a dictionary, with their shapes alone on the device."""
    if isinstance(value, dict):
        return {key: moved(item) for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    there = torch.empty(value.shape, dtype=value.dtype, device="gpu")
    if isinstance(value, nn.Parameter):
        return nn.Parameter(there, requires_grad=value.requires_grad)
    return there.requires_grad_(value.requires_grad)


def move(module: nn.Module) -> None:
    for part in module.modules():
        part._parameters.update(moved(part._parameters))
        part._buffers.update(moved(part._buffers))


def run(family: str, micro_batch_size: int, name: str) -> None:
    """Two training steps."""
    hf_model = random_gpt2() if family == "gpt2" else random_llama(FAMILIES[family])
    model = wrap_model(hf_model.to(torch.bfloat16))
    pairs = random_pairs(6, 7) + random_pairs(6, 8)
    ablation = Ablation(model, "interchange", pairs)
    make, settings = METHODS[name]
    method = make(model.graph, seed=0, device="cpu", steps=9, **settings)
    if isinstance(method, EverySize):  # sizes are drawn on the CPU, which shapes alone cannot do
        method.size = [method.size(step) for step in range(2)].__getitem__
    # The engine's own threads may abort on a device without a library of its own.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with FakeTensorMode(allow_non_fake_inputs=True), one_thread:
        for module in (model.architecture.body, model.architecture.unembed):
            move(module)
        vars(method).update(moved(vars(method)))
        settings = TrainerConfig(steps=9, batch_size=8, micro_batch_size=micro_batch_size)
        trainer = Trainer(model, pairs, method, settings, 0, ablation)
        assert model.device.type == "gpu"
        for step in range(2):  # the second uses the buffers of the first
            objective, grad_gates = trainer.differentiate(pairs[:8], method.gates(step))
            assert objective.device.type == grad_gates.device.type == "gpu"
            assert grad_gates.shape == (model.graph.num_edges,)
            gradient = grad_scores(grad_gates, method.gates(step))
            assert gradient.device.type == "gpu"


_setup_privateuseone_for_python_backend("gpu")
for argument in sys.argv[1:]:
    family, micro_batch_size, method = argument.split(":")
    run(family, int(micro_batch_size), method)
    print(argument)
