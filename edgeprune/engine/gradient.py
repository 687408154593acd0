"""A batch's distance from the full model and its gradient by the gates; on a GPU, replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.metrics import faithfulness
from edgeprune.prompts import Batch

MAX_GRAPHS = 16
"""Shapes of batches of which CUDA graphs are kept; what comes after is run as it is."""

Gradient = tuple[Tensor, Tensor]
"""The distance, a number, and its gradient by the gates, [edge]."""


@dataclass(frozen=True)
class StepInputs:
    """All tensors that a distance depends on.

    Attributes:
        batch: the prompts.
        reference: the full model's outputs, [predicted, vocabulary].
        closed: what closed edges carry; None: nothing.
        gates: [edge] in [0, 1], a leaf which requires a gradient.
    """

    batch: Batch
    reference: Tensor
    closed: Activations | None
    gates: Tensor

    def map(self, function: Callable[..., Tensor], *others: StepInputs) -> StepInputs:
        """Apply a function to every tensor (and the others' at its place)."""
        closed = self.closed
        if closed is not None:
            closed = closed.map(function, *(other.closed for other in others))
        return StepInputs(
            self.batch.map(function, *(other.batch for other in others)),
            function(self.reference, *(other.reference for other in others)),
            closed,
            function(self.gates, *(other.gates for other in others)),
        )


def differentiate(
    model: CircuitModel, inputs: StepInputs, *, share: float = 1.0, recompute: bool = False
) -> Gradient:
    """Run the circuit, forward and backward.

    Args:
        model: the frozen model.
        inputs: prompts, gates, and what the untouched model gives.
        share: by which distance and gradient are multiplied: the inputs' share of a batch.
        recompute: see `CircuitModel.run_circuit`.
    """
    outputs = model.run_circuit(inputs.batch, inputs.gates, inputs.closed, recompute=recompute)
    distance = share * faithfulness(inputs.batch, inputs.reference, outputs, model.output)
    (grad_gates,) = torch.autograd.grad(distance, inputs.gates)
    return distance.detach(), grad_gates


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph and the memory that it reads and writes.

    Attributes:
        inputs: where it finds them.
        gradient: where it leaves it.
        buffers: of the outboxes: address and size of each.
    """

    graph: Any
    inputs: StepInputs
    gradient: Gradient
    buffers: frozenset[tuple[int, int]]


class CudaGraphs:
    """`differentiate`, recorded for each shape of batch, and from then on replayed.

    A step of a small model starts more than a thousand operations, each shorter than Python takes
    to start it. A graph starts them all at once, with the same results. The first batch of a shape
    is run as it is, so that libraries and buffers are ready; the second is recorded.

    Args:
        model: on a GPU, and not sharded.
        recompute: see `CircuitModel.run_circuit`.
    """

    def __init__(self, model: CircuitModel, *, recompute: bool) -> None:
        self._model = model
        self._recompute = recompute
        self._recordings: dict[Any, _Recording | None] = {}
        self._stream = torch.cuda.Stream(model.device)
        self._pool = torch.cuda.graph_pool_handle()

    def differentiate(self, inputs: StepInputs, *, share: float) -> Gradient:
        """See `differentiate`.

        Raises:
            ConfigError: the model does something that no graph can hold.
        """
        key = (inputs.batch.clean_ids.shape, inputs.reference.shape, share)
        if key not in self._recordings:
            if len(self._recordings) < MAX_GRAPHS:
                self._recordings[key] = None
            return self._run(inputs, share)
        recording = self._recordings[key]
        if recording is None or not recording.buffers <= self._buffers():
            recording = self._recordings[key] = self._record(inputs, share)
        with torch.no_grad():
            recording.inputs.map(Tensor.copy_, inputs)
        recording.graph.replay()
        distance, grad_gates = recording.gradient  # the next replay writes there
        return distance.clone(), grad_gates.clone()

    def _buffers(self) -> frozenset[tuple[int, int]]:
        """Those that are there; a larger batch or a release has put others in their place."""
        buffers = self._model.workspace.buffers
        return frozenset((buffer.data_ptr(), buffer.nbytes) for buffer in buffers)

    def _run(self, inputs: StepInputs, share: float) -> Gradient:
        """On the stream that records: what libraries keep for a stream is then there."""
        current = torch.cuda.current_stream(self._model.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            gradient = differentiate(self._model, inputs, share=share, recompute=self._recompute)
        current.wait_stream(self._stream)
        return gradient

    def _record(self, inputs: StepInputs, share: float) -> _Recording:
        own = inputs.map(torch.clone)
        own = replace(own, gates=own.gates.detach().requires_grad_())
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._model.device)
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream)
        try:
            with torch.cuda.stream(current), recording:  # a failed recording leaves its stream on
                gradient = differentiate(self._model, own, share=share, recompute=self._recompute)
        except RuntimeError as error:
            reason = error.__context__ or error  # the graph has an error of its own to add
            if isinstance(reason, torch.OutOfMemoryError):
                raise reason from None
            raise ConfigError(
                f"a step of {self._model.name} cannot be recorded as a CUDA graph: {reason}; give "
                "trainer.cuda_graph=false"
            ) from error
        return _Recording(graph, own, gradient, self._buffers())
