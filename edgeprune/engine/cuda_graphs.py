"""Training steps recorded as CUDA graphs and replayed."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.gradient import Gradient, StepInputs, differentiate
from edgeprune.errors import ConfigError
from edgeprune.metrics import Objective, mean_kl

MAX_GRAPHS = 16
"""Maximum number of batch shapes that are recorded; batches of other shapes run as usual."""


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    gradient: Gradient
    buffers: frozenset[tuple[int, int]]  # address and size of each buffer of the workspace


class CudaGraphs:
    """`differentiate`, recorded once per shape of batch and replayed from then on.

    A step of a small model launches more than a thousand operations, each of which runs for less
    time than Python takes to launch it. A graph launches them all at once, with the same results.
    The first batch of a shape runs as usual, which initialises libraries and buffers; the second is
    recorded. The model must be on a GPU and not sharded.
    """

    def __init__(
        self, model: CircuitModel, *, objective: Objective = mean_kl, recompute: bool
    ) -> None:
        self._model = model
        self._differentiate = partial(
            differentiate, model, objective=objective, recompute=recompute
        )
        self._recordings: dict[Any, _Recording | None] = {}
        self._stream = torch.cuda.Stream(model.device)
        self._pool = torch.cuda.graph_pool_handle()

    def differentiate(self, inputs: StepInputs, *, share: float) -> Gradient:
        """See `gradient.differentiate`; raises ConfigError if the step cannot be recorded."""
        ids = (inputs.batch.clean_ids, inputs.batch.answer_ids, inputs.batch.distractor_ids)
        key = (*(x.shape for x in (*ids, inputs.reference)), share)
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
        return tuple(map(torch.clone, recording.gradient))  # the next replay overwrites it

    def _buffers(self) -> frozenset[tuple[int, int]]:
        """Address and size of the current buffers: a larger batch or `release` replaces them."""
        return frozenset((x.data_ptr(), x.nbytes) for x in self._model.workspace.buffers.values())

    def _run(self, inputs: StepInputs, share: float) -> Gradient:
        """Run on the recording stream, which initialises what libraries keep per stream."""
        current = torch.cuda.current_stream(self._model.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            gradient = self._differentiate(inputs, share=share)
        current.wait_stream(self._stream)
        return gradient

    def _record(self, inputs: StepInputs, share: float) -> _Recording:
        own = inputs.map(torch.clone)
        own = replace(own, gates=own.gates.detach().requires_grad_())
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._model.device)
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream)
        try:
            # The outer context restores the current stream, which a failed recording does not.
            with torch.cuda.stream(current), recording:
                gradient = self._differentiate(own, share=share)
        except RuntimeError as error:
            reason = error.__context__ or error  # ending a failed recording raises another error
            if isinstance(reason, torch.OutOfMemoryError):
                raise reason from None
            raise ConfigError(
                f"a step of {self._model.name} cannot be recorded as a CUDA graph: {reason}; set "
                "trainer.cuda_graph=false"
            ) from error
        return _Recording(graph, own, gradient, self._buffers())
