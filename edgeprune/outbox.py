"""Outboxes: the writers' outputs, and the mixing of them into readers' inputs. The hot path.

What is stored of a writer is its difference delta = clean - corrupted, so that one product mixes
both values of every edge:

    sum_w g x_w + (1 - g) c_w  =  base + sum_w g delta_w

where `base` is the corrupted residual stream at that point (Bhaskar et al. 2024, arXiv:2406.16778,
rewritten). All deltas lie in one buffer, filled in write order; all their gradients in another,
into which every read's backward pass accumulates by the product itself. No copy of the residual
array is made at any layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Workspace:
    """Memory for the deltas and their gradients, kept from one step to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.generation = 0

    @property
    def nbytes(self) -> int:
        """Of all that has been taken."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor; it lasts until the next forward pass takes the same name."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.numel() < size
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            self._buffers.pop(name, None)  # free the old one first
            buffer = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)


class Outboxes:
    """The deltas of one forward pass.

    Args:
        workspace: where the buffers live. Only the latest `Outboxes` of a workspace may be read,
            written or differentiated, and each only once.
        num_writers: of the whole model.
        like: [batch, pos, d_model], gives shape, dtype and device.
    """

    def __init__(self, workspace: Workspace, num_writers: int, like: Tensor) -> None:
        workspace.generation += 1
        self._workspace = workspace
        self._generation = workspace.generation
        shape = (num_writers, *like.shape)
        self.delta = workspace.take("delta", shape, like)
        self.gradient = None
        if torch.is_grad_enabled():
            self.gradient = workspace.take("gradient", shape, like).zero_()
        self.num_written = 0
        self._link = torch.empty(0, device=like.device)  # orders writes and reads for autograd

    def write(self, delta: Tensor) -> None:
        """Append the deltas of the next writers.

        Args:
            delta: [writer, batch, pos, d_model].
        """
        self._link = _Write.apply(self._link, delta, self, self.num_written)
        self.num_written += delta.shape[0]

    def read(self, gates: Tensor, base: Tensor) -> Tensor:
        """Mix the deltas written so far into one input per reader.

        An edge with gate g carries g * clean + (1 - g) * corrupted
        (interchange ablation; Bhaskar et al. 2024, arXiv:2406.16778).

        Args:
            gates: [reader, writer] in [0, 1], writers in write order; 1 = clean.
            base: [batch, pos, d_model], the stream when every gate is 0.

        Returns:
            [reader, batch, pos, d_model], dtype of the outboxes.

        Raises:
            ValueError: gates has not one column per written outbox.
        """
        self._check(gates)
        return _Read.apply(gates, self._link, base, self, None)

    def read_at(self, gates: Tensor, base: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """As `read`, only at some tokens.

        Args:
            gates: [reader, writer] in [0, 1].
            base: [token, d_model], the stream there when every gate is 0.
            rows, cols: [token], batch and position of each.

        Returns:
            [reader, token, d_model].
        """
        self._check(gates)
        return _Read.apply(gates, self._link, base, self, (rows, cols))

    def _check(self, gates: Tensor) -> None:
        if gates.dim() != 2 or gates.shape[1] != self.num_written:
            raise ValueError(
                f"gates are {list(gates.shape)}, expected [reader, {self.num_written}]: "
                "one column per written outbox"
            )

    def check_current(self) -> None:
        """Guards against differentiating a pass whose buffers a later one has taken."""
        assert self._generation == self._workspace.generation, (
            "these outboxes were overwritten by a later forward pass: "
            "call backward before the next one"
        )


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, delta: Tensor, boxes: Outboxes, start: int) -> Tensor:
        boxes.check_current()
        ctx.boxes, ctx.span = boxes, slice(start, start + delta.shape[0])
        boxes.delta[ctx.span].copy_(delta)
        return torch.empty(0, device=delta.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        # Every later read has added its part by now: the link made autograd run them first.
        boxes, ctx.boxes = ctx.boxes, None
        boxes.check_current()
        return None, boxes.gradient[ctx.span], None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        link: Tensor,
        base: Tensor,
        boxes: Outboxes,
        tokens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        boxes.check_current()
        num_readers, num_writers = gates.shape
        delta = boxes.delta[:num_writers]
        if tokens is not None:
            delta = delta[:, tokens[0], tokens[1]]  # [writer, token, d_model]
        ctx.boxes, ctx.tokens = boxes, tokens
        ctx.gates = gates.to(delta.dtype)
        ctx.picked = delta if tokens is not None else None
        delta = delta.reshape(num_writers, base.numel())
        mixed = torch.addmm(base.reshape(1, -1), ctx.gates, delta)
        return mixed.view(num_readers, *base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        boxes, gates = ctx.boxes, ctx.gates
        ctx.boxes = None
        boxes.check_current()
        num_readers, num_writers = gates.shape
        grad = grad.reshape(num_readers, -1)
        if ctx.tokens is None:
            delta = boxes.delta[:num_writers].view(num_writers, grad.shape[1])
            gradient = boxes.gradient[:num_writers].view(num_writers, grad.shape[1])
            gradient.addmm_(gates.T, grad)
        else:
            delta = ctx.picked.reshape(num_writers, grad.shape[1])
            to_writers = (gates.T @ grad).view(ctx.picked.shape)
            index = (slice(0, num_writers), *ctx.tokens)
            boxes.gradient[index] = boxes.gradient[index] + to_writers  # tokens are distinct
        return (grad @ delta.T).float(), None, None, None, None
