"""Loading: Hugging Face does it; we allow the families that come out exact, and check each."""

from __future__ import annotations

import importlib.util
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import is_bitsandbytes_available, is_gguf_available, logging

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.heads import is_foldable
from edgeprune.errors import ModelError
from edgeprune.models import gpt2, llama, tracr
from edgeprune.paths import EMBEDDED_MODEL, TRACR_MODELS
from edgeprune.prompts import Batch, Pair, collate

FAMILIES = {
    "gpt2": (gpt2.GPT2, gpt2.build_graph),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
        (llama.Llama, llama.build_graph),
    ),
}
"""model_type -> (architecture, graph builder). What is not here is refused by name."""

OF_THE_FILE = ("architectures", "dtype", "quantization_config", "torch_dtype",
               "transformers_version")  # fmt: skip
"""What a configuration says of how its model was saved, or its weights say themselves."""

LOAD_ERRORS = (OSError, ValueError, ImportError, KeyError, IndexError, struct.error)
"""What the libraries raise on files that are missing, damaged or of another kind."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of logits that `verify_parity` accepts, relative to the largest logit."""

TOLERANCE_8_BITS = 0.1
"""The same for weights in 8 bits: the library rounds activations to 8 bits too, heads' do not."""

CHECK_LENGTH = 24
"""Tokens of the random prompts of `verify_parity`."""


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    attention: str = "auto",
    bits: int | None = None,
    fused: bool = False,
    embedding_writers: bool = True,
    trust_remote_code: bool = False,
) -> CircuitModel:
    """Load a model of a supported family and check that it runs exactly as a circuit.

    Args:
        name_or_path: a hub name, a folder with safetensors weights, a .gguf file (its weights are
            expanded to `dtype`), `embedded` for the small GPT-2 that comes with the project, the
            folder of a Tracr model (see `tracr.py`), or `tracr/NAME` for one that comes with it.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: of weights and activations: `float32`, `bfloat16` or `float16`.
        attention: the library's attention implementation: `sdpa`, `eager`, ...; `auto` is `sdpa`,
            or `eager` for models that cap their scores, which `sdpa` cannot.
        bits: 4 or 8 to hold the weights in so many bits (bitsandbytes; Llama family).
        fused: whether Triton kernels norm and project what heads read, see `fuse`.
        embedding_writers: whether the embeddings are writers with edges of their own; without,
            they always flow.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: not found, no safetensors weights, a family or a dtype which is not supported,
            kernels that cannot be had, or a model that fails the parity check.
    """
    device = pick_device(device)
    folder = tracr.find_folder(name_or_path)
    if folder is not None:
        _check_bits(bits, "tracr")
        model = _load_tracr(folder, device, _dtype(dtype), embedding_writers)
        if fused:
            fuse(model)  # says why not
        return model
    source = _source(name_or_path)
    config = _load_config(name_or_path, trust_remote_code)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        quiet = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)
        modeling_gguf_pytorch_utils.tqdm = quiet  # it heeds nothing else
    quantization = GgufConfig(dequantize=True) if "gguf_file" in source else None
    if bits is not None:
        quantization = _in_bits(bits, config.model_type, quantization)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=_dtype(dtype),
            device_map=device,
            attn_implementation=_attention(attention, config, name_or_path),
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except LOAD_ERRORS as error:
        raise _cannot_load(name_or_path, error) from None
    for module in model.modules():  # bitsandbytes would repack 4-bit weights for some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = load_tokenizer(name_or_path, trust_remote_code)
    circuit_model = wrap_model(
        model, tokenizer, name=str(name_or_path), embedding_writers=embedding_writers
    )
    if fused:
        fuse(circuit_model)
    verify_parity(circuit_model)
    return circuit_model


def fuse(model: CircuitModel) -> None:
    """Have Triton kernels norm and project what heads read, which moves less memory.

    Raises:
        ModelError: the model is not on a GPU or not in bfloat16, its norms cannot be folded into
            the projections, or there is no Triton.
    """
    weight = next(model.architecture.body.parameters())
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16:
        raise ModelError(
            f"fused kernels are for bfloat16 on a GPU, but {model.name} is in "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        )
    blocks = model.architecture.blocks
    if not all(is_foldable(block.attention_norm) for block in blocks):
        raise ModelError(f"fused kernels cannot take the norms of {model.name}; leave fused out")
    if importlib.util.find_spec("triton") is None:
        raise ModelError("fused kernels need the package triton; pip install triton")
    for block in blocks:
        block.fused = True


def _dtype(name: str) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
    if name not in known:
        raise ModelError(f"dtype={name!r} is not supported; choose {', '.join(known)}")
    return known[name]


def pick_device(device: str) -> str:
    """The device meant; `auto` is a GPU if there is one.

    Raises:
        ModelError: this machine has no such device.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if gpus else "cpu"
    kind, _, number = device.partition(":")
    index = int(number) if number.isdecimal() else 0 if not number else -1
    there = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}.get(kind, 0)
    if not 0 <= index < there:
        raise ModelError(
            f"there is no device {device!r} on this machine, which has a CPU (cpu) and {gpus} GPUs "
            "(cuda, cuda:0, ...); auto takes a GPU if there is one"
        )
    return device


def load_meta_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    bits: int | None = None,
    embedding_writers: bool = True,
    trust_remote_code: bool = False,
) -> CircuitModel:
    """A model without its weights (on the meta device), with its tokenizer.

    Arguments and errors as `load_model`; of bits it is only checked that the model can have them.
    """
    folder = tracr.find_folder(name_or_path)
    if folder is not None:
        _check_bits(bits, "tracr")
        model = _build_tracr(folder, embedding_writers)
        model.architecture.body.to(device="meta", dtype=_dtype(dtype))
        return model
    config = _load_config(name_or_path, trust_remote_code)
    _check_bits(bits, config.model_type)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=_dtype(dtype),
                attn_implementation=_attention(attention, config, name_or_path),
                trust_remote_code=trust_remote_code,
            )
    except LOAD_ERRORS as error:
        raise _cannot_load(name_or_path, error) from None
    tokenizer = load_tokenizer(name_or_path, trust_remote_code)
    return wrap_model(model, tokenizer, name=str(name_or_path), embedding_writers=embedding_writers)


def _attention(wanted: str, config: Any, name_or_path: str | Path) -> str:
    caps = getattr(config, "attn_logit_softcapping", None) is not None
    if caps and wanted == "sdpa":
        raise ModelError(f"{name_or_path} caps its attention scores, which sdpa cannot; use eager")
    if wanted == "auto":
        return "eager" if caps else "sdpa"
    return wanted


def _load_config(name_or_path: str | Path, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            **_source(name_or_path), trust_remote_code=trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise _cannot_load(name_or_path, error) from None
    _check_family(config, name_or_path)
    return config


def _check_family(config: Any, name_or_path: str | Path) -> None:
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model type {config.model_type!r} of {name_or_path} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer alone; arguments and errors as `load_model`."""
    folder = tracr.find_folder(name_or_path)
    if folder is not None:
        return tracr.TracrTokenizer(folder, _tracr(tracr.read_config, folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **_source(name_or_path), trust_remote_code=trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise _cannot_load(name_or_path, error) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name_or_path} has no fast tokenizer (tokenizer.json), which is needed to tell which "
            "tokens a prediction covers"
        )
    return tokenizer


def wrap_model(
    model: Any, tokenizer: Any = None, *, name: str = "model", embedding_writers: bool = True
) -> CircuitModel:
    """Make a circuit model of a loaded Hugging Face model, which is frozen by it.

    Raises:
        ModelError: a family which is not supported.
    """
    _check_family(model.config, name)
    architecture, build_graph = FAMILIES[model.config.model_type]
    model.requires_grad_(False).eval()
    _prepare_gpus()
    graph = build_graph(model.config, embedding_writers=embedding_writers)
    return CircuitModel(architecture(model), graph, tokenizer, name, _own_settings(model.config))


def _own_settings(config: Any) -> dict[str, Any]:
    """Where a configuration is not its family's usual one, wherever and by what it was saved."""
    usual = type(config)().to_dict()
    return {
        key: value
        for key, value in config.to_dict().items()
        if value != usual.get(key) and key not in OF_THE_FILE and not key.startswith("_")
    }


def _prepare_gpus() -> None:
    """Have 16-bit products added up in float32, and leave out cuDNN's attention.

    That plans each shape anew, and need not give the same bits again.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def _load_tracr(
    folder: Path, device: str, dtype: torch.dtype, embedding_writers: bool
) -> CircuitModel:
    model = _build_tracr(folder, embedding_writers)
    model.architecture.body.to(device=device, dtype=dtype)
    verify_parity(model, collate(tracr.random_pairs(model.tokenizer.config)).to(device))
    return model


def _build_tracr(folder: Path, embedding_writers: bool) -> CircuitModel:
    architecture, config = _tracr(tracr.build, folder)
    graph = tracr.build_graph(config, embedding_writers=embedding_writers)
    tokenizer = tracr.TracrTokenizer(folder, config)
    return CircuitModel(architecture, graph, tokenizer, str(folder), config)


def _tracr(read: Callable[[Path], Any], folder: Path) -> Any:
    try:
        return read(folder)
    except tracr.TracrError as error:
        raise ModelError(f"cannot load model {str(folder)!r}: {error}") from None


def _source(name_or_path: str | Path) -> dict[str, str]:
    """Where a model is, as arguments of `from_pretrained`."""
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such file: {path}")
        if not is_gguf_available():
            raise ModelError(
                f"{path}: reading it needs two packages; pip install 'edgeprune[gguf]'"
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.parts[:1] == ("tracr",) and len(path.parts) == 2 and not path.exists():
        raise ModelError(
            f"no compiled model {path.name!r} comes with the project; choose "
            f"{', '.join(_tracr_models(TRACR_MODELS))}, or give the folder of your own: "
            "model=custom model.path=FOLDER"
        )
    is_other = path.is_dir() and not (path / "config.json").exists()
    if is_other and (models := _tracr_models(path)):
        raise ModelError(
            f"{path} is no model, but has several in it; choose {', '.join(models)}, as by "
            f"model.path={path / models[0]}"
        )
    is_hub_name = len(path.parts) <= 2 and not str(name_or_path).startswith(("/", ".", "~"))
    if not is_hub_name and not path.exists():
        raise ModelError(
            f"no folder {path}; give the folder of a model with config.json and *.safetensors, a "
            ".gguf file, or a hub name, for a run that was moved by model=custom model.path=FOLDER"
        )
    name = EMBEDDED_MODEL if str(name_or_path) == "embedded" else name_or_path
    return {"pretrained_model_name_or_path": str(name)}


def _tracr_models(folder: Path) -> list[str]:
    """Some of the compiled models that a folder has in it."""
    return [path.name for path in sorted(folder.iterdir()) if tracr.find_folder(path)][:10]


def _check_bits(bits: int | None, model_type: str) -> None:
    if bits not in (None, 4, 8):
        raise ModelError(f"weights in {bits} bits are not supported; give 4 or 8, or none")
    if bits is not None and model_type in ("gpt2", "tracr"):
        raise ModelError(
            f"weights in {bits} bits are for the Llama family, got model type {model_type}"
        )


def _in_bits(bits: int, model_type: str, other: GgufConfig | None) -> BitsAndBytesConfig:
    """The quantisation asked for, if this model can have it."""
    _check_bits(bits, model_type)
    if other is not None:
        raise ModelError(f"a GGUF file is quantised already; leave out the {bits} bits")
    if not is_bitsandbytes_available():
        raise ModelError(f"weights in {bits} bits need a package; pip install 'edgeprune[bits]'")
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def _cannot_load(name_or_path: str | Path, error: Exception) -> ModelError:
    if isinstance(error, ModelError):  # which says what to do already
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"cannot load model {str(name_or_path)!r}: {lines[0].removesuffix('from one of:').strip()} "
        "(give the folder of a model with config.json and *.safetensors, a .gguf file, "
        "or a hub name)"
    )


@torch.no_grad()
def verify_parity(model: CircuitModel, batch: Batch | None = None) -> None:
    """Check that all gates open give the model, all closed the corrupted prompt.

    By default on random prompts.
    Sliding windows are narrowed for the check, so that the prompts are longer.

    Raises:
        ModelError: the logits differ by more than `TOLERANCE`.
    """
    if batch is None:
        batch = random_batch(model, 2, min(CHECK_LENGTH, model.max_length), predicted=4)
    gates = torch.ones(model.graph.num_edges, device=model.device)
    with _narrow_window(model.architecture.body.config):
        reference, corrupted = model.run_pair(batch)
        of_corrupted, _ = model.run_pair(swap_prompts(batch))
        opened = model.run_circuit(batch, gates, corrupted)
        closed = model.run_circuit(batch, 0 * gates, corrupted)
    _compare(model, opened, reference, "all gates open should give the untouched model")
    if model.graph.embedding_writers:  # else the clean embeddings flow whatever the gates are
        meaning = "all gates closed should give the corrupted prompt"
        _compare(model, closed, of_corrupted, meaning)


@contextmanager
def _narrow_window(config: Any) -> Iterator[None]:
    """Where attention masks have a sliding window, one which the check's prompts exceed."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        yield
        return
    config.sliding_window = min(window, CHECK_LENGTH // 3)
    try:
        yield
    finally:
        config.sliding_window = window


def _compare(model: CircuitModel, got: Tensor, wanted: Tensor, meaning: str) -> None:
    error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()
    quantization = getattr(model.architecture.body.config, "quantization_config", None)
    in_8_bits = getattr(quantization, "load_in_8bit", False)
    tolerance = TOLERANCE_8_BITS if in_8_bits else TOLERANCE[got.dtype]
    if not error <= tolerance:  # also catches NaN
        raise ModelError(
            f"parity check failed for {model.name}: {meaning}, but the logits differ by "
            f"{error:.2g} of the largest (tolerated: {tolerance:g}). This model computes something "
            "which its family does not; it cannot be used"
        )


def random_batch(model: CircuitModel, batch_size: int, length: int, *, predicted: int) -> Batch:
    """Prompts of random tokens, of which the last `predicted` predict."""
    vocabulary = model.architecture.body.config.vocab_size
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, batch_size, length), generator=noise).tolist()
    pairs = [
        Pair(tuple(clean), tuple(corrupted), tuple(clean[:predicted]))
        for clean, corrupted in zip(*ids, strict=True)
    ]
    return collate(pairs).to(model.device)


def swap_prompts(batch: Batch) -> Batch:
    """The batch with clean and corrupted prompts exchanged."""
    return Batch(**{**vars(batch), "clean_ids": batch.corrupted_ids,
                    "corrupted_ids": batch.clean_ids})  # fmt: skip
