"""Checkpoints: the state of a method after a step, one safetensors file each.

`step-00000500.safetensors` holds the tensors of `Method.state_dict`; its metadata holds the step
and a SHA-256 over the names and bytes of all tensors.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.errors import CheckpointError
from edgeprune.files import write_atomically

log = logging.getLogger("edgeprune")


@dataclass(frozen=True)
class Checkpoint:
    """The number of optimisation steps done, and `Method.state_dict()` after them."""

    step: int
    state: Mapping[str, Tensor]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def list_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    return sorted(int(p.stem[5:]) for p in folder.glob("step-" + "[0-9]" * 8 + ".safetensors"))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; CheckpointError if the disk is full or read-only."""
    state = {name: x.detach().cpu().contiguous() for name, x in checkpoint.state.items()}
    metadata = {"checkpoint": _label(checkpoint.step, state)}  # one entry, to have one order
    path = checkpoint_path(folder, checkpoint.step)
    try:
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
    except OSError as error:
        hint = "Remove the cause and continue with resume=auto; earlier checkpoints are intact"
        raise CheckpointError(f"cannot save {path}: {error}. {hint}") from None


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read a checkpoint; CheckpointError if it is missing, truncated or altered."""
    path = checkpoint_path(folder, step)
    if not path.is_file():
        available = ", ".join(map(str, list_checkpoints(folder))) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; available: {available}")
    try:
        with safe_open(path, "pt") as file:
            label = (file.metadata() or {}).get("checkpoint")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None
    if label != _label(step, state):
        raise CheckpointError(f"checkpoint {path} is damaged: it was altered after it was written")
    return Checkpoint(step, state)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; None if there is none. Warns of damaged ones."""
    for step in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(folder, step)
        except CheckpointError as error:
            log.warning(f"{error}; using an earlier checkpoint")
    return None


def _label(step: int, state: Mapping[str, Tensor]) -> str:
    """The step and a digest of names and bytes of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + b"\0")
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    return f"step {step}, sha256 {digest.hexdigest()}"
