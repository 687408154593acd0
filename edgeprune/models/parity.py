"""The parity check: a circuit model must compute exactly what the untouched model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ModelError
from edgeprune.prompts import Batch, Pair, collate

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Per supported dtype, the largest accepted difference of logits, relative to the largest logit."""

TOLERANCE_8_BITS = 0.1
"""The same for weights in 8 bits: the library also rounds activations, the heads do not."""

CHECK_LENGTH = 24
"""Number of tokens of the random prompts of `verify_parity`."""


@torch.no_grad()
def verify_parity(model: CircuitModel, batch: Batch | None = None) -> None:
    """Check that gates of 1 give the full model, and gates of 0 the corrupted prompt.

    Sliding windows are narrowed meanwhile, so that the prompts (by default random) exceed them.
    Raises ModelError if logits differ by more than the tolerance.
    """
    if batch is None:
        batch = random_batch(model, 2, min(CHECK_LENGTH, model.max_length), predicted=4)
    swapped = replace(batch, clean_ids=batch.corrupted_ids, corrupted_ids=batch.clean_ids)
    gates = torch.ones(model.graph.num_edges, device=model.device)
    with _narrow_window(model.architecture.body.config):
        reference, corrupted = model.run_pair(batch)
        corrupted_logits, _ = model.run_pair(swapped)
        full = model.run_circuit(batch, gates, corrupted)
        empty = model.run_circuit(batch, 0 * gates, corrupted)
    _compare(model, full, reference, "Gates of 1 should give the full model")
    if model.graph.embedding_writers:  # else the clean embeddings reach every reader
        _compare(model, empty, corrupted_logits, "Gates of 0 should give the corrupted prompt")


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


def _compare(model: CircuitModel, got: Tensor, expected: Tensor, meaning: str) -> None:
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
    quantization = getattr(model.architecture.body.config, "quantization_config", None)
    in_8_bits = getattr(quantization, "load_in_8bit", False)
    tolerance = TOLERANCE_8_BITS if in_8_bits else TOLERANCE[got.dtype]
    if not error <= tolerance:  # also catches NaN
        raise ModelError(
            f"parity check failed: {model.name} computes something that its family does not. "
            f"{meaning}, but logits differ by {error:.2g} of the largest (tolerance {tolerance:g})"
        )


def random_batch(model: CircuitModel, batch_size: int, length: int, *, predicted: int) -> Batch:
    """Pairs of random prompts of `length` tokens, the last `predicted` of which are predicted."""
    noise = torch.Generator().manual_seed(0)
    vocabulary = model.architecture.body.config.vocab_size
    ids = torch.randint(vocabulary, (2, batch_size, length), generator=noise).tolist()
    pairs = [Pair(tuple(a), tuple(b), tuple(a[:predicted])) for a, b in zip(*ids, strict=True)]
    return collate(pairs).to(model.device)
