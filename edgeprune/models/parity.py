"""The parity check: a circuit model must compute exactly what the untouched model computes.

Whether both compute the same function is checked in float32, with the weights of one layer at a
time cast to it, whatever the model's own dtype. In 16 bits, a second check compares roundings: real
models have activations so large that the stock model itself may be far from its float32, so the
circuit is held to a multiple of that distance rather than to a constant.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ModelError
from edgeprune.prompts import Batch, Pair, collate

log = logging.getLogger("edgeprune")

TOLERANCE = 1e-4
"""In float32, the largest accepted difference of logits, relative to the largest logit."""

QUANTIZED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""The same for weights in 4 bits, which are checked in the model's own dtype."""

TOLERANCE_8_BITS = 0.1
"""The same for weights in 8 bits: the library also rounds activations, the heads do not."""

MAX_ROUNDING = 3.0
"""In 16 bits, how many times the stock model's distance from float32 a circuit's may be."""

ROUNDING_WARNING = 0.05
"""Warn if the stock model's distance from float32 is above this fraction of the logits."""

CHECK_LENGTH = 24
"""Number of tokens of the random prompts of `verify_parity`."""


class _Logits(NamedTuple):
    """Logits, [predicted, vocabulary] each, of the stock model and of circuits."""

    clean: Tensor
    corrupted: Tensor
    full: Tensor  # all gates 1: should equal `clean`
    empty: Tensor  # all gates 0: should equal `corrupted`


@torch.no_grad()
def verify_parity(model: CircuitModel, batch: Batch | None = None) -> None:
    """Check that gates of 1 give the full model, and gates of 0 the corrupted prompt.

    Sliding windows are narrowed meanwhile, so that the prompts (by default random) exceed them.
    Raises ModelError if a weight is not finite, the logits differ, or roundings are too large.
    """
    if batch is None:
        length = min(CHECK_LENGTH, model.max_length)
        batch = random_batch(model, 2, length, predicted=length // 2)
    config = model.architecture.body.config
    dtype = next(model.architecture.body.parameters()).dtype
    quantization = getattr(config, "quantization_config", None)
    with _narrow_window(config):
        if quantization is not None:
            in_8_bits = getattr(quantization, "load_in_8bit", False)
            tolerance = TOLERANCE_8_BITS if in_8_bits else QUANTIZED_TOLERANCE[dtype]
            _check_function(model, _run(model, batch), tolerance)
            return
        with _in_float32(model):
            exact = _run(model, batch)
        _check_function(model, exact, TOLERANCE)
        if dtype != torch.float32:
            _check_rounding(model, exact, _run(model, batch))


def _run(model: CircuitModel, batch: Batch) -> _Logits:
    swapped = replace(batch, clean_ids=batch.corrupted_ids, corrupted_ids=batch.clean_ids)
    gates = torch.ones(model.graph.num_edges, device=model.device)
    clean, activations = model.run_pair(batch)
    corrupted, _ = model.run_pair(swapped)
    full = model.run_circuit(batch, gates, activations)
    empty = model.run_circuit(batch, 0 * gates, activations)
    model.release()
    return _Logits(clean, corrupted, full, empty)


def _check_function(model: CircuitModel, logits: _Logits, tolerance: float) -> None:
    """Compare a circuit with the stock model at both ends."""
    ends = [(logits.full, logits.clean, "Gates of 1 should give the full model")]
    if model.graph.embedding_writers:  # else the clean embeddings reach every reader
        meaning = "Gates of 0 should give the corrupted prompt"
        ends.append((logits.empty, logits.corrupted, meaning))
    for got, expected, meaning in ends:
        error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
        if not error <= tolerance:  # also catches NaN
            _check_finite(model)
            raise ModelError(
                f"parity check failed: {model.name} computes something that its family does not. "
                f"{meaning}, but logits differ by {error:.2g} of the largest (tolerance "
                f"{tolerance:g})"
            )


def _check_finite(model: CircuitModel) -> None:
    """Raise ModelError if a weight has NaN or infinities."""
    for part in (model.architecture.body, model.architecture.unembed):
        for name, weight in part.named_parameters():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise ModelError(
                    f"weight {name} of {model.name} has values that are not finite (NaN or "
                    "infinity); the file is damaged, or training has diverged"
                )


def _check_rounding(model: CircuitModel, exact: _Logits, rounded: _Logits) -> None:
    """Compare the distance of a circuit from float32 with the stock model's own."""
    dtype = str(rounded.clean.dtype).removeprefix("torch.")
    if not rounded.clean.isfinite().all():
        raise ModelError(
            f"the activations of {model.name} overflow in {dtype}: use model.dtype=float32"
            + (" or bfloat16" if dtype == "float16" else "")
        )
    scale = _rms(exact.clean).clamp(min=1e-9)
    stock = (_rms(rounded.clean - exact.clean) / scale).item()
    circuit = (_rms(rounded.full - exact.full) / scale).item()
    distances = f"{circuit:.2g} of the logits for the circuit, {stock:.2g} for the stock model"
    if not circuit <= MAX_ROUNDING * stock + torch.finfo(rounded.clean.dtype).eps:
        raise ModelError(
            f"{model.name} is rounded too much in {dtype}: with all edges open, the distance from "
            f"float32 is {distances}; use model.dtype=float32"
        )
    if stock > ROUNDING_WARNING:
        log.warning(
            f"{model.name} loses precision in {dtype} (on random tokens the distance from float32 "
            f"is {distances}), so small KLs are noise; model.dtype=float32 is exact"
        )


def _rms(logits: Tensor) -> Tensor:
    """Root mean square of logits, without each row's mean, which changes no probability."""
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()


@contextmanager
def _in_float32(model: CircuitModel) -> Iterator[None]:
    """Run in float32, with the weights of one layer at a time; the weights end as they were."""
    arch = model.architecture
    layers = [block.layer for block in arch.blocks]
    of_layers = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    outer = [t for part in (arch.body, arch.unembed) for t in _tensors(part)]
    with ExitStack() as stack:
        stack.callback(_cast([t for t in outer if id(t) not in of_layers]))
        restore: list[Callable[[], None]] = []
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(
                lambda layer, inputs: restore.append(_cast(_tensors(layer)))
            ))  # fmt: skip
            stack.enter_context(layer.register_forward_hook(
                lambda layer, inputs, output: restore.pop()()
            ))  # fmt: skip
        begin, end = model.begin_layer, model.end_layer
        model.begin_layer = lambda layer, x: restore.append(_cast(_tensors(layer)))
        model.end_layer = lambda layer, delta: restore.pop()()
        try:
            yield
        finally:
            model.begin_layer, model.end_layer = begin, end
            while restore:
                restore.pop()()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _cast(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Cast 16-bit tensors to float32 in place; returns a function that casts them back."""
    narrow = {id(t): t for t in tensors if t.dtype in (torch.bfloat16, torch.float16)}
    dtypes = [(tensor, tensor.dtype) for tensor in narrow.values()]
    for tensor in narrow.values():
        tensor.data = tensor.data.float()

    def restore() -> None:
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)

    return restore


@contextmanager
def _narrow_window(config: Any) -> Iterator[None]:
    """Narrow the sliding window of attention masks, if there is one."""
    window = getattr(config, "sliding_window", None)
    if window is not None:
        config.sliding_window = min(window, CHECK_LENGTH // 3)
    try:
        yield
    finally:
        if window is not None:
            config.sliding_window = window


def random_batch(model: CircuitModel, batch_size: int, length: int, *, predicted: int) -> Batch:
    """Pairs of random prompts of `length` tokens, the last `predicted` of which are predicted."""
    noise = torch.Generator().manual_seed(0)
    vocabulary = model.architecture.body.config.vocab_size
    ids = torch.randint(vocabulary, (2, batch_size, length), generator=noise).tolist()
    pairs = [Pair(tuple(a), tuple(b), tuple(a[:predicted])) for a, b in zip(*ids, strict=True)]
    return collate(pairs).to(model.device)
