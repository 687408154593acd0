"""Loading: Hugging Face does it; we allow the families that come out exact, and check each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from edgeprune.dataset import Batch, Pair, collate
from edgeprune.modeling import gpt2
from edgeprune.modeling.model import CircuitModel
from edgeprune.paths import EMBEDDED_MODEL

FAMILIES = {"gpt2": (gpt2.GPT2, gpt2.build_graph)}
"""model_type -> (architecture, graph builder). What is not here is refused by name."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of logits that `verify_parity` accepts, relative to the largest logit."""


class ModelError(ValueError):
    """A model which cannot be used; the message says why and what to do."""


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    attention: str = "sdpa",
    embedding_writers: bool = True,
    trust_remote_code: bool = False,
) -> CircuitModel:
    """Load a model of a supported family and check that it runs exactly as a circuit.

    Args:
        name_or_path: a hub name, a folder with safetensors weights, or `embedded` for the small
            GPT-2 that comes with the project.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: of weights and activations: `float32`, `bfloat16` or `float16`.
        attention: the library's attention implementation: `sdpa`, `eager`, ...
        embedding_writers: whether the embeddings are writers with edges of their own; without,
            they always flow.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: not found, no safetensors weights, a family which is not supported, or one that
            fails the parity check.
    """
    name = str(EMBEDDED_MODEL if name_or_path == "embedded" else name_or_path)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(_cannot_load(name, error)) from None
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model type {config.model_type!r} of {name} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        ).to(device)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_cannot_load(name, error)) from None
    tokenizer = load_tokenizer(name, trust_remote_code)
    circuit_model = wrap_model(
        model, tokenizer, name=str(name_or_path), embedding_writers=embedding_writers
    )
    verify_parity(circuit_model)
    return circuit_model


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer alone; arguments and errors as `load_model`."""
    name = str(EMBEDDED_MODEL if name_or_path == "embedded" else name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_cannot_load(name, error)) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name} has no fast tokenizer (tokenizer.json), which is needed to tell which tokens "
            "a prediction covers"
        )
    return tokenizer


def wrap_model(
    model: Any, tokenizer: Any = None, *, name: str = "model", embedding_writers: bool = True
) -> CircuitModel:
    """Make a circuit model of a loaded Hugging Face model, which is frozen by it."""
    architecture, build_graph = FAMILIES[model.config.model_type]
    model.requires_grad_(False).eval()
    graph = build_graph(model.config, embedding_writers=embedding_writers)
    return CircuitModel(architecture(model), graph, tokenizer, name)


def _cannot_load(name: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot load model {name!r}: {first_line} "
        "(give the folder of a model with config.json and *.safetensors, or a hub name)"
    )


@torch.no_grad()
def verify_parity(model: CircuitModel) -> None:
    """Check on random prompts that all gates open give the model, all closed the corrupted prompt.

    Raises:
        ModelError: the logits differ by more than `TOLERANCE`.
    """
    batch = _random_batch(model)
    reference, corrupted = model.run_pair(batch)
    of_corrupted, _ = model.run_pair(swap_prompts(batch))
    num_edges = model.graph.num_edges
    for gate, wanted, meaning in (
        (1.0, reference, "all gates open should give the untouched model"),
        (0.0, of_corrupted, "all gates closed should give the corrupted prompt"),
    ):
        gates = torch.full((num_edges,), gate, device=model.device)
        if gate == 0.0 and not model.graph.embedding_writers:
            continue  # the clean embeddings flow whatever the gates are
        _compare(model, model.run_circuit(batch, gates, corrupted), wanted, meaning)


def _compare(model: CircuitModel, got: Tensor, wanted: Tensor, meaning: str) -> None:
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    tolerance = TOLERANCE[got.dtype]
    if not error <= tolerance:  # also catches NaN
        raise ModelError(
            f"parity check failed for {model.name}: {meaning}, but the logits differ by "
            f"{error:.2g} of the largest (tolerated: {tolerance:g}). This model computes something "
            "which its family does not; it cannot be used"
        )


def _random_batch(model: CircuitModel) -> Batch:
    config = model.architecture.body.config
    length = min(24, config.max_position_embeddings)
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, 2, length), generator=noise).tolist()
    pairs = [
        Pair(tuple(clean), tuple(corrupted), tuple(clean[:4]), (), (), 0, "")
        for clean, corrupted in zip(*ids, strict=True)
    ]
    return collate(pairs).to(model.device)


def swap_prompts(batch: Batch) -> Batch:
    """The batch with clean and corrupted prompts exchanged."""
    return Batch(**{**vars(batch), "clean_ids": batch.corrupted_ids,
                    "corrupted_ids": batch.clean_ids})  # fmt: skip
