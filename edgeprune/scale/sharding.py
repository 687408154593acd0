"""A model whose layers' weights are split over processes, and gathered while a layer runs (FSDP2).

PyTorch gathers for a layer's own `forward`, which the whole model's pass calls. The circuit's pass
calls what is inside of it, so it says itself where a layer begins and ends, backward too. Where
blocks run again in the backward pass, they begin and end again; what is just being differentiated
then stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_layers(
    body: nn.Module,
    layers: Sequence[nn.Module],
    whole: nn.Module | None,
    mesh: Any,
    device: str,
    send: Callable[[Tensor], object],
    *,
    offload: bool,
) -> None:
    """Give each process its share of the layers' weights, and all of the others.

    One tensor after another goes from the first process to all, so that no other ever holds more
    than its share and one whole tensor.

    Args:
        body: the model without its output projection, frozen, on the meta device.
        layers: its decoder layers.
        whole: in the first process, the same model on the CPU; None in the others.
        mesh: of all the processes.
        device: where this process runs.
        send: see `receive`.
        offload: whether its share stays in the CPU's memory while it is not used.
    """
    policy = CPUOffloadPolicy(pin_memory=device != "cpu") if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        layer.to_empty(device="cpu" if offload else device)
    body.to_empty(device=device, recurse=False)
    for child in body.children():
        if not isinstance(child, nn.ModuleList):  # the layers are where they belong
            child.to_empty(device=device)
    receive(body, whole, mesh, device, send)


def receive(
    module: nn.Module,
    whole: nn.Module | None,
    mesh: Any,
    device: str,
    send: Callable[[Tensor], object],
) -> None:
    """Fill parameters and buffers with the first process's, or with this process's share of them.

    Args:
        module: sharded or not, with memory of its own.
        whole: in the first process, the same module on the CPU; None in the others.
        mesh, device: see `shard_layers`.
        send: fills a tensor with the first process's, when all call it.
    """
    of_first = {} if whole is None else dict(_tensors(whole))
    for name, tensor in _tensors(module):
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if whole is not None:
            received.copy_(of_first[name])
        send(received)
        if isinstance(tensor, DTensor):
            received = distribute_tensor(received, mesh, tensor.placements, src_data_rank=None)
            tensor, received = tensor.to_local(), received.to_local()
        tensor.copy_(received)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    yield from ((name, parameter.detach()) for name, parameter in module.named_parameters())
    yield from module.named_buffers()


def is_sharded(layer: nn.Module) -> bool:
    return isinstance(layer, FSDPModule)


_DIFFERENTIATED: WeakSet[FSDPModule] = WeakSet()
"""Layers whose backward pass has begun and is not over."""


def begin_layer(layer: nn.Module, x: Tensor) -> None:
    """Have the weights of a layer here, until `end_layer`.

    Args:
        layer: nothing is done for one that is not sharded.
        x: the layer's first input. Once its gradient is known, the layer's backward pass is over.
    """
    if isinstance(layer, FSDPModule):
        layer.unshard()
        if x.requires_grad:
            x.register_hook(lambda gradient: _end_backward(layer))


def end_layer(layer: nn.Module, output: Tensor) -> None:
    """Let go of the weights again, until the gradient of the layer's last output is known."""
    if isinstance(layer, FSDPModule):
        if output.requires_grad:
            output.register_hook(lambda gradient: _begin_backward(layer))
        if layer not in _DIFFERENTIATED:
            layer.reshard()


def _begin_backward(layer: FSDPModule) -> None:
    _DIFFERENTIATED.add(layer)
    with torch.no_grad():
        layer.unshard()


def _end_backward(layer: FSDPModule) -> None:
    _DIFFERENTIATED.discard(layer)
    layer.reshard()
