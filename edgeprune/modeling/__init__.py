"""Language models that can be run as circuits."""

from edgeprune.modeling.load import (
    ModelError,
    fuse,
    load_model,
    load_tokenizer,
    model_shape,
    pick_device,
    random_batch,
    verify_parity,
    wrap_model,
)
from edgeprune.modeling.model import Activations, CircuitModel, MeanActivations

__all__ = [
    "Activations",
    "CircuitModel",
    "MeanActivations",
    "ModelError",
    "fuse",
    "load_model",
    "load_tokenizer",
    "model_shape",
    "pick_device",
    "random_batch",
    "verify_parity",
    "wrap_model",
]
