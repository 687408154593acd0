"""A training step on a device that is not the processor, of which only shapes are computed.

There a tensor left on the processor is an error, and so is whatever has to wait for the device: the
value of a tensor, or a shape that depends on one. It runs in a process of its own, since the
device's name is registered for good.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import random_gpt2, random_pairs
from edgeprune.ablation import Ablation
from edgeprune.config import AblationConfig, TrainerConfig
from edgeprune.modeling import wrap_model
from edgeprune.training.trainer import Trainer

family, micro_batch_size = sys.argv[1], int(sys.argv[2])
_setup_privateuseone_for_python_backend("gpu")
if family == "gpt2":
    whole = random_gpt2()
else:
    whole = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    ))
model = wrap_model(whole.to(torch.bfloat16).eval())
pairs = random_pairs(6, 7) + random_pairs(6, 8)
config = TrainerConfig(batch_size=8, micro_batch_size=micro_batch_size)
ablation = Ablation(model, AblationConfig(), pairs)
trainer = Trainer(model, pairs, config, target_sparsity=0.9, seed=0, ablation=ablation)


def move(module):
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="gpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        there = torch.nn.Parameter(there, requires_grad=tensor.requires_grad)
                    tensors[name] = there


with FakeTensorMode(allow_non_fake_inputs=True):
    for module in (model.architecture.body, model.architecture.unembed, trainer.masks):
        move(module)
    assert model.device.type == "gpu"
    for step in range(2):  # the second uses what the first has taken
        gates = trainer.masks.sample(step).edge
        distance, of_gates = trainer._differentiate(pairs[:8], gates.detach())
        gates.backward(of_gates)
    assert distance.device.type == of_gates.device.type == "gpu"
    assert trainer.masks.edge_log_alpha.grad.shape == (model.graph.num_edges,)
print("done")
"""


@pytest.mark.parametrize("micro_batch_size", [8, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_stays_on_its_device_and_does_not_wait_for_it(family, micro_batch_size):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, family, str(micro_batch_size)],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
