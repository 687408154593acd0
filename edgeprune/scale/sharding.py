"""Sharding: splits the layers' weights over processes and gathers them while a layer runs (FSDP2).

PyTorch gathers a layer's weights around the layer's own `forward`, which the full model calls. The
engine's passes call the parts of a layer instead, so hooks on the model gather and free the weights
at the beginning and end of each layer, forward and backward. When blocks are recomputed in the
backward pass, these hooks run again; a layer that is being differentiated then stays gathered.
"""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from edgeprune.engine.circuit_model import CircuitModel


def shard_model(
    model: CircuitModel,
    whole: CircuitModel | None,
    mesh: Any,
    device: str,
    *,
    send: Callable[[Tensor], object],
    offload: bool,
) -> None:
    """Give each process its shard of the layers' weights, and all other weights.

    Rank 0 sends one tensor after another, so others never hold more than a shard and one tensor.

    Args:
        model: the model without weights (on the meta device); filled in place.
        whole: on rank 0, the same model on the CPU; None on the others.
        mesh, device: the device mesh of all processes, and where this process runs.
        send: a collective that fills a tensor with rank 0's.
        offload: whether the shard stays in the CPU's memory while the layer does not run.
    """
    arch, whole_arch = model.architecture, None if whole is None else whole.architecture
    policy = CPUOffloadPolicy(pin_memory=device != "cpu") if offload else OffloadPolicy()
    for block in arch.blocks:
        fully_shard(block.layer, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        block.layer.to_empty(device="cpu" if offload else device)
    arch.body.to_empty(device=device, recurse=False)
    for child in arch.body.children():
        if not isinstance(child, nn.ModuleList):  # the list of layers
            child.to_empty(device=device)

    def receive(part: str) -> None:
        """Fill parameters and buffers with rank 0's, or with this process's shards of them."""
        sources = {} if whole is None else dict(_tensors(getattr(whole_arch, part)))
        for name, tensor in _tensors(getattr(arch, part)):
            received = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if whole is not None:
                received.copy_(sources[name])
            send(received)
            if isinstance(tensor, DTensor):
                received = distribute_tensor(received, mesh, tensor.placements, src_data_rank=None)
                tensor, received = tensor.to_local(), received.to_local()
            tensor.copy_(received)

    receive("body")
    is_tied = torch.zeros(1, device=device)  # the configuration may say it wrongly
    if whole is not None:
        is_tied += whole_arch.unembed.weight is whole_arch.body.get_input_embeddings().weight
    send(is_tied)
    if is_tied:
        arch.unembed.weight = arch.body.get_input_embeddings().weight
    else:
        weight = torch.empty_like(arch.unembed.weight, device="meta")
        arch.unembed.weight = nn.Parameter(weight, requires_grad=False)
        arch.unembed.to_empty(device=device)
        receive("unembed")
    model.begin_layer, model.end_layer = _begin_layer, _end_layer
    model.digest = None if whole is None else whole.fingerprint()  # shards have no fingerprint


def is_sharded(layer: nn.Module) -> bool:
    """Whether a layer's weights are split over processes."""
    return isinstance(layer, FSDPModule)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    yield from ((name, parameter.detach()) for name, parameter in module.named_parameters())
    yield from module.named_buffers()


_IN_BACKWARD: WeakSet[FSDPModule] = WeakSet()
"""Layers whose backward pass has begun and has not ended."""


def _begin_layer(layer: FSDPModule, x: Tensor) -> None:
    """Gather the layer's weights; free them when the gradient of x is known."""
    layer.unshard()
    if x.requires_grad:
        x.register_hook(lambda gradient: _end_backward(layer))


def _end_layer(layer: FSDPModule, output: Tensor) -> None:
    """Free the layer's weights; gather them when the gradient of the output is known.

    The output may be the next layer's x; then the next layer's weights are freed first.
    """
    if output.requires_grad:
        output.grad_fn.register_prehook(lambda gradients: _begin_backward(layer))
    if layer not in _IN_BACKWARD:
        layer.reshard()


def _begin_backward(layer: FSDPModule) -> None:
    _IN_BACKWARD.add(layer)
    with torch.no_grad():
        layer.unshard()


def _end_backward(layer: FSDPModule) -> None:
    _IN_BACKWARD.discard(layer)
    layer.reshard()
