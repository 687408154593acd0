"""Checkpoints: masks and optimiser state as safetensors, written whole or not at all.

A checkpoint is a folder `step-00000500` with `masks.safetensors`, `optimizer.safetensors` and
`checkpoint.json`, which holds the step and the SHA-256 of the other two. It is written under
another name, flushed to disk and then renamed, so a folder of that name is complete unless the
disk lies.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune.errors import CheckpointError
from edgeprune.files import file_digest

MASKS, OPTIMIZER, CHECKPOINT_NOTE = "masks.safetensors", "optimizer.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from.

    Attributes:
        step: optimisation steps done.
        masks: log alphas, by parameter name.
        optimizer: multipliers and optimiser state, by name.
    """

    step: int
    masks: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[int]:
    """Steps of the run's checkpoints, ascending; unfinished ones are not among them."""
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-" + "[0-9]" * 8))


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint folder.

    Raises:
        CheckpointError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    target = checkpoint_dir(run_dir, checkpoint.step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for leftover in target.parent.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        save_file(_on_cpu(checkpoint.masks), temporary / MASKS)
        save_file(_on_cpu(checkpoint.optimizer), temporary / OPTIMIZER)
        note = {
            "step": checkpoint.step,
            "sha256": {name: file_digest(temporary / name) for name in (MASKS, OPTIMIZER)},
        }
        (temporary / CHECKPOINT_NOTE).write_text(json.dumps(note, indent=1) + "\n")
        for name in (MASKS, OPTIMIZER, CHECKPOINT_NOTE):
            with (temporary / name).open("rb+") as file:
                os.fsync(file.fileno())
        if target.exists():  # an unreadable one that is being replaced
            shutil.rmtree(target)
        temporary.rename(target)
        _sync_directory(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        remedy = "free some space" if _is_full(error) else "mend that"
        raise CheckpointError(
            f"cannot save the checkpoint of step {checkpoint.step} in {target.parent}: {error}. "
            f"Earlier checkpoints are intact; {remedy} and start again with resume=auto"
        ) from None
    return target


def _is_full(error: Exception) -> bool:
    """Whether a disk or what one may use of it is; safetensors says the number in words alone."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT)


def load_checkpoint(run_dir: Path, step: int) -> Checkpoint:
    """Read a checkpoint and verify its checksums.

    Raises:
        CheckpointError: missing, truncated or altered.
    """
    folder = checkpoint_dir(run_dir, step)
    if not folder.is_dir():
        have = ", ".join(map(str, list_checkpoints(run_dir))) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; it has: {have}")
    try:
        note = json.loads((folder / CHECKPOINT_NOTE).read_text())
        for name, digest in note["sha256"].items():
            if file_digest(folder / name) != digest:
                raise CheckpointError(f"checkpoint {folder} is damaged: {name} was altered or cut")
        if note["step"] != step:
            raise CheckpointError(f"checkpoint {folder} is damaged: it says step {note['step']}")
        return Checkpoint(step, load_file(folder / MASKS), load_file(folder / OPTIMIZER))
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {CHECKPOINT_NOTE}: {error}"
        ) from None


def load_latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is intact, and a message for each damaged one passed over."""
    damaged = []
    for step in reversed(list_checkpoints(run_dir)):
        try:
            return load_checkpoint(run_dir, step), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
