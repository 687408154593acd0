"""GGUF files, expanded once and kept: the library takes minutes for a large file, at every load."""

import hashlib
import logging
import os
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from edgeprune.errors import ModelError
from edgeprune.files import replace_folder

log = logging.getLogger("edgeprune")

MARKER = "config.json"
"""A file that every expanded folder has."""


def cache_folder() -> Path:
    """Where expanded files are kept: `EDGEPRUNE_CACHE`, or edgeprune/ in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EDGEPRUNE_CACHE") or user / "edgeprune")


def expanded(path: Path, dtype: torch.dtype | None = None) -> Path:
    """The folder with the config and tokenizer of a GGUF file or, given a dtype, with its weights.

    It is made at first use, and again if the file changes. Several processes wait for the first.

    Raises ModelError if the cache cannot be written, or what the library raises for damaged files.
    """
    status = path.stat()
    identity = (str(path.resolve()), status.st_size, status.st_mtime_ns, transformers.__version__)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    kept = cache_folder() / f"{path.stem}-{key}"
    folder = kept / ("tokenizer" if dtype is None else str(dtype).removeprefix("torch."))
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot keep the expanded {path.name} in {kept} ({error.strerror}); set the "
            "environment variable EDGEPRUNE_CACHE to a folder that can be written"
        ) from None
    with FileLock(kept / "lock"):
        if not (folder / MARKER).exists():
            with replace_folder(folder, MARKER) as new:
                _expand(path, dtype, new)
    return folder


def _expand(path: Path, dtype: torch.dtype | None, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if dtype is None:
        AutoConfig.from_pretrained(**source).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        return
    log.info(
        f"expanding {path.name}; its weights are kept in {cache_folder()} for the next "
        "time; delete this folder to free the space"
    )
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=dtype, quantization_config=quantization
    )
    model.save_pretrained(folder)
