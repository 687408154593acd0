"""Loading models: Hugging Face loads supported families, and each model passes a parity check."""

import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.masking_utils import eager_mask
from transformers.utils import find_adapter_config_file, logging

from edgeprune.engine.architecture import PROBED
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.heads import attend, is_foldable
from edgeprune.errors import ModelError
from edgeprune.models import gguf, tracr
from edgeprune.models.gpt2 import GPT2
from edgeprune.models.llama import Llama
from edgeprune.models.parity import random_batch, verify_parity
from edgeprune.paths import EMBEDDED_MODEL

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
"""The model types that share Llama's block."""

FAMILIES = {"gpt2": GPT2, **dict.fromkeys(LLAMA_FAMILY, Llama)}
"""model_type -> architecture. Any other type is refused by name."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The supported dtypes by name."""

SAVED_SETTINGS = {"architectures", "dtype", "quantization_config", "torch_dtype",
                  "transformers_version"}  # fmt: skip
"""Fields of a configuration that say how the model was saved; not part of the fingerprint."""

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched yet."""

SOURCES = "give a folder with config.json and *.safetensors, a .gguf file, or a hub name"


AttentionInterface.register(PROBED, attend)
AttentionMaskInterface.register(PROBED, eager_mask)


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    attention: str = "auto",
    bits: int | None = None,
    fused: bool = False,
    embedding_writers: str = "all",
    split_kv_readers: bool = False,
    trust_remote_code: bool = False,
) -> CircuitModel:
    """Load a model of a supported family and check that it runs exactly as a circuit.

    Args:
        name_or_path: a hub name, a folder with safetensors weights, a .gguf file (its weights are
            expanded to `dtype`), `embedded` for the included small GPT-2, the folder of a Tracr
            model (see `tracr.py`), or `tracr/NAME` for an included one.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...; `meta`: no weights.
        dtype: dtype of weights and activations: `float32`, `bfloat16` or `float16`.
        attention: the library's attention implementation: `sdpa`, `eager`, ...; `auto` is `sdpa`,
            or `eager` for models with capped attention scores.
        bits: 4 or 8 to quantise the weights (bitsandbytes; Llama family).
        fused: whether to use Triton kernels, see `fuse`.
        embedding_writers, split_kv_readers: which embeddings are writers, and whether every query
            head has key and value readers of its own; see `Architecture.graph`.
        trust_remote_code: whether code that comes with the model may run.

    Raises ModelError if the model is not found, has no safetensors weights, is of an unsupported
    family, cannot have the dtype, bits or kernels, or fails the parity check.
    """
    device = device if device == "meta" else pick_device(device)
    if dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r} is not supported; choose {', '.join(DTYPES)}")
    batch, name = None, str(name_or_path)
    folder = tracr.find_folder(name)
    if folder is not None:
        _quantization(bits, "tracr")
        model = tracr.load(folder, embedding_writers=embedding_writers)
        model.architecture.body.to(device=device, dtype=DTYPES[dtype])
        batch = random_batch(model, 8, model.max_length, predicted=model.max_length)
    else:
        with _translate_errors(name):
            hf_model = _load_hf_model(
                name, device, DTYPES[dtype], attention, bits, trust_remote_code
            )
        tokenizer = load_tokenizer(name, trust_remote_code)
        model = wrap_model(
            hf_model, tokenizer, name=name, embedding_writers=embedding_writers,
            split_kv_readers=split_kv_readers,
        )  # fmt: skip
    if device != "meta":
        if fused:
            fuse(model)
        verify_parity(model, batch)
    return model


def load_meta_model(name_or_path: str | Path, **settings: Any) -> CircuitModel:
    """Load a model without weights, on the meta device, and its tokenizer; see `load_model`."""
    return load_model(name_or_path, device="meta", **settings)


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load only a model's tokenizer; arguments and errors as `load_model`."""
    folder = tracr.find_folder(name_or_path)
    if folder is not None:
        return tracr.TracrTokenizer(folder)
    with _translate_errors(str(name_or_path)):
        source = _find(str(name_or_path))
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*token*")):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer_config.json); copy these files "
            "into it, or save the model's with tokenizer.save_pretrained(FOLDER)"
        )
    with _translate_errors(str(name_or_path)):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(f"{name_or_path} has no fast tokenizer; it needs a tokenizer.json")
    return tokenizer


def wrap_model(
    hf_model: Any, tokenizer: Any = None, *, name: str = "model", **graph_settings: Any
) -> CircuitModel:
    """Freeze a loaded Hugging Face model, of a supported family, and wrap it as a circuit.

    `graph_settings` are those of `Architecture.graph`.
    """
    config = hf_model.config
    _check_family(config, name)
    hf_model.requires_grad_(False).eval()
    # Accumulate 16-bit products in float32. cuDNN attention plans each shape anew, and the plans
    # need not give the same bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    architecture = FAMILIES[config.model_type](hf_model)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", num_heads)
    counts = config.num_hidden_layers, num_heads, num_kv_heads
    graph = architecture.graph(*counts, **graph_settings)
    return CircuitModel(architecture, graph, tokenizer, name, _unusual_settings(config))


def fuse(model: CircuitModel) -> None:
    """Norm and project the heads' inputs with Triton kernels, which move less memory.

    Raises ModelError if the model is not in bfloat16 on a GPU, or has norms of another kind.
    """
    weight = next(model.architecture.body.parameters())
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16:
        raise ModelError(
            f"fused kernels need bfloat16 on a GPU, but {model.name} is in {weight.dtype} on "
            f"{weight.device.type}"
        )
    if find_spec("triton") is None:
        raise ModelError("fused kernels need the package triton; pip install triton")
    blocks = model.architecture.blocks
    if not all(is_foldable(block.attention_norm) for block in blocks):
        raise ModelError(f"fused kernels do not support the norms of {model.name}; omit fused=true")
    for block in blocks:
        block.fused = True


def pick_device(device: str) -> str:
    """Resolve `auto` to a GPU if any, else the CPU; ModelError for a device this machine lacks."""
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cuda", *devices, "cpu"] if devices else ["cpu"]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    device = "cpu" if device == "cpu:0" else device
    if device not in ("auto", *devices):
        raise ModelError(
            f"there is no device {device!r} on this machine; choose auto or {', '.join(devices)}"
        )
    return devices[0] if device == "auto" else device


def _load_hf_model(
    name: str,
    device: str,
    dtype: torch.dtype,
    attention: str,
    bits: int | None,
    trust_remote_code: bool,
) -> Any:
    """Load a model with the library; arguments as of `load_model`."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = _find(name)
    base = _adapter_base(source)
    config = AutoConfig.from_pretrained(base or source, trust_remote_code=trust_remote_code)
    _check_family(config, name)
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if is_capped and attention == "sdpa":
        raise ModelError("sdpa does not support this model's capped attention scores; use eager")
    if attention == "auto":
        attention = "eager" if is_capped else "sdpa"
    settings = {
        "dtype": dtype, "attn_implementation": attention, "trust_remote_code": trust_remote_code
    }  # fmt: skip
    quantization = _quantization(bits, config.model_type)
    if device == "meta":
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **settings)
    if name.endswith(".gguf"):
        if bits is not None:
            raise ModelError(f"a GGUF file is already quantised; omit bits={bits}")
        source = str(gguf.expanded(Path(name), dtype))
    settings |= {"device_map": device, "quantization_config": quantization, "use_safetensors": True}
    hf_model, report = AutoModelForCausalLM.from_pretrained(
        source, **settings, output_loading_info=True, ignore_mismatched_sizes=True
    )
    _check_complete(report, name)
    if base is not None:
        _merge_adapter(hf_model)
    for module in hf_model.modules():  # bitsandbytes would repack 4-bit weights for some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf_model


def _check_complete(report: dict[str, Any], name: str) -> None:
    """Raise ModelError if weights were left at random values, by the library's own report."""
    missing = sorted(report["missing_keys"])
    misshapen = sorted(str(key[0] if isinstance(key, tuple) else key)
                       for key in report["mismatched_keys"])  # fmt: skip
    for keys, problem in ((missing, "not in the checkpoint"), (misshapen, "of another shape")):
        if keys:
            more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
            unused = sorted(report["unexpected_keys"])
            hint = f"; it has {unused[0]}, which the model does not" if unused else ""
            raise ModelError(
                f"weights of {name} are {problem} and would be random: {', '.join(keys[:3])}{more}"
                f"{hint}; save the whole causal language model with save_pretrained"
            )


def _adapter_base(name: str) -> str | None:
    """The base model of a LoRA adapter: a name or the same folder. None without an adapter."""
    path = find_adapter_config_file(name)
    if path is None:
        return None
    if find_spec("peft") is None:
        raise ModelError(
            f"{name} has a LoRA adapter (adapter_config.json): pip install peft, which merges it "
            "into the model when it is loaded; or merge and save it, with "
            "PeftModel.merge_and_unload().save_pretrained(FOLDER)"
        )
    if (Path(name) / "config.json").exists():
        return name
    base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return _find(base)


def _merge_adapter(hf_model: nn.Module) -> None:
    """Replace the layers of a LoRA adapter by the layers they adapt, with the adapter added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(n, m) for n, m in hf_model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        hf_model.set_submodule(name, module.get_base_layer())


def _check_family(config: Any, name: str) -> None:
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model type {config.model_type!r} of {name} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )


def _unusual_settings(config: Any) -> dict[str, Any]:
    """The fields in which a configuration differs from its family's default."""
    default = type(config)().to_dict()
    unusual = {key: value for key, value in config.to_dict().items() if value != default.get(key)}
    return {k: v for k, v in unusual.items() if k not in SAVED_SETTINGS and not k.startswith("_")}


def _quantization(bits: int | None, model_type: str) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    if bits not in (4, 8):
        raise ModelError(f"weights in {bits} bits are not supported; give 4 or 8, or none")
    if model_type not in LLAMA_FAMILY:
        raise ModelError(f"weights in {bits} bits need a Llama-like model, got {model_type}")
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def _find(name: str) -> str:
    """The hub name or folder with a model's config and tokenizer; ModelError if there is none."""
    if name == "embedded":
        return str(EMBEDDED_MODEL)
    path, is_gguf = Path(name), name.endswith(".gguf")
    is_hub_name = len(path.parts) <= 2 and not name.startswith(("/", ".", "~")) and not is_gguf
    if not is_hub_name and not path.exists():
        raise ModelError(
            f"there is no {path}; {SOURCES}. If the model of a run has moved, add model=custom "
            "model.path=FOLDER"
        )
    return str(gguf.expanded(path)) if is_gguf else name


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise for missing or damaged files into a ModelError."""
    kinds = (OSError, ValueError, ImportError, KeyError, IndexError, struct.error, SafetensorError)
    try:
        yield
    except ModelError:
        raise
    except kinds as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = _damage(Path(name)) or f"{reason} ({SOURCES})"
        raise ModelError(f"cannot load model {name!r}: {advice}") from None


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a folder, or with one file; None if nothing was found."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file} is a Git LFS pointer, not the file itself; run: git lfs pull"
        if file.suffix == ".safetensors":
            try:
                safe_open(file, "pt")
            except SafetensorError as error:
                return f"{file} is damaged or cut off ({error}); download it again"
        if file.suffix == ".gguf" and find_spec("gguf") is not None:
            from gguf import GGUFReader

            try:
                GGUFReader(file)
            except Exception as error:  # depends on where the file ends
                return f"{file} is damaged or cut off ({error}); download it again"
    return None
