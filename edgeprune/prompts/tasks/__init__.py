"""Tasks: generators of clean/corrupted prompts that fit a given tokenizer.

A task is one module with a function that draws one example, and one line in `TASKS`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edgeprune.errors import ConfigError, DataError
from edgeprune.prompts.encode import encode_pair
from edgeprune.prompts.schema import OPEN, SPLITS
from edgeprune.prompts.tasks import (
    boolean_expressions,
    gendered_pronoun,
    greater_than,
    induction,
    ioi,
    ioi_t1,
    tracr,
)

Draw = Callable[[random.Random], dict]

TASKS: dict[str, Draw] = {
    "ioi": ioi.sample,
    "ioi_t1": ioi_t1.sample,
    "greater_than": greater_than.sample,
    "gendered_pronoun": gendered_pronoun.sample,
    "induction": induction.sample,
    "induction_list": induction.sample_list,
    "boolean_expressions_instruction": boolean_expressions.sample_instruction,
    "boolean_expressions_few_shot": boolean_expressions.sample_few_shot,
}
"""Maps a task's name to the function that draws one of its examples."""

FROM_MODEL = "tracr"
"""Name of the task whose prompts come with a compiled model, see `tracr.py`."""

MAX_UNUSED = 2000
"""Give up after this many consecutive examples that cannot be used."""


def generate_records(
    name: str, tokenizer: Any, sizes: Mapping[str, int], seed: int
) -> tuple[list[dict], str | None]:
    """Generate the examples of a task: the same for the same arguments.

    No clean prompt occurs twice, and no clean prompt of one split is a corrupted prompt of another.

    Args:
        name: one of `TASKS`, or `FROM_MODEL`, which ignores sizes and seed.
        tokenizer: decides which examples can be used (see `encode_pair`).
        sizes: number of examples per split.
        seed: of the random draws.

    Returns:
        The lines of a data file, and a one-line report of what was generated and skipped; None for
        `FROM_MODEL`.

    Raises:
        ConfigError: unknown task or split, negative size, `FROM_MODEL` for another model, or fewer
            usable examples than requested.
        DataError: the compiled model's examples cannot be read.
    """
    if name == FROM_MODEL:
        if not hasattr(tokenizer, "folder"):
            raise ConfigError(
                f"task={FROM_MODEL} uses the prompts of a compiled Tracr model; choose another "
                "task for this model"
            )
        return tracr.make_records(tokenizer.folder, tokenizer.config), None
    if name not in TASKS:
        raise ConfigError(
            f"unknown task {name!r}; choose {', '.join((*TASKS, FROM_MODEL))}, or give a file of "
            "your own with task=custom task.path=FILE"
        )
    for split, size in sizes.items():
        if split not in SPLITS or size < 0:
            raise ConfigError(
                f"cannot generate {size} examples of split {split!r}; give 0 or more of "
                f"{', '.join(SPLITS)}"
            )
    draw, rng = _fit_to(tokenizer, name), random.Random(f"{name}/{seed}")
    selection = _Selection(tokenizer)
    for split, size in sizes.items():
        wanted, unused = len(selection.records) + size, 0
        while len(selection.records) < wanted:
            unused = 0 if selection.add(draw(rng), split) else unused + 1
            if unused > MAX_UNUSED:
                raise selection.exhausted(name, sum(sizes.values()))
    counts = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    return selection.records, counts + selection.skipped()


def _fit_to(tokenizer: Any, name: str) -> Draw:
    """Return the variant of a task whose answers are short for the tokenizer."""

    def is_split(word: str) -> bool:
        return len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 1

    draw = TASKS[name]
    if name == "greater_than" and is_split("45"):
        return partial(draw, digits=1)
    if name.startswith("boolean_expressions") and is_split("True"):
        return partial(draw, short=True)
    return draw


class _Selection:
    """Collects the examples that can be used, in any split without leaking into another.

    Attributes:
        records: the lines of a data file.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.records: list[dict] = []
        self._tokenizer = tokenizer
        self._seen: set[str] = set()  # clean prompts, used or not
        self._clean: dict[str, str] = {}  # clean prompt -> its split
        self._corrupted: dict[str, set[str]] = defaultdict(set)  # corrupted prompt -> its splits
        self._num_duplicates = 0
        self._misfits: Counter[str] = Counter()  # by reason

    def add(self, record: dict, split: str) -> bool:
        """Add an example to a split if it can be used; return whether it was added."""
        clean, corrupted = (record[side].split(OPEN)[0] for side in ("clean", "corrupted"))
        leaks = self._corrupted[clean] - {split} or self._clean.get(corrupted, split) != split
        if clean in self._seen or leaks:
            self._num_duplicates += 1
            return False
        self._seen.add(clean)
        try:
            encode_pair(self._tokenizer, record)
        except DataError as error:
            self._misfits[str(error)] += 1
            return False
        self.records.append({**record, "split": split})
        self._clean[clean] = split
        self._corrupted[corrupted].add(split)
        return True

    def skipped(self) -> str:
        """The end of the report: how many examples were skipped and a frequent reason, if any."""
        if not self._misfits:
            return ""
        reason, _ = self._misfits.most_common(1)[0]
        return (
            f"; skipped {self._misfits.total():,} that do not fit the tokenizer, for instance: "
            f"{reason}"
        )

    def exhausted(self, name: str, total: int) -> ConfigError:
        """The error for a task without enough usable examples."""
        text = f"task {name} yields only {len(self.records):,} of the {total:,} examples requested"
        if self._misfits.total() > self._num_duplicates:
            return ConfigError(text + self.skipped())
        return ConfigError(
            f"{text}: it has no more distinct prompts. Request fewer (task.train, task.validation, "
            "task.test)"
        )
