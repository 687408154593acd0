"""Language models that can be run as circuits."""

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.models.load import (
    fuse,
    load_meta_model,
    load_model,
    load_tokenizer,
    pick_device,
    wrap_model,
)
from edgeprune.models.parity import random_batch, verify_parity

__all__ = [
    "CircuitModel",
    "fuse",
    "load_meta_model",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "random_batch",
    "verify_parity",
    "wrap_model",
]
