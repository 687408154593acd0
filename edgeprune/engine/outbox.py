"""Outboxes: the writers' outputs, and mixing them into the readers' inputs. The hot path.

The outboxes store each writer's delta = clean - ablation value, so that one product mixes both
values of every edge (Bhaskar et al. 2024, arXiv:2406.16778, rewritten):

    sum_w g_w clean_w + (1 - g_w) ablated_w  =  base + sum_w g_w delta_w

where `base` is the ablated residual stream at that point. All deltas lie in one buffer, filled in
write order, in which the base takes the place of the next writer while it is mixed; their gradients
lie in others, to which the backward pass of every mix adds.

Layout. Buffers are [token, writer, d_model], where token runs over batch and pos. They are normally
token-major: mixing is one small product per token, all with the same gates, each of which stays in
a processor's cache. Small products in 16 bits are slow on a CPU; there, buffers are writer-major,
and mixing is one wide product.

Look-ahead. A layer has few readers for many writers, and such thin products use a processor badly.
So reads look ahead: the writers written so far are mixed for the readers of several layers at once.
What those layers write is added for the later half of them when the first half is done, and so on
by halves: a blocked product with a triangular matrix.

Autograd. Writes, mixes and reads change buffers in place, which autograd does not see. Each passes
an empty tensor, the *link*, to the next, so that the backward pass runs them in reverse order:

    forward                                     backward
    _Begin                                      return grad_gates
    _Write   (the deltas are stored)            return the deltas' gradients
    _Mix     inputs += gates @ deltas           grad_deltas += gates.T @ grad_inputs
                                                grad_gates = grad_inputs @ deltas.T
    _Read    return one site's inputs           store the inputs' gradients in place of the inputs
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

MULTIPLE = 8
"""On a GPU in 16 bits, writers are padded to a multiple of this for tensor cores."""


class Workspace:
    """Named flat buffers, kept from one step to the next."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.generation = 0  # number of forward passes that have used the workspace

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor like `like`, valid until the same name is taken again."""
        size, kind = math.prod(shape), (like.dtype, like.device)
        buffer = self.buffers.pop(name, None)
        if buffer is None or buffer.numel() < size or (buffer.dtype, buffer.device) != kind:
            del buffer  # frees its memory before the new buffer is allocated
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        self.buffers[name] = buffer
        return buffer[:size].view(shape)

    def take_outboxes(self, name: str, count: int, like: Tensor) -> Tensor:
        """An uninitialised [token, count, d_model] in the faster layout; like: [token, d_model]."""
        num_tokens, d_model = like.shape
        if _prefers_writer_major(like):
            return self.take(name, (count, num_tokens, d_model), like).transpose(0, 1)
        return self.take(name, (num_tokens, count, d_model), like)


class Outboxes:
    """The deltas of one forward pass, mixed site by site.

    Args:
        workspace: holds the buffers. Only its latest `Outboxes` may be used.
        num_writers: number of writers of the whole model.
        gates: the gates of the edges of `sites`, [edge] in [0, 1], in the graph's order; 1 = clean.
        sites: per site, the number of its readers and the number of writers that they read.
        like: [batch, pos, d_model], has the shape, dtype and device of a delta.
        keep_inputs: whether all readers' inputs must last until the backward pass.

    Attributes:
        gates: per site, [reader, writer], in the dtype of the deltas.
        needs_grad_gates: whether the gates are differentiated.
        grad_gates: per site, [reader, writer], float32: views of one [edge] tensor.
        delta: [token, writer, d_model], of which `num_written` writers have been written.
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
        self.workspace, self.generation = workspace, workspace.generation
        self._batch_pos = like.shape[:2]
        self.gates = split_by_site(gates.detach().to(like.dtype), sites)
        self.needs_grad_gates = gates.requires_grad
        grad_gates = torch.empty_like(gates)  # filled completely: every edge is mixed once
        self.grad_gates = split_by_site(grad_gates, sites)
        num_writers += MULTIPLE if _pads_writers(like) else 1  # room for the base and the padding
        self.delta = workspace.take_outboxes("delta", num_writers, like.flatten(0, 1))
        self.num_written = 0
        self._site = 0  # the next site to be read
        self._keep_inputs = keep_inputs
        # The current look-ahead: its inputs, [token, reader, d_model], and how many have been read.
        # Its mixes as (stop, n): the inputs before `stop` contain the first n writers. A later mix
        # is for fewer readers and contains more writers.
        self._inputs, self._num_read = self.delta[:, :0], 0
        self._mixed: list[tuple[int, int]] = []
        self._starts = [0]  # the first writer of each buffer of gradients
        self._link = _Begin.apply(gates, grad_gates)

    def write(self, delta: Tensor) -> None:
        """Append the deltas of the next writers, [writer, batch, pos, d_model]."""
        writers = slice(self.num_written, self.num_written + len(delta))
        self.num_written = writers.stop
        with torch.no_grad():
            self.delta[:, writers].copy_(delta.flatten(1, 2).transpose(0, 1))
        if delta.requires_grad:
            self._link = _Write.apply(self._link, delta, self, writers)
        elif writers.start == self._starts[0] and not _pads_writers(self.delta):
            self._starts[0] = writers.stop  # embeddings need no gradient: they depend on no gate

    def skip_to(self, site: int) -> None:
        """Make a site the next one to be read, with the deltas of the last forward pass before it.

        Only for the same shapes and without gradients.
        """
        self._site, self.num_written = site, self.gates[site].shape[1]

    def read(self, base: Tensor | None, stop: int | None = None) -> Tensor:
        """Mix the deltas written so far into one input per reader of the next site.

        An edge with gate g carries g * clean + (1 - g) * ablation value.

        Args:
            base: [batch, pos, d_model], the input if every gate is 0; None: zeros.
            stop: the deltas are mixed for the readers of all sites before this one, and later reads
                of these add only what is written after. None: no look-ahead.

        Returns:
            [reader, batch, pos, d_model], dtype of the outboxes, valid until the next look-ahead
            begins or, with `keep_inputs`, until the next forward pass. The backward pass may
            overwrite it with its gradient.
        """
        num_readers, num_writers = self.gates[self._site].shape
        assert num_writers == self.num_written, f"site {self._site} reads {num_writers} writers"
        self._mix(range(self._site, stop or self._site + 1), base)
        self._site += 1
        readers = slice(self._num_read, self._num_read + num_readers)
        self._num_read = readers.stop
        # `data` hides from autograd that later mixes modify the other readers' inputs.
        inputs = self._inputs[:, readers].data  # [token, reader, d_model]
        inputs = _Read.apply(self._link, self, inputs)  # [reader, token, d_model]
        return inputs.unflatten(1, self._batch_pos)  # [reader, batch, pos, d_model]

    def _mix(self, sites: range, base: Tensor | None) -> None:
        """Mix what is not mixed yet into the inputs of some sites, and a base into the first's."""
        num_readers = sum(len(self.gates[site]) for site in sites)
        is_new = self._num_read == self._inputs.shape[1]
        if is_new:
            self._begin_lookahead(num_readers)
        while self._mixed[-1][0] <= self._num_read:
            self._mixed.pop()
        readers = slice(self._num_read, self._num_read + num_readers)
        writers = slice(self._mixed[-1][1], self.num_written)
        self._mixed.append((readers.stop, writers.stop))
        inputs = self._inputs[:, readers]  # [token, reader, d_model]
        if base is not None:
            base = base.reshape(-1, base.shape[-1])  # [token, d_model]
        self._link = _Mix.apply(self._link, self, inputs, sites, writers, base, is_new)

    def _begin_lookahead(self, num_readers: int) -> None:
        name = f"inputs {self._site}" if self._keep_inputs else "inputs"
        self._inputs = self.workspace.take_outboxes(name, num_readers, self.delta[:, 0])
        self._num_read, self._mixed = 0, [(num_readers, 0)]
        if _prefers_whole_buffers(self.delta) and self.num_written > self._starts[-1]:
            self._starts.append(self.num_written)

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The deltas of all writers at distinct tokens, [writer, predicted, d_model]."""
        return _At.apply(self._link, self, rows * self._batch_pos[1] + cols)

    @cached_property
    def _gradients(self) -> list[tuple[int, Tensor]]:
        """Buffers of the deltas' gradients, [token, writer, d_model], each with its first writer.

        Where a product into a whole buffer is faster than into a part of one, each buffer has the
        writers between the beginnings of two look-aheads. Allocated after the forward pass.
        """
        buffers, take, like = [], self.workspace.take_outboxes, self.delta[:, 0]
        for start, stop in pairwise([*self._starts, self.delta.shape[1]]):
            buffers.append((start, take(f"gradient {start}", stop - start, like).zero_()))
        return buffers

    def gradients(self, writers: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield, per buffer with some of the writers, which ones and their gradients."""
        for first, buffer in self._gradients:
            start, stop = max(first, writers.start), min(first + buffer.shape[1], writers.stop)
            if start < stop:
                part = slice(start - writers.start, stop - writers.start)
                yield part, buffer[:, start - first : stop - first]

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The `context_fn` with which `checkpoint` may recompute the look-ahead that begins now."""
        return nullcontext(), self._rewound(self.num_written, self._site)

    @contextmanager
    def _rewound(self, num_written: int, site: int) -> Iterator[None]:
        """Go back to a writer and a site, from which the same deltas are written again."""
        link = self._link
        self.num_written, self._site = num_written, site
        self._inputs, self._num_read = self.delta[:, :0], 0
        try:
            yield
        finally:  # the second run is not differentiated, so the link must not lead to it
            self._link = link


def mix(gates: Tensor, delta: Tensor, base: Tensor | None) -> Tensor:
    """base + gates @ delta, [reader, token, d_model], differentiated by autograd: for few tokens.

    Gates are [reader, writer], delta [writer, token, d_model], base [token, d_model] or None.
    """
    mixed = gates.to(delta.dtype) @ delta.flatten(1)  # [reader, token * d_model]
    mixed = mixed.view(len(gates), *delta.shape[1:])  # [reader, token, d_model]
    return mixed if base is None else base + mixed


def split_by_site(gates: Tensor, sites: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split [edge] into one [reader, writer] view per site of that size."""
    parts = gates.split([readers * writers for readers, writers in sites])
    return [part.view(site) for part, site in zip(parts, sites, strict=True)]


# ---------------------------------------------------------------- the operations, linked in order


def _outboxes(ctx: Any) -> Outboxes:
    """Take the outboxes from a context, which frees them after the backward pass."""
    boxes, ctx.boxes = ctx.boxes, None
    assert boxes.generation == boxes.workspace.generation, "overwritten by a later forward pass"
    return boxes


class _Begin(torch.autograd.Function):
    """The first link. Its backward pass runs last, after every mix has written its gradient."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, grad_gates: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # the link has no gradient
        ctx.grad_gates = grad_gates  # [edge]
        return torch.empty(0, device=gates.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        grad_gates, ctx.grad_gates = ctx.grad_gates, None
        return grad_gates, None


class _Write(torch.autograd.Function):
    """Returns the gradients of deltas, [writer, batch, pos, d_model], that have been stored."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, delta: Tensor, boxes: Outboxes, writers: slice) -> Tensor:
        ctx.set_materialize_grads(False)  # the link has no gradient
        ctx.boxes, ctx.writers, ctx.batch_pos = boxes, writers, delta.shape[1:3]
        return torch.empty(0, device=delta.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        # All later mixes have added their gradients: the link made autograd run them first.
        ((_, grad_delta),) = _outboxes(ctx).gradients(ctx.writers)  # [token, writer, d_model]
        return None, grad_delta.transpose(0, 1).unflatten(1, ctx.batch_pos), None, None


class _Mix(torch.autograd.Function):
    """inputs += gates @ delta for some writers and sites, or inputs = gates @ delta if `is_new`.

    The base, [token, d_model] or None, is added to the inputs of the first site's readers: for the
    product it takes the place of the next writer, with gates of 1.
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
        ctx.set_materialize_grads(False)  # the link has no gradient
        ctx.boxes, ctx.inputs, ctx.sites, ctx.writers = boxes, inputs, sites, writers
        gates = torch.cat([boxes.gates[site][:, writers] for site in sites])  # [reader, writer]
        ctx.gates = mixing = _pad_writers(gates, boxes.delta)  # [reader, writer]
        if base is not None:
            gates = nn.functional.pad(gates, (0, 1))
            gates[: len(boxes.gates[sites.start]), -1].fill_(1)
            mixing = _pad_writers(gates, boxes.delta)
            boxes.delta[:, writers.stop].copy_(base)
        values = boxes.delta[:, writers.start :][:, : mixing.shape[1]]  # [token, writer, d_model]
        values[:, gates.shape[1] :].zero_()  # the padding, because 0 times NaN would be NaN
        _add_mixed(boxes.workspace, inputs, mixing, values, overwrite=is_new)
        return torch.empty(0, device=link.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        boxes = _outboxes(ctx)
        grad_inputs, ctx.inputs = ctx.inputs, None  # [token, reader, d_model], see `_Read.backward`
        mixed = slice(ctx.writers.start, ctx.writers.start + ctx.gates.shape[1])  # with padding
        for part, target in boxes.gradients(mixed):
            _add_mixed(boxes.workspace, target, ctx.gates[:, part].T, grad_inputs)
        targets = [boxes.grad_gates[site][:, ctx.writers] for site in ctx.sites]
        if boxes.needs_grad_gates:
            grad_gates = _grad_gates(boxes.workspace, grad_inputs, boxes.delta[:, mixed])
            grad_gates = grad_gates[:, : ctx.writers.stop - ctx.writers.start]  # [reader, writer]
            parts = grad_gates.split(list(map(len, targets)))
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part)
        grad_base = None
        if ctx.needs_input_grad[5]:
            grad_base = grad_inputs[:, : len(targets[0])].sum(1)  # [token, d_model]
        return None, None, None, None, None, grad_base, None


class _Read(torch.autograd.Function):
    """[token, reader, d_model] -> [reader, token, d_model]; backward, stores the gradient there."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, boxes: Outboxes, inputs: Tensor) -> Tensor:
        ctx.boxes, ctx.inputs = boxes, inputs
        return inputs.data.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        _outboxes(ctx)
        inputs, ctx.inputs = ctx.inputs, None
        if grad.data_ptr() != inputs.data_ptr():  # heads.py may have stored it there already
            inputs.copy_(grad.transpose(0, 1))
        return None, None, None


class _At(torch.autograd.Function):
    """The deltas of all writers at some tokens: see `Outboxes.at`."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, boxes: Outboxes, tokens: Tensor) -> Tensor:
        ctx.boxes, ctx.tokens = boxes, tokens
        return boxes.delta[tokens, : boxes.num_written].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        for part, target in _outboxes(ctx).gradients(slice(0, len(grad))):
            # Along the first axis of writer-major memory this would take 50 times as long.
            target.transpose(0, 1).index_add_(1, ctx.tokens, grad[part])
        return None, None, None


# ----------------------------------------------------------------------------------- the products


def _add_mixed(
    workspace: Workspace, target: Tensor, gates: Tensor, values: Tensor, *, overwrite: bool = False
) -> None:
    """target += gates @ values (or =): [token, m, d_model], [m, n] and [token, n, d_model]."""
    beta = 0 if overwrite else 1  # factor of what `target` holds
    if _is_writer_major(target):
        _flatten(target).addmm_(gates, _flatten(values), beta=beta)
    elif gates.shape[1] == 1 and not overwrite:
        target.addcmul_(gates, values)
    elif target.is_contiguous() or not _prefers_whole_buffers(target):
        target.baddbmm_(gates.expand(len(values), *gates.shape), values, beta=beta)
    else:
        mixed = workspace.take("mixed", target.shape, values)  # [token, reader, d_model]
        target += torch.bmm(gates.expand(len(values), *gates.shape), values, out=mixed)


def _grad_gates(workspace: Workspace, grad_inputs: Tensor, values: Tensor) -> Tensor:
    """[token, reader, d_model] and [token, writer, d_model] -> [reader, writer], in float32."""
    if _is_writer_major(values):
        return (_flatten(grad_inputs) @ _flatten(values).T).float()
    shape = (len(values), grad_inputs.shape[1], values.shape[1])
    products = workspace.take("grad_gates", shape, values)  # [token, reader, writer]
    return torch.bmm(grad_inputs, values.transpose(1, 2), out=products).sum(0, dtype=torch.float32)


def _pad_writers(gates: Tensor, delta: Tensor) -> Tensor:
    """Pad [reader, writer] with gates of 0 to a multiple of `MULTIPLE` writers, where useful."""
    missing = -gates.shape[1] % MULTIPLE if _pads_writers(delta) else 0
    return nn.functional.pad(gates, (0, missing)) if missing else gates


def _flatten(x: Tensor) -> Tensor:
    """Writer-major [token, writer, d_model] -> [writer, token * d_model], a view."""
    return x.transpose(0, 1).flatten(1)


def _is_writer_major(x: Tensor) -> bool:
    """Whether the memory of [token, writer, d_model] is ordered by writer, then token."""
    return x.stride(1) > x.stride(0)


def _prefers_writer_major(like: Tensor) -> bool:
    """Whether buffers should be writer-major."""
    return like.device.type == "cpu" and like.element_size() == 2


def _pads_writers(x: Tensor) -> bool:
    """Whether products should have a multiple of `MULTIPLE` writers."""
    return x.device.type != "cpu" and x.element_size() == 2


def _prefers_whole_buffers(x: Tensor) -> bool:
    """Whether a product into a part of a buffer, [token, writer, d_model], is slow."""
    return x.device.type == "cpu" and not _is_writer_major(x)
