"""Rows of the Mechanistic Interpretability Benchmark's datasets as clean/corrupted prompts.

Mueller et al. 2025 (arXiv:2504.13151). Rows of ioi, arithmetic, copycolors_mcqa and arc have a
`prompt` and, for every kind of counterfactual, a column with another prompt and its answer:

    {"prompt": ..., "choices": ["Ann", "Bob"], "answerKey": 0, "metadata": {"subject": "Bob", ...},
     "s2_io_flip_counterfactual": {"prompt": ..., "choices": [...], "answerKey": 1}, ...}

As the benchmark does, the answer follows the prompt without a space but for names, the distractor
is the counterfactual's answer (for ioi the subject, whatever the counterfactual), and rows are left
out if the answers have different numbers of tokens (for ioi also the third name; for arithmetic,
more than one). In addition, prompt and counterfactual must have equally many tokens. The benchmark
looks only at the first token of an answer, where ours predict all of them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeprune.config import SPLITS
from edgeprune.errors import DataError, MisfitError
from edgeprune.prompts.encode import encode_pair, keep_usable
from edgeprune.prompts.schema import CLOSE, OPEN, read_records, shorten

SUFFIX = "_counterfactual"
"""The end of the names of columns with counterfactuals."""
DEFAULTS = tuple(name + SUFFIX for name in ("s2_io_flip", "symbol", "random"))
"""The benchmark's own choices; of rows with several of them, the first."""


def read_rows(path: Path | str) -> list[dict]:
    """Read the rows of a JSONL file, or of train.jsonl, validation.jsonl and test.jsonl in a
    folder, which then have their `split`.

    Raises DataError as `read_records` does, or if the folder has no such file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return read_records(path)
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    found = {split: file for split, file in files.items() if file.is_file()}
    if not found:
        raise DataError(f"{path} has none of {', '.join(file.name for file in files.values())}")
    return [{**row, "split": split} for split, file in found.items() for row in read_records(file)]


def make_records(
    rows: Iterable[dict], tokenizer: Any, sizes: Mapping[str, int], counterfactual: str | None
) -> list[dict]:
    """Turn rows into lines of a data file, with one warning for those that are left out.

    Args:
        rows: as read by `read_rows`.
        tokenizer: decides which rows can be used.
        sizes: how many lines of a split are kept, the first; of rows without a split, all are.
        counterfactual: the column with corrupted prompts; None: the benchmark's.

    Raises DataError for a malformed row, NoneUsableError if none can be used.
    """
    records = keep_usable(rows, lambda row: _make_record(row, tokenizer, counterfactual))
    kept = []
    for split in (None, *SPLITS):
        own = [record for record in records if record.get("split") == split]
        kept += own[: sizes[split]] if split else own
    return kept


def _make_record(row: dict, tokenizer: Any, counterfactual: str | None) -> dict:
    """The line of one row. Raises DataError if it is malformed, MisfitError if it is left out."""
    columns = [name for name in row if name.endswith(SUFFIX)]
    if "prompt" not in row:
        raise DataError(
            f"not a row of MIB: it has the fields {sorted(row.keys() - {'_where'})}, expected "
            f'"prompt" and columns such as {DEFAULTS[0]!r}; clean/corrupted prompts need no '
            "preparation"
        )
    column = counterfactual or next((name for name in DEFAULTS if name in row), None)
    changed = row.get(column) or {}
    if not isinstance(changed, dict):
        raise DataError(f"field {column!r} must be an object, got {shorten(changed)}")
    if changed.get("prompt") is None:
        raise MisfitError(f"no counterfactual {column or DEFAULTS}; the row has {columns}")
    answer, other = _answer(row), _answer(changed)
    names = row["metadata"] if isinstance(row.get("metadata"), dict) else {}
    wrong, third = other, answer
    if "subject" in names:  # ioi
        wrong, third = f" {names['subject']}", f" {names.get('random_c', names['subject'])}"
    if answer == wrong:
        raise MisfitError(f"prompt and counterfactual have the same answer {answer!r}")
    lengths = [
        len(ids) for ids in tokenizer([answer, wrong, third], add_special_tokens=False)["input_ids"]
    ]
    wanted = lengths[0] if "choices" in row else 1
    if {*lengths} != {wanted}:
        raise MisfitError(f"{answer!r}, {wrong!r}, {third!r} have {lengths} tokens, not {wanted}")
    record = {
        "clean": f"{row['prompt']}{OPEN}{answer}{CLOSE}",
        "corrupted": f"{changed['prompt']}{OPEN}{other}{CLOSE}", "distractor": wrong,
    }  # fmt: skip
    record |= {"split": row["split"]} if "split" in row else {}
    encode_pair(tokenizer, record)
    return record


def _answer(row: dict) -> str:
    """The text that follows a row's or counterfactual's prompt."""
    try:
        if "choices" not in row:  # arithmetic
            return str(row["label"])
        key, choices = row["answerKey"], row["choices"]
        is_labelled = isinstance(choices, dict)  # labels may be numbers
        return str(choices["label"][key]) if is_labelled else f" {choices[key]}"
    except (LookupError, TypeError) as error:
        found = {name: row[name] for name in ("choices", "answerKey", "label") if name in row}
        raise DataError(
            f"no answer in {shorten(found)} ({type(error).__name__}: {error}); expected a label, "
            "or choices and the index of one as answerKey"
        ) from None
