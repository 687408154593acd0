"""A fingerprint of a model's weights, settings and tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.architecture import Architecture

CHUNK_SIZE = 2**22
"""Number of elements of a weight that are converted to int64 at a time."""


def fingerprint(architecture: Architecture, tokenizer: Any, settings: dict[str, Any]) -> str:
    """SHA-256 that changes with any weight, any setting (JSON values) and a fast tokenizer."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for changed_by_use in ("padding", "truncation"):
            content.pop(changed_by_use, None)
        digest.update(json.dumps(content, sort_keys=True).encode())
    weights = dict(architecture.body.named_parameters())
    weights |= {f"unembed.{name}": w for name, w in architecture.unembed.named_parameters()}
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        for sums in _bit_sums(weight.detach()):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _bit_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a weight's bit patterns, as integers, over its rows and over its columns.

    Integer sums are exact, so they are the same on every device, and any single edit changes them.
    The scales of weights in 4 or 8 bits are not included.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    num_rows = weight.shape[0] if weight.dim() else 1
    num_columns = weight.numel() // max(1, num_rows)
    bits = weight.view(integer[weight.element_size()]).reshape(num_rows, num_columns)
    chunks = bits.split(max(1, CHUNK_SIZE // max(1, num_columns)))
    over_rows = sum(chunk.sum(0, dtype=torch.int64) for chunk in chunks)  # [column]
    return over_rows, torch.cat([chunk.sum(1, dtype=torch.int64) for chunk in chunks])  # [row]
