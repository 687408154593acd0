"""Tracr programs: a compiled transformer's own inputs, each with several corrupted inputs.

The prompts come with the model: `examples.jsonl` in its folder contains every input. Only those of
given lengths are used: attention does not mask PAD, and a known circuit is stated for one length.
"""

import json
import random
from collections.abc import Iterator, Sequence
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
    """Return the lines of a data file of token ids, from a model's folder and its config.json.

    Args:
        lengths: lengths of the inputs without BOS; None: the config's reference length.
        scored_from: first position whose output is compared; None: as the config says. The right
            output at BOS, position 0, is unknown: the full model's is the reference.

    Raises DataError if examples.jsonl is missing or damaged, or has no input of these lengths.
    """
    lengths = [config["reference_seq_len"]] if lengths is None else lengths
    if scored_from is None:
        scored_from = 0 if config.get("reference_scores_bos") else 1
    path = folder / "examples.jsonl"
    try:
        examples = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        chosen = [example for example in examples if len(example["input_ids"]) - 1 in lengths]
        records = [r for example in chosen for r in _records_of(example, config, scored_from)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {path}: {type(error).__name__} {error}") from None
    if not records:
        raise DataError(f"{path} has no input of length {', '.join(map(str, lengths))}")
    return records


def _records_of(example: dict, config: dict[str, Any], scored_from: int) -> Iterator[dict]:
    """Yield one line per corrupted input."""
    if config["output_type"] == "numerical":
        targets = {"target_values": [None, *example["model_output"]][scored_from:]}
    else:
        targets = {"target_ids": [-1, *example["output_ids"]][scored_from:]}
    text = " ".join(map(str, example["tokens"]))
    answer = " ".join(map(str, example["output"][max(0, scored_from - 1) :]))
    for corrupted in _corruptions(example, config):
        yield {
            "clean": f"{text} <predict>{answer}</predict>",
            "clean_ids": example["input_ids"],
            "corrupted_ids": list(corrupted),
            **targets,
        }


def _corruptions(example: dict, config: dict[str, Any]) -> dict[tuple[int, ...], None]:
    """Return the folder's corrupted input and random ones; fewer if there are not enough."""
    bos, *rest = example["input_ids"]
    tokens = sorted({*config["token_to_id"].values()} - {config["bos_id"], config.get("pad_id")})
    draw = random.Random(json.dumps(example["input_ids"]))
    found = {tuple(example["corr_input_ids"]): None}  # a dict keeps the order
    for _ in range(4 * NUM_CORRUPTED):
        if len(found) < NUM_CORRUPTED:
            found[(bos, *(draw.choice([t for t in tokens if t != old]) for old in rest))] = None
    return found
