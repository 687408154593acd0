"""Tasks: generators of clean/corrupted prompts that fit a given tokenizer.

A task is one module with a function that draws one example, and one line in `TASKS`.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edgeprune.errors import ConfigError, DataError
from edgeprune.prompts.encode import encode_pair
from edgeprune.prompts.schema import OPEN
from edgeprune.prompts.tasks import (
    boolean_expressions,
    gendered_pronoun,
    greater_than,
    induction,
    ioi,
    tracr,
    whereabouts,
)

TASKS: dict[str, Callable[[random.Random], dict]] = {
    "ioi": ioi.sample,
    "ioi_t1": partial(ioi.sample, templates=ioi.TEMPLATES[:1]),
    "greater_than": greater_than.sample,
    "gendered_pronoun": gendered_pronoun.sample,
    "induction": induction.sample,
    # Language models continue a list with commas with more confidence.
    "induction_list": partial(induction.sample, lengths=(10, 12), comma=","),
    "whereabouts": whereabouts.sample,
    "boolean_expressions_instruction": partial(boolean_expressions.sample, form="instruction"),
    "boolean_expressions_few_shot": partial(boolean_expressions.sample, form="few_shot"),
}
"""Maps a task's name to the function that draws one of its examples."""

ANSWERS = {
    "greater_than": "45",
    "boolean_expressions_instruction": "True",
    "boolean_expressions_few_shot": "True",
}
"""Maps a task to an answer; tokenizers that split it get the task's short form."""

MARKS: dict[str, Callable[[dict], dict[str, int]]] = {"ioi": ioi.marks, "ioi_t1": ioi.marks}
"""Maps a task to the function that finds where words of a clean prompt end, by their names."""

FROM_MODEL = "tracr"
"""Name of the task whose prompts come with a compiled model, see `tracr.py`."""

MAX_UNUSED = 2000
"""Give up after this many consecutive examples that cannot be used."""

log = logging.getLogger("edgeprune")


def generate_records(name: str, tokenizer: Any, sizes: Mapping[str, int], seed: int) -> list[dict]:
    """Generate the lines of a data file: the same for the same arguments.

    No clean prompt occurs twice, and no clean prompt of one split is a corrupted prompt of another.

    Args:
        name: one of `TASKS`, or `FROM_MODEL`, which ignores sizes and seed.
        tokenizer: decides which examples can be used (see `encode_pair`).
        sizes: number of examples per split.
        seed: seed of the random draws.

    Raises ConfigError for an unknown task, `FROM_MODEL` for another model, or too few usable
    examples; DataError if the compiled model's examples cannot be read.
    """
    if name == FROM_MODEL:
        if not hasattr(tokenizer, "folder"):
            raise ConfigError(f"task={FROM_MODEL} needs a Tracr model; choose another task")
        return tracr.make_records(tokenizer.folder, tokenizer.config)
    if name not in TASKS:
        raise ConfigError(
            f"unknown task {name!r}; choose {', '.join((*TASKS, FROM_MODEL))}, or use your own "
            "file: task=custom task.path=FILE"
        )
    draw = partial(TASKS[name], random.Random(f"{name}/{seed}"))
    if len(tokenizer(ANSWERS.get(name, ""), add_special_tokens=False)["input_ids"]) > 1:
        draw = partial(draw, short=True)
    records, misfits = _select(draw, tokenizer, sizes)
    counts = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    skipped = ""
    if misfits:
        skipped = f"; {len(misfits):,} others do not fit the tokenizer, for instance: {misfits[0]}"
    if len(records) < sum(sizes.values()):
        raise ConfigError(
            f"task {name} has only {len(records):,} distinct prompts, expected {counts}; request "
            f"fewer (task.train, task.validation, task.test){skipped}"
        )
    log.info(f"{name}: {counts} prompts{skipped}")
    return records


def _select(
    draw: Callable[[], dict], tokenizer: Any, sizes: Mapping[str, int]
) -> tuple[list[dict], list[str]]:
    """Draw usable examples for each split; return them and why others do not fit the tokenizer."""
    records, misfits, num_unused = [], [], 0
    seen: set[str] = set()  # clean prompts, used or not
    split_of: dict[str, str] = {}  # clean prompt -> its split
    splits_of_corrupted: dict[str, set[str]] = defaultdict(set)
    for split, size in sizes.items():
        wanted = len(records) + size
        while len(records) < wanted and num_unused <= MAX_UNUSED:
            num_unused += 1
            record = draw()
            clean, corrupted = (record[side].split(OPEN)[0] for side in ("clean", "corrupted"))
            leaks = splits_of_corrupted[clean] - {split} or split_of.get(corrupted, split) != split
            if clean in seen or leaks:
                continue
            seen.add(clean)
            try:
                encode_pair(tokenizer, record)
            except DataError as error:
                misfits.append(str(error))
                continue
            records.append({**record, "split": split})
            split_of[clean] = split
            splits_of_corrupted[corrupted].add(split)
            num_unused = 0
    return records, misfits
