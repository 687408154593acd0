"""Tracr programs: a compiled transformer's own inputs, each with several corrupted ones.

The prompts come with the model: `examples.jsonl` of its folder has every input. Those of one length
are taken, since PAD is never masked and known circuits are stated for one length.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORRUPTIONS = 4
"""Corrupted inputs of each input: the folder's own and random ones, every token another."""


def make_records(
    folder: Path,
    config: dict[str, Any],
    *,
    lengths: Sequence[int] | None = None,
    scored_from: int | None = None,
) -> list[dict]:
    """The lines of a data file (see `dataset.encode_ids`), the same for the same folder.

    Args:
        folder: of the model.
        config: its config.json.
        lengths: of the inputs, BOS not counted; None: the config's reference length.
        scored_from: first position whose output counts; position 0 is BOS. None: as the config
            says. What is right at BOS is not known; the full model's output there is what counts.

    Raises:
        ValueError: no input of such a length, or a damaged examples.jsonl.
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
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if not records:
        raise ValueError(f"{path} has no input of length {', '.join(map(str, lengths))}")
    return records


def _records_of(
    example: dict, config: dict[str, Any], tokens: list[int], scored_from: int
) -> list[dict]:
    """One line a corrupted input."""
    ids = example["input_ids"]
    unknown_at_bos = [None] if scored_from == 0 else []
    skipped = max(0, scored_from - 1)
    if config["output_type"] == "numerical":
        right = {"target_values": unknown_at_bos + example["model_output"][skipped:]}
    else:
        known = [-1 if column is None else column for column in example["output_ids"][skipped:]]
        right = {"target_ids": [-1 for _ in unknown_at_bos] + known}
    text = " ".join(map(str, example["tokens"]))
    answer = " ".join(map(str, example["output"][skipped:]))
    return [
        {
            "clean": f"{text} <predict>{answer}</predict>",
            "clean_ids": ids,
            "corrupted_ids": corrupted,
            **right,
        }
        for corrupted in _corruptions(example, tokens)
    ]


def _corruptions(example: dict, tokens: list[int]) -> list[list[int]]:
    """The folder's own first, then random ones; fewer where there are not so many."""
    bos, *rest = example["input_ids"]
    found = {tuple(example["corr_input_ids"]): None}
    draw = random.Random(json.dumps(example["input_ids"]))
    for _ in range(4 * CORRUPTIONS):
        if len(found) == CORRUPTIONS:
            break
        found[(bos, *(draw.choice([t for t in tokens if t != old]) for old in rest))] = None
    return [list(corrupted) for corrupted in found]
