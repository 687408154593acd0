"""Triton kernels: run on a GPU, or by Triton's interpreter on the CPU, and compiled for GPUs.

The interpreter cannot multiply in bfloat16, the dtype that the kernels are for.
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import DEVICE, random_gpt2
from test_engine import gate_gradient, mixed_lengths, random_gates
from test_llama import FAMILIES, random_llama

from edgeprune.errors import ModelError
from edgeprune.models.load import fuse, load_model, wrap_model
from edgeprune.prompts import collate

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from edgeprune.engine import kernels

TOLERANCES = {"float32": 1e-5, "float16": 1e-2} | ({} if DEVICE == "cpu" else {"bfloat16": 4e-2})


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES.items())
@pytest.mark.parametrize("d_head", [12, 64])
@pytest.mark.parametrize("num_tokens", [1, 130])
@pytest.mark.parametrize("head_of", [[0, 1, 2], [0, 1, 1, 2, 2]])
def test_values_and_gradients_equal_the_formula(dtype, tolerance, d_head, num_tokens, head_of):
    torch.manual_seed(0)
    count = len(head_of)
    readers = torch.randn(num_tokens, count + 2, 80).to(
        DEVICE, getattr(torch, dtype)
    )  # of which the first and the last are not read
    weight = torch.randn(3, d_head, 80).to(readers) / 8
    grad = torch.randn(d_head, count, num_tokens).to(readers).permute(1, 2, 0)
    before = readers.clone()
    x = readers[:, 1:-1].transpose(0, 1)
    exact = x.double().requires_grad_()
    mean_square = exact.square().mean(-1, keepdim=True)
    own_weight = weight.double()[head_of].transpose(1, 2)
    expected = exact / (mean_square + 0.25).sqrt() @ own_weight
    expected.backward(grad.double())

    y, negated = kernels.project(x, weight, 0.25, 1)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(negated, -80 * (mean_square.detach().float() + 0.25))
    kernels.put_gradient(x, weight, y, negated, grad, 1)
    torch.testing.assert_close(x.double(), exact.grad, rtol=tolerance, atol=tolerance)
    assert torch.equal(readers[:, [0, -1]], before[:, [0, -1]])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "split"), [("gpt2", False), ("llama", False), ("qwen2", True)])
def test_a_model_gives_the_same_gradient(monkeypatch, family, split, recompute):
    hf_model = random_gpt2() if family == "gpt2" else random_llama(FAMILIES[family])
    model = wrap_model(hf_model.to(DEVICE), split_kv_readers=split)
    batch = collate(mixed_lengths()).to(DEVICE)
    gates = random_gates(model.graph).detach().to(DEVICE).requires_grad_()
    calls = []
    for name in ("project", "put_gradient"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, own=own: (calls.append(own), own(*a))[1])
    expected = gate_gradient(model, batch, gates, recompute=recompute)
    assert not calls
    for block in model.architecture.blocks:
        block.fused = True
    got = gate_gradient(model, batch, gates, recompute=recompute)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # Recomputed blocks run forward twice.
    assert len(calls) == len(model.architecture.blocks) * (3 if recompute else 2)


def test_fused_needs_bfloat16_on_a_gpu():
    model = wrap_model(random_gpt2())
    with pytest.raises(ModelError, match="float32 on cpu"):
        fuse(model)
    with pytest.raises(ModelError, match="bfloat16 on cpu"):
        load_model("embedded", device="cpu", dtype="bfloat16", fused=True)
    assert not any(block.fused for block in model.architecture.blocks)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edgeprune.engine import kernels

for kernel in (kernels._project, kernels._put_gradient):
    for d_head, padded, capability in ((64, 64, 80), (128, 128, 90)):
        known = {"d_head": d_head, "PADDED": padded, "TOKENS": 128, "MODEL": 64}
        kinds = {name: "i32" for name in kernel.arg_names} | {"eps": "fp32"}
        kinds |= {name: "*bf16" for name in kernel.arg_names if name.endswith("_at")}
        kinds |= {"negated_at": "*fp32"} | dict.fromkeys(known, "constexpr")
        kinds = {name: kinds[name] for name in kernel.arg_names}
        source = ASTSource(kernel, kinds, known)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target, {"num_warps": 8})
        assert len(compiled.asm["cubin"]) > 1000
        assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
        print("compiled")
"""


def test_kernels_compile_for_gpus_and_use_tensor_cores(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled"] * 4
