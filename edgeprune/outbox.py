"""Outboxes: the writers' outputs, and the mixing of them into readers' inputs. The hot path.

What is stored of a writer is its difference delta = clean - corrupted, so that one product mixes
both values of every edge:

    sum_w g x_w + (1 - g) c_w  =  base + sum_w g delta_w

where `base` is the corrupted residual stream at that point (Bhaskar et al. 2024, arXiv:2406.16778,
rewritten). All deltas lie in one buffer, filled in write order; all their gradients in another,
into which every read's backward pass accumulates by the product itself. No copy of the residual
array is made at any layer.

A layer has few readers for many writers, and products that thin use a processor badly. So reads
look ahead: the writers that are there already are mixed for the readers of several layers in one
product, and each read adds only what has been written since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    def buffers(self) -> tuple[Tensor, ...]:
        """All that has been taken."""
        return tuple(self._buffers.values())

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
        keep_inputs: whether readers' inputs must last until the backward pass.
    """

    def __init__(
        self, workspace: Workspace, num_writers: int, like: Tensor, *, keep_inputs: bool
    ) -> None:
        workspace.generation += 1
        self._workspace = workspace
        self._generation = workspace.generation
        self.delta = workspace.take("delta", (num_writers, *like.shape), like)
        self.gradient = None
        if torch.is_grad_enabled():
            self.gradient = workspace.take("gradient", self.delta.shape, like).zero_()
        self.keep_inputs = keep_inputs
        self.num_written = 0
        self._num_read = 0
        self._ahead = _Ahead(0, self.delta[:0])
        self._link = torch.empty(0, device=like.device)  # orders writes and reads for autograd

    def write(self, delta: Tensor) -> None:
        """Append the deltas of the next writers.

        Args:
            delta: [writer, batch, pos, d_model].
        """
        self._link = _Write.apply(self._link, delta, self, self.num_written)
        self.num_written += delta.shape[0]

    def look_ahead(self, gates: Sequence[Tensor]) -> None:
        """Mix the deltas written so far for several reads to come, in one product.

        Those reads add only what is written after. Mixing for many readers at once is faster: the
        buffer is gone through once for all of them, forward and backward.

        Args:
            gates: of each of the next reads, [reader, writer] in [0, 1], in their order.
        """
        num_readers = sum(len(g) for g in gates)
        shape = (num_readers, *self.delta.shape[1:])
        name = f"inputs {self._num_read}" if self.keep_inputs else "inputs"
        inputs = self._workspace.take(name, shape, self.delta)
        self._num_read += num_readers
        self._ahead = _Ahead(self.num_written, inputs)
        covered = [g[:, : self.num_written] for g in gates]
        self._link = _LookAhead.apply(self._link, self, self._ahead, *covered)

    def read(self, gates: Tensor, base: Tensor) -> Tensor:
        """Mix the deltas written so far into one input per reader.

        An edge with gate g carries g * clean + (1 - g) * corrupted
        (interchange ablation; Bhaskar et al. 2024, arXiv:2406.16778).

        Args:
            gates: [reader, writer] in [0, 1], writers in write order; 1 = clean.
            base: [batch, pos, d_model], the stream when every gate is 0.

        Returns:
            [reader, batch, pos, d_model], dtype of the outboxes; it lasts until the next look-ahead
            or, if inputs are kept, the next forward pass.

        Raises:
            ValueError: gates has not one column per written outbox.
        """
        if gates.dim() != 2 or gates.shape[1] != self.num_written:
            raise ValueError(
                f"gates are {list(gates.shape)}, expected [reader, {self.num_written}]: "
                "one column per written outbox"
            )
        if self._ahead.num_read == len(self._ahead.inputs):
            self.look_ahead([gates])
        ahead = self._ahead
        rows = slice(ahead.num_read, ahead.num_read + len(gates))
        ahead.num_read = rows.stop
        later = gates[:, ahead.num_writers :]
        return _Read.apply(later, self._link, base, self, ahead, rows)

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The deltas written so far at some tokens, differentiable.

        Args:
            rows, cols: [token], batch and position of each; no token twice.

        Returns:
            [writer, token, d_model].
        """
        index = (slice(0, self.num_written), rows, cols)
        return _At.apply(self._link, self, index)

    def rewind(self, num_written: int) -> None:
        """Go back to where so many writers had written, to run again what came after.

        What is written again must be the same as before.
        """
        self.num_written = num_written
        self._ahead = _Ahead(num_written, self.delta[:0])

    def check_current(self) -> None:
        """Guards against differentiating a pass whose buffers a later one has taken."""
        assert self._generation == self._workspace.generation, (
            "these outboxes were overwritten by a later forward pass: "
            "call backward before the next one"
        )

    def input_gradient(self, num_readers: int) -> Tensor:
        """[reader, batch * pos * d_model], where the readers of one look-ahead leave theirs."""
        shape = (num_readers, self.delta[0].numel())
        return self._workspace.take("input_gradient", shape, self.delta)


@dataclass
class _Ahead:
    """A look-ahead: inputs of reads to come, [reader, batch, pos, d_model].

    The first `num_writers` are mixed in already; the first `num_read` have been read.
    """

    num_writers: int
    inputs: Tensor
    num_read: int = 0


def mix(gates: Tensor, delta: Tensor, base: Tensor) -> Tensor:
    """base + gates @ delta, by autograd's own means: for few tokens.

    Args:
        gates: [reader, writer].
        delta: [writer, token, d_model].
        base: [token, d_model].

    Returns:
        [reader, token, d_model].
    """
    mixed = torch.addmm(base.reshape(1, -1), gates.to(delta.dtype), _flat(delta))
    return mixed.view(len(gates), *base.shape)


def _flat(x: Tensor) -> Tensor:
    """[n, batch, pos, d_model] -> [n, batch * pos * d_model]."""
    return x.flatten(1)


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


class _LookAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, boxes: Outboxes, ahead: _Ahead, *gates: Tensor) -> Tensor:
        boxes.check_current()
        delta = _flat(boxes.delta[: ahead.num_writers])
        ctx.boxes, ctx.counts = boxes, [len(g) for g in gates]
        ctx.gates = torch.cat(gates).to(delta.dtype)
        torch.mm(ctx.gates, delta, out=_flat(ahead.inputs))
        return torch.empty(0, device=delta.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        # Its reads have left their gradients by now.
        boxes, ctx.boxes = ctx.boxes, None
        boxes.check_current()
        num_readers, num_writers = ctx.gates.shape
        grad = boxes.input_gradient(num_readers)
        of_gates = _differentiate(boxes, slice(0, num_writers), ctx.gates, grad)
        return None, None, None, *of_gates.split(ctx.counts)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        link: Tensor,
        base: Tensor,
        boxes: Outboxes,
        ahead: _Ahead,
        rows: slice,
    ) -> Tensor:
        boxes.check_current()
        ctx.boxes, ctx.ahead, ctx.rows = boxes, ahead, rows
        ctx.gates = gates.to(boxes.delta.dtype)
        # `data`: to autograd this is a tensor of its own, not touched by what fills other rows.
        mixed = ahead.inputs[rows].data.add_(base)
        ctx.writers = slice(ahead.num_writers, ahead.num_writers + gates.shape[1])
        _flat(mixed).addmm_(ctx.gates, _flat(boxes.delta[ctx.writers]))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        boxes, ahead = ctx.boxes, ctx.ahead
        ctx.boxes = None
        boxes.check_current()
        grad = grad.reshape(len(grad), -1)
        boxes.input_gradient(len(ahead.inputs))[ctx.rows].copy_(grad)
        of_gates = _differentiate(boxes, ctx.writers, ctx.gates, grad)
        return of_gates, None, None, None, None, None


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, boxes: Outboxes, index: tuple) -> Tensor:
        boxes.check_current()
        ctx.boxes, ctx.index = boxes, index
        return boxes.delta[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        boxes, ctx.boxes = ctx.boxes, None
        boxes.check_current()
        boxes.gradient[ctx.index] += grad
        return None, None, None


def _differentiate(boxes: Outboxes, writers: slice, gates: Tensor, grad: Tensor) -> Tensor:
    """Backward of `gates @ delta[writers]`: adds to the writers' gradients, returns the gates'."""
    _flat(boxes.gradient[writers]).addmm_(gates.T, grad)
    return (grad @ _flat(boxes.delta[writers]).T).float()
