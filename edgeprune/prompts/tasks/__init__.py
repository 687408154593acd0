"""Tasks: each writes clean/corrupted prompts for the tokenizer at hand."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgeprune.errors import DataError
from edgeprune.prompts.encode import SPLITS, encode_pair
from edgeprune.prompts.tasks import (
    boolean_expressions,
    gendered_pronoun,
    greater_than,
    induction,
    ioi,
    ioi_t1,
)

TASKS: dict[str, Callable[[random.Random], dict]] = {
    "ioi": ioi.sample,
    "ioi_t1": ioi_t1.sample,
    "greater_than": greater_than.sample,
    "gendered_pronoun": gendered_pronoun.sample,
    "induction": induction.sample,
    "induction_list": induction.sample_list,
    "boolean_expressions_instruction": boolean_expressions.sample_instruction,
    "boolean_expressions_few_shot": boolean_expressions.sample_few_shot,
}
"""Name -> function which draws one example."""

FROM_MODEL = "tracr"
"""The task whose prompts come with the model, see `tracr.py`."""

PATIENCE = 2000
"""Give up after so many candidates in a row that cannot be used."""


@dataclass(frozen=True)
class Report:
    """What was written and what was left out.

    Attributes:
        written: examples by split.
        duplicates: candidates whose prompt had come before, or is corrupted in another split.
        misfits: candidates left out for this tokenizer, by reason.
    """

    written: dict[str, int]
    duplicates: int
    misfits: dict[str, int]

    def __str__(self) -> str:
        text = ", ".join(f"{count:,} {split}" for split, count in self.written.items())
        if self.misfits:
            number = sum(self.misfits.values())
            reason = next(iter(self.misfits))
            text += f"; skipped {number:,} that do not fit the tokenizer, for instance: {reason}"
        return text


def make_records(
    task: str, tokenizer: Any, sizes: Mapping[str, int], seed: int
) -> tuple[list[dict], Report]:
    """Draw a task's examples: the same for the same arguments, and no clean prompt twice.

    Nor is a clean prompt of one split a corrupted one of another.

    Args:
        task: one of `TASKS`.
        tokenizer: decides which examples can be used (see `encode_pair`).
        sizes: number of examples by split.
        seed: of the draw.

    Returns:
        The lines of a data file, and what was left out.

    Raises:
        ValueError: an unknown task or split, a negative size, fewer distinct prompts than asked
            for, or no example that fits the tokenizer.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose {', '.join(TASKS)}")
    for split, size in sizes.items():
        if split not in SPLITS or size < 0:
            raise ValueError(f"cannot make {size} examples of split {split!r}; give 0 or more of "
                             f"{', '.join(SPLITS)}")  # fmt: skip
    draw = TASKS[task]
    if task == "greater_than" and _in_several_tokens("45", tokenizer):
        draw = partial(draw, digits=1)
    if task.startswith("boolean_expressions") and _in_several_tokens("True", tokenizer):
        draw = partial(draw, short=True)
    rng = random.Random(f"{task}/{seed}")
    seen: set[str] = set()
    clean_in: dict[str, str] = {}  # prompt -> split
    corrupted_in: dict[str, set[str]] = defaultdict(set)
    misfits: Counter[str] = Counter()
    duplicates = 0
    records: list[dict] = []
    for split, size in sizes.items():
        count = unused = 0
        while count < size:
            record = draw(rng)
            prompt, other = (record[name].split("<predict>")[0] for name in ("clean", "corrupted"))
            unused += 1
            in_other_split = corrupted_in[prompt] - {split} or clean_in.get(other, split) != split
            if prompt in seen or in_other_split:
                duplicates += 1
            else:
                seen.add(prompt)
                try:
                    encode_pair(tokenizer, record)
                except DataError as error:
                    misfits[str(error)] += 1
                else:
                    records.append({**record, "split": split})
                    clean_in[prompt] = split
                    corrupted_in[other].add(split)
                    count += 1
                    unused = 0
            if unused > PATIENCE:
                raise ValueError(_exhausted(task, records, sizes, duplicates, misfits))
    written = {split: sizes[split] for split in sizes}
    return records, Report(written, duplicates, dict(misfits.most_common()))


def _in_several_tokens(word: str, tokenizer: Any) -> bool:
    return len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 1


def _exhausted(
    task: str, records: list, sizes: Mapping[str, int], duplicates: int, misfits: Counter[str]
) -> str:
    total = sum(sizes.values())
    text = f"task {task} yields only {len(records):,} of the {total:,} examples asked for"
    if sum(misfits.values()) > duplicates:
        reason, _ = misfits.most_common(1)[0]
        return f"{text}: the others do not fit this tokenizer, for instance: {reason}"
    return (
        f"{text}: it has no more distinct prompts. Ask for fewer (task.train, .validation, .test)"
    )
