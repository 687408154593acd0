"""Models of a given shape with random weights, for benchmarks: no download, no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ModelError
from edgeprune.models.load import LOAD_ERRORS, wrap_model

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "smollm2": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "codellama-13b": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "vocab_size": 32016,
    },
}  # fmt: skip
"""Name -> settings of the library's config class; what is not named has that class's default."""


def shape_settings(shape: str) -> dict[str, Any]:
    """A shape by name, or of a folder with a config.json.

    Raises:
        ModelError: neither.
    """
    if shape in SHAPES:
        return SHAPES[shape]
    if not Path(shape).exists():
        raise ModelError(f"unknown shape {shape!r}; give a folder, or one of {', '.join(SHAPES)}")
    try:
        return AutoConfig.from_pretrained(shape).to_dict()
    except LOAD_ERRORS as error:
        raise ModelError(f"cannot read a model's shape from {shape}: {error}") from None


def random_model(settings: dict[str, Any], *, device: str, dtype: str) -> CircuitModel:
    """A model with random weights.

    Args:
        settings: of the library's config class, with `model_type`.
        device: where it is made.
        dtype: of weights and activations.
    """
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    return wrap_model(model, name=config.model_type)
