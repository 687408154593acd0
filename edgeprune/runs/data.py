"""The prompts of a task: generated into a folder, or the user's file."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeprune.config import SPLITS, AblationConfig, TaskConfig
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError, NoneUsableError
from edgeprune.files import write_text
from edgeprune.prompts import PairDataset, load_dataset, read_records
from edgeprune.prompts.tasks import generate_records
from edgeprune.runs import layout

log = logging.getLogger("edgeprune")


def write_records(records: list[dict], path: Path) -> None:
    """Write a JSONL file."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def make_data(task: TaskConfig, tokenizer: Any, folder: Path) -> Path:
    """The task's JSONL file, generated into a folder if it is not the user's and not there yet."""
    if task.path is not None:
        return Path(task.path)
    path = folder / layout.DATA
    if not path.exists():
        write_records(generate_records(task.name, tokenizer, task.sizes, task.seed), path)
    return path


@contextmanager
def data_of(task: TaskConfig, tokenizer: Any) -> Iterator[Path]:
    """The task's JSONL file, where it is not a run's; what is generated is deleted at the end."""
    with TemporaryDirectory() as scratch:
        yield make_data(task, tokenizer, Path(scratch))


def load_pairs(path: Path, task: TaskConfig, model: CircuitModel, split: str) -> PairDataset:
    """The pairs of one split of a task's file whose prompts are short enough."""
    limit = min(model.max_length, task.max_length or model.max_length)
    pairs = load_dataset(path, model.tokenizer, split, max_length=limit)
    model.check_prompts(pairs)
    return pairs


def first_split(path: Path, wanted: str) -> str:
    """The wanted split if the file has it (or has no splits at all), else the first it has."""
    found = {record.get("split", wanted) for record in read_records(path)}
    return wanted if wanted in found else next(split for split in SPLITS if split in found)


def kind_of_prompts(split: str, pairs: PairDataset) -> str:
    """ "training" if a circuit may have been found on them, else the split."""
    return split if pairs.has_splits and split != "train" else "training"


def warn_if_none_held_out(pairs: PairDataset) -> None:
    """Warn that a circuit is measured on its training prompts."""
    if not pairs.has_splits:
        log.warning(
            f"{pairs.name} has lines without a split, so training prompts are measured; "
            'give each line "split": "train", "validation" or "test" to hold some out'
        )


def held_out_pairs(
    path: Path, task: TaskConfig, ablation: AblationConfig, model: CircuitModel, train: PairDataset
) -> tuple[str, PairDataset]:
    """The split on which a run is measured, and its pairs: validation, if the file has it.

    Called before training, so that unusable prompts are found at once: malformed ones, and those
    with positions that the mean ablation over the training prompts does not cover.
    """
    split = first_split(path, "validation")
    pairs = load_pairs(path, task, model, split)
    warn_if_none_held_out(pairs)
    if split == "train":
        log.warning(
            f"{path} has no line of split 'validation', so circuits are measured on their training "
            "prompts, on which they look better than they are"
        )
    elif train.has_splits:
        held_out = Counter((pair.clean_ids, pair.corrupted_ids) for pair in pairs)
        seen = sum(held_out.pop((pair.clean_ids, pair.corrupted_ids), 0) for pair in train)
        if seen:
            log.warning(f"{seen:,} of {len(pairs):,} {split} prompts are training prompts")
    if split != "test" and first_split(path, "test") == "test":
        try:
            load_pairs(path, task, model, "test")
        except NoneUsableError as error:
            log.warning(f"the run cannot be measured on its test prompts: {error}")
    if ablation.kind == "mean" and ablation.per_position:
        known, needed = (max(len(p.clean_ids) for p in those) for those in (train, pairs))
        if needed > known:
            raise ConfigError(
                f"a {split} prompt has {needed} tokens, but the mean of each position is "
                f"taken over training prompts of at most {known}; leave longer ones out "
                f"(task.max_length={known}), or set ablation.per_position=false"
            )
    return split, pairs
