"""Outboxes: the writers' outputs, and the mixing of them into readers' inputs. The hot path.

What is stored of a writer is its difference delta = clean - corrupted, so that one product mixes
both values of every edge:

    sum_w g x_w + (1 - g) c_w  =  base + sum_w g delta_w

where `base` is the corrupted residual stream at that point (Bhaskar et al. 2024, arXiv:2406.16778,
rewritten). All deltas lie in one buffer, filled in write order, and their gradients in others, to
which every read's backward pass adds. No copy of the residual array is made at any layer.

Buffers are [token, writer, d_model] with batch and pos in one axis, and lie token by token: mixing
is then one small product a token, all with the same gates, each within a processor's cache. Only in
16 bits on a CPU, whose library is slow at that, they lie writer by writer, and mixing is one wide
product.

A layer has few readers for many writers, and products that thin use a processor badly. So reads
look ahead: the writers that are there already are mixed for the readers of several layers at once.
What they write is added for the later half of these layers when the first half is done, and so on
by halves: the blocked product with a triangular matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MULTIPLE = 8
"""Numbers of 16 bits that a GPU's matrix units load at a time."""


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
        size = math.prod(shape)
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

    def take_outboxes(self, name: str, count: int, like: Tensor) -> Tensor:
        """[token, count, d_model], in the order that suits; `like` is [token, d_model]."""
        num_tokens, d_model = like.shape
        if _is_better_wide(like):
            return self.take(name, (count, num_tokens, d_model), like).transpose(0, 1)
        return self.take(name, (num_tokens, count, d_model), like)


class Outboxes:
    """The deltas of one forward pass, mixed for one site after another.

    Args:
        workspace: where the buffers live. Only the latest `Outboxes` of a workspace may be read,
            written or differentiated, and each only once.
        num_writers: of the whole model.
        gates: [edge] in [0, 1], site by site and there reader by reader; 1 = clean.
        sites: of these gates, how many readers and writers each has.
        like: [batch, pos, d_model], gives shape, dtype and device.
        keep_inputs: whether readers' inputs must last until the backward pass.
    """

    def __init__(
        self,
        workspace: Workspace,
        num_writers: int,
        gates: Tensor,
        sites: Sequence[tuple[int, int]],
        like: Tensor,
        *,
        keep_inputs: bool,
    ) -> None:
        workspace.generation += 1
        self.workspace = workspace
        self._generation = workspace.generation
        self._shape = like.shape
        self.gates = split_by_site(gates.detach().to(like.dtype), sites)
        grad_gates = torch.empty_like(gates)  # every edge is mixed once, and so written once
        self.grad_gates = split_by_site(grad_gates, sites)
        num_writers += MULTIPLE if _wants_multiples(like) else 1  # what else is mixed in
        self.delta = workspace.take_outboxes("delta", num_writers, like.flatten(0, 1))
        self.gradients = _Gradients(workspace, self.delta) if torch.is_grad_enabled() else None
        self.keep_inputs = keep_inputs
        self.num_written = 0
        self._site = 0  # the next to be read
        self._num_inputs = 0
        self._inputs = self.delta[:, :0]  # of the latest buffer of readers' inputs
        self._num_read = 0  # of these
        self._levels: list[_Level] = []
        self._link = _Begin.apply(gates, grad_gates)  # orders writes and reads for autograd

    def write(self, delta: Tensor) -> None:
        """Append the deltas of the next writers.

        Args:
            delta: [writer, batch, pos, d_model].
        """
        writers = slice(self.num_written, self.num_written + len(delta))
        self.num_written = writers.stop
        if self.gradients is None or delta.requires_grad:
            self._link = _Write.apply(self._link, delta, self, writers)
        else:
            self.gradients.leave_out(writers)
            _store(self, delta, writers)

    def read(self, base: Tensor | None, stop: int | None = None) -> Tensor:
        """Mix the deltas written so far into one input for each reader of the next site.

        An edge with gate g carries g * clean + (1 - g) * corrupted
        (interchange ablation; Bhaskar et al. 2024, arXiv:2406.16778).

        Args:
            base: [batch, pos, d_model], the stream when every gate is 0; None: nothing.
            stop: look ahead, up to this site, which is left out: mix the deltas for the readers of
                those sites, too. Their reads then add only what is written after. Mixing for many
                readers at once is faster: the buffer is gone through once for all of them, forward
                and backward. None: no farther than the next site.

        Returns:
            [reader, batch, pos, d_model], dtype of the outboxes; it lasts until the next read that
            begins a buffer of inputs or, if inputs are kept, the next forward pass. The backward
            pass may put its gradient in its place.
        """
        num_readers, num_writers = self.gates[self._site].shape
        assert num_writers == self.num_written, f"site {self._site} reads {num_writers} writers"
        self._mix(range(self._site, stop or self._site + 1), base)
        self._site += 1
        rows = slice(self._num_read, self._num_read + num_readers)
        self._num_read = rows.stop
        # `data`: to autograd this is a tensor of its own, not touched by what fills other rows.
        inputs = self._inputs[:, rows].data
        return _Read.apply(self._link, self, inputs).unflatten(1, self._shape[:2])

    def _mix(self, sites: range, base: Tensor | None) -> None:
        """Mix the deltas written so far into the inputs of some sites, and a base into the first's.

        What an earlier call for more sites has mixed in is there already.
        """
        num_readers = sum(len(self.gates[site]) for site in sites)
        first = 0  # of the writers that are not yet mixed in
        is_new = self._num_read == self._inputs.shape[1]
        if is_new:
            name = f"inputs {self._num_inputs}" if self.keep_inputs else "inputs"
            self._inputs = self.workspace.take_outboxes(name, num_readers, self.delta[:, 0])
            self._num_inputs += num_readers
            self._num_read = 0
            if self.gradients is not None and _wants_whole_arrays(self.delta):
                self.gradients.begin(self.num_written)
        else:
            while self._levels[-1].num_readers <= self._num_read:
                self._levels.pop()
            first = self._levels[-1].num_writers
        rows = slice(self._num_read, self._num_read + num_readers)
        self._levels.append(_Level(rows.stop, self.num_written))
        writers, inputs = slice(first, self.num_written), self._inputs[:, rows]
        if base is not None:
            base = base.reshape(-1, base.shape[-1])
        self._link = _Mix.apply(self._link, self, inputs, sites, writers, base, is_new)

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The deltas written so far at some tokens, differentiable.

        Args:
            rows, cols: [token], batch and position of each; no token twice.

        Returns:
            [writer, token, d_model].
        """
        return _At.apply(self._link, self, rows * self._shape[1] + cols)

    def repeatable(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that writes and reads, to be called twice: by the backward pass, too.

        The second call begins where the first did and has to write the same again.
        """
        begin, called = (self.num_written, self._site), False

        def run() -> Tensor:
            nonlocal called
            if not called:
                called = True
                return function()
            self.num_written, self._site = begin
            self._inputs, self._num_read, self._levels = self.delta[:, :0], 0, []
            link = self._link
            try:
                return function()
            finally:  # what is run again is never differentiated, so nothing may lead there
                self._link = link

        return run

    def check_current(self) -> None:
        """Guards against differentiating a pass whose buffers a later one has taken."""
        assert self._generation == self.workspace.generation, (
            "these outboxes were overwritten by a later forward pass: "
            "call backward before the next one"
        )


@dataclass(frozen=True)
class _Level:
    """Of a look-ahead: for which readers' inputs (up to a row) which first writers are mixed in."""

    num_readers: int
    num_writers: int


class _Gradients:
    """Gradients of the deltas, in arrays of [token, writer, d_model].

    Each has the writers between two new look-aheads where a product adds faster into a whole array
    than into a part of one; else there is one array.

    Args:
        workspace: where they live.
        delta: [token, writer, d_model].
    """

    def __init__(self, workspace: Workspace, delta: Tensor) -> None:
        self._workspace = workspace
        self._delta = delta
        self._starts = [0]

    def leave_out(self, writers: slice) -> None:
        """The first writers, embeddings, depend on no gate and need no gradient."""
        if writers.start == self._starts[0] and not _wants_multiples(self._delta):
            self._starts[0] = writers.stop

    def begin(self, writer: int) -> None:
        """A look-ahead has been at these writers; called in order, and again when recomputing."""
        if writer > self._starts[-1]:
            self._starts.append(writer)

    @cached_property
    def _parts(self) -> list[tuple[slice, Tensor]]:
        """The writers of each array; made when the forward pass is over."""

        def zeros(start: int, stop: int) -> Tensor:
            name, like = f"gradient {start}", self._delta[:, 0]
            return self._workspace.take_outboxes(name, stop - start, like).zero_()

        bounds = pairwise([*self._starts, self._delta.shape[1]])
        return [(slice(start, stop), zeros(start, stop)) for start, stop in bounds]

    def of(self, writers: slice) -> Tensor:
        """Those of some writers of one write."""
        return next(
            part[:, writers.start - span.start : writers.stop - span.start]
            for span, part in self._parts
            if span.start <= writers.start < span.stop
        )

    def add_mixed(self, writers: slice, gates: Tensor, grad_inputs: Tensor) -> None:
        """Add what inputs give of theirs to some writers.

        Args:
            writers: all of some arrays, or some of one.
            gates: [reader, writer], only theirs.
            grad_inputs: [token, reader, d_model].
        """
        for span, part in self._parts:
            start, stop = max(span.start, writers.start), min(span.stop, writers.stop)
            if start >= stop:
                continue
            mixing = gates[:, start - writers.start : stop - writers.start].T
            part = part[:, start - span.start : stop - span.start]
            _add_mixed(self._workspace, part, mixing, grad_inputs)

    def add_at(self, tokens: Tensor, grad_values: Tensor) -> None:
        """Add [writer, token, d_model] at some tokens, for the first writers."""
        for span, part in self._parts:
            if span.start < len(grad_values):
                new = grad_values[span].transpose(0, 1)
                part[:, : new.shape[1]].index_add_(0, tokens, new)


def mix(gates: Tensor, delta: Tensor, base: Tensor | None) -> Tensor:
    """base + gates @ delta, by autograd's own means: for few tokens.

    Args:
        gates: [reader, writer].
        delta: [writer, token, d_model].
        base: [token, d_model]; None: nothing.

    Returns:
        [reader, token, d_model].
    """
    mixed = (gates.to(delta.dtype) @ delta.flatten(1)).view(len(gates), *delta.shape[1:])
    return mixed if base is None else base + mixed


def split_by_site(gates: Tensor, sites: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A flat [edge] -> one [reader, writer] view a site, given how many of both each has."""
    parts = gates.split([readers * writers for readers, writers in sites])
    return [part.view(site) for part, site in zip(parts, sites, strict=True)]


class _Begin(torch.autograd.Function):
    """The first link; when the backward pass comes to it, all mixing has given its gates theirs."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, grad_gates: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # the link has none
        ctx.grad_gates = grad_gates
        return torch.empty(0, device=gates.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        grad_gates, ctx.grad_gates = ctx.grad_gates, None
        return grad_gates, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, delta: Tensor, boxes: Outboxes, writers: slice) -> Tensor:
        boxes.check_current()
        ctx.set_materialize_grads(False)  # the link has none
        ctx.boxes, ctx.writers, ctx.shape = boxes, writers, delta.shape
        _store(boxes, delta, writers)
        return torch.empty(0, device=delta.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        # Every later read has added its part by now: the link made autograd run them first.
        boxes, ctx.boxes = ctx.boxes, None
        boxes.check_current()
        grad_delta = boxes.gradients.of(ctx.writers).transpose(0, 1)
        return None, grad_delta.unflatten(1, ctx.shape[1:3]), None, None


def _store(boxes: Outboxes, delta: Tensor, writers: slice) -> None:
    boxes.delta[:, writers].copy_(delta.flatten(1, 2).transpose(0, 1))


class _Mix(torch.autograd.Function):
    """Adds some writers, or if `is_new` puts them, into the inputs of the readers of some sites.

    StepInputs are [token, reader, d_model]. For the first site's readers, `base` ([token, d_model] or
    None) is one more writer, with gates of 1: for the time of the product it lies where the next
    writer will.
    """

    @staticmethod
    def forward(
        ctx: Any,
        link: Tensor,
        boxes: Outboxes,
        inputs: Tensor,
        sites: range,
        writers: slice,
        base: Tensor | None,
        is_new: bool,
    ) -> Tensor:
        boxes.check_current()
        ctx.set_materialize_grads(False)  # the link has none
        ctx.boxes, ctx.inputs, ctx.sites, ctx.writers = boxes, inputs, sites, writers
        gates = torch.cat([boxes.gates[site][:, writers] for site in sites])
        ctx.gates = mixing = _with_closed(gates, boxes.delta)
        if base is not None:
            of_base = torch.arange(len(gates), device=gates.device) < len(boxes.gates[sites.start])
            gates = torch.cat([gates, of_base[:, None].to(gates.dtype)], 1)
            mixing = _with_closed(gates, boxes.delta)
            boxes.delta[:, writers.stop].copy_(base)
        start, num_open, num_mixed = writers.start, gates.shape[1], mixing.shape[1]
        boxes.delta[:, start + num_open : start + num_mixed].zero_()  # times 0, anything but NaN
        values = boxes.delta[:, start : start + num_mixed]
        _add_mixed(boxes.workspace, inputs, mixing, values, onto_nothing=is_new)
        return torch.empty(0, device=link.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        # The reads have put their gradients in their inputs' places by now.
        boxes, grad_inputs = ctx.boxes, ctx.inputs
        ctx.boxes = ctx.inputs = None
        boxes.check_current()
        mixed = slice(ctx.writers.start, ctx.writers.start + ctx.gates.shape[1])
        boxes.gradients.add_mixed(mixed, ctx.gates, grad_inputs)
        grad_gates = _of_gates(boxes.workspace, grad_inputs, boxes.delta[:, mixed])
        targets = [boxes.grad_gates[site][:, ctx.writers] for site in ctx.sites]
        for target, of_site in zip(
            targets, grad_gates.split([len(t) for t in targets]), strict=True
        ):
            target.copy_(of_site[:, : target.shape[1]])
        return (None,) * 7


def _with_closed(gates: Tensor, delta: Tensor) -> Tensor:
    """[reader, writer], with closed gates up to a multiple of writers where that is wanted."""
    missing = -gates.shape[1] % MULTIPLE if _wants_multiples(delta) else 0
    return nn.functional.pad(gates, (0, missing)) if missing else gates


def _is_better_wide(like: Tensor) -> bool:
    """Whether such buffers should lie writer by writer."""
    return like.device.type == "cpu" and like.element_size() == 2


def _wants_multiples(x: Tensor) -> bool:
    """Whether products are to be with a multiple of `MULTIPLE` writers."""
    return x.device.type != "cpu" and x.element_size() == 2


def _wants_whole_arrays(x: Tensor) -> bool:
    """Whether a product into a part of such an array, [token, writer, d_model], is slow."""
    return x.device.type == "cpu" and not _is_wide(x)


def _is_wide(x: Tensor) -> bool:
    """Whether [token, writer, d_model] lies writer by writer."""
    return x.stride(1) > x.stride(0)


def _rows(x: Tensor) -> Tensor:
    """[token, writer, d_model] that lies writer by writer -> [writer, token * d_model]."""
    return x.transpose(0, 1).flatten(1)


def _add_mixed(
    workspace: Workspace,
    target: Tensor,
    gates: Tensor,
    values: Tensor,
    *,
    onto_nothing: bool = False,
) -> None:
    """target + gates @ values, or only the latter, into target.

    Args:
        target: [token, reader, d_model].
        gates: [reader, writer].
        values: [token, writer, d_model].
    """
    kept = 0 if onto_nothing else 1  # what is there is multiplied by it
    if _is_wide(target):
        _rows(target).addmm_(gates, _rows(values), beta=kept)
    elif gates.shape[1] == 1 and kept:
        target.addcmul_(gates, values)
    elif target.is_contiguous() or not _wants_whole_arrays(target):
        target.baddbmm_(gates.expand(len(values), *gates.shape), values, beta=kept)
    else:
        shape = (len(values), len(gates), values.shape[2])
        mixed = workspace.take("mixed", shape, values)
        target += torch.bmm(gates.expand(len(values), *gates.shape), values, out=mixed)


def _of_gates(workspace: Workspace, grad_inputs: Tensor, values: Tensor) -> Tensor:
    """[token, reader, d_model] and [token, writer, d_model] -> the gates', [reader, writer]."""
    if _is_wide(values):
        return (_rows(grad_inputs) @ _rows(values).T).float()
    shape = (len(values), grad_inputs.shape[1], values.shape[1])
    products = workspace.take("grad_gates", shape, values)
    return torch.bmm(grad_inputs, values.transpose(1, 2), out=products).sum(0, dtype=torch.float32)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, boxes: Outboxes, inputs: Tensor) -> Tensor:
        boxes.check_current()
        ctx.boxes, ctx.inputs = boxes, inputs
        return inputs.data.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        boxes, inputs = ctx.boxes, ctx.inputs
        ctx.boxes = ctx.inputs = None
        boxes.check_current()
        if grad.data_ptr() != inputs.data_ptr():
            inputs.copy_(grad.transpose(0, 1))
        return None, None, None


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, boxes: Outboxes, tokens: Tensor) -> Tensor:
        boxes.check_current()
        ctx.boxes, ctx.tokens = boxes, tokens
        return boxes.delta[tokens, : boxes.num_written].transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        boxes, ctx.boxes = ctx.boxes, None
        boxes.check_current()
        boxes.gradients.add_at(ctx.tokens, grad)
        return None, None, None
