"""Language models that can be run as circuits."""

from edgeprune.engine.circuit_model import Activations, CircuitModel, MeanActivations
from edgeprune.errors import ModelError
from edgeprune.models.load import (
    fuse,
    load_meta_model,
    load_model,
    load_tokenizer,
    pick_device,
    random_batch,
    verify_parity,
    wrap_model,
)

__all__ = [
    "Activations",
    "CircuitModel",
    "MeanActivations",
    "ModelError",
    "fuse",
    "load_meta_model",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "random_batch",
    "verify_parity",
    "wrap_model",
]
