"""Tracr programs: a compiled transformer's own inputs, each with several corrupted inputs.

The prompts come with the model: `examples.jsonl` in its folder contains every input. Only inputs of
given lengths are used, since attention does not mask PAD and known circuits are stated for one
length.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import DataError

NUM_CORRUPTED = 4
"""Corrupted inputs per input: the folder's own and random ones, which differ in every token."""


def make_records(
    folder: Path,
    config: dict[str, Any],
    *,
    lengths: Sequence[int] | None = None,
    scored_from: int | None = None,
) -> list[dict]:
    """Return the lines of a data file (see `encode_ids`), the same for the same folder.

    Args:
        folder: the model's folder.
        config: its config.json.
        lengths: lengths of the inputs without BOS; None: the config's reference length.
        scored_from: first position whose output is compared; BOS is at position 0. None: as the
            config says. The right output at BOS is unknown: the full model's is the reference.

    Raises:
        DataError: examples.jsonl is missing or damaged, or has no input of these lengths.
    """
    lengths = [config["reference_seq_len"]] if lengths is None else lengths
    if scored_from is None:
        scored_from = 0 if config.get("reference_scores_bos") else 1
    path = folder / "examples.jsonl"
    try:
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        chosen = [example for example in examples if len(example["input_ids"]) - 1 in lengths]
        tokens = sorted(
            set(config["token_to_id"].values()) - {config["bos_id"], config.get("pad_id")}
        )
        records = [
            record for one in chosen for record in _records_of(one, config, tokens, scored_from)
        ]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if not records:
        raise DataError(f"{path} has no input of length {', '.join(map(str, lengths))}")
    return records


def _records_of(
    example: dict, config: dict[str, Any], tokens: list[int], scored_from: int
) -> list[dict]:
    """Return one line per corrupted input."""
    unknown_at_bos = [None] if scored_from == 0 else []
    skipped = max(0, scored_from - 1)
    if config["output_type"] == "numerical":
        targets = {"target_values": unknown_at_bos + example["model_output"][skipped:]}
    else:
        columns = unknown_at_bos + example["output_ids"][skipped:]
        targets = {"target_ids": [-1 if column is None else column for column in columns]}
    text = " ".join(map(str, example["tokens"]))
    answer = " ".join(map(str, example["output"][skipped:]))
    return [
        {
            "clean": f"{text} <predict>{answer}</predict>",
            "clean_ids": example["input_ids"],
            "corrupted_ids": corrupted,
            **targets,
        }
        for corrupted in _corruptions(example, tokens)
    ]


def _corruptions(example: dict, tokens: list[int]) -> list[list[int]]:
    """Return the folder's corrupted input and random ones; fewer if there are not enough."""
    bos, *rest = example["input_ids"]
    found = {tuple(example["corr_input_ids"]): None}
    draw = random.Random(json.dumps(example["input_ids"]))
    for _ in range(4 * NUM_CORRUPTED):
        if len(found) == NUM_CORRUPTED:
            break
        found[(bos, *(draw.choice([t for t in tokens if t != old]) for old in rest))] = None
    return [list(corrupted) for corrupted in found]
