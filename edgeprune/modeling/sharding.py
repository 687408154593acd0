"""A model whose layers' weights are split over processes, and gathered while a layer runs (FSDP2).

PyTorch gathers for a layer's own `forward`, which the whole model's pass calls. The circuit's pass
calls what is inside of it, so it says itself where a layer begins and ends, backward too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)


def shard_layers(
    body: nn.Module, layers: Sequence[nn.Module], mesh: Any, device: str, *, offload: bool
) -> None:
    """Keep of each layer's weights only this process's share; the rest is held by every process.

    Args:
        body: the model without its output projection, frozen, on the CPU.
        layers: its decoder layers.
        mesh: of all the processes.
        device: where this process runs.
        offload: whether its share stays in the CPU's memory while it is not used.
    """
    policy = CPUOffloadPolicy(pin_memory=device != "cpu") if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    for child in body.children():
        if not isinstance(child, nn.ModuleList):  # the layers are where they belong
            child.to(device)


def is_sharded(layer: nn.Module) -> bool:
    return isinstance(layer, FSDPModule)


def begin_layer(layer: nn.Module, x: Tensor) -> None:
    """Have the weights of a layer here, until `end_layer`.

    Args:
        layer: nothing is done for one that is not sharded.
        x: the layer's first input. Once its gradient is known, the layer's backward pass is over.
    """
    if isinstance(layer, FSDPModule):
        layer.unshard()
        if x.requires_grad:
            x.register_hook(lambda gradient: layer.reshard())


def end_layer(layer: nn.Module, output: Tensor) -> None:
    """Let go of the weights again, until the gradient of the layer's last output is known."""
    if isinstance(layer, FSDPModule):
        if output.requires_grad:
            output.register_hook(lambda gradient: _gather(layer))
        layer.reshard()


def _gather(layer: FSDPModule) -> None:
    with torch.no_grad():
        layer.unshard()
