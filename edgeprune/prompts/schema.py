"""The JSONL format of clean/corrupted prompts, and its checks.

A line is `{"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>",
"split": "train"}`, optionally with `distractor` (a string or a list of strings) and `answers` (a
list). Alternatively a line gives token ids, see `edgeprune.prompts.encode.encode_ids`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgeprune.errors import DataError

SPLITS = ("train", "validation", "test")
"""Names of the splits."""
FIELDS = (
    "clean", "corrupted", "split", "distractor", "answers", "clean_ids", "corrupted_ids",
    "target_ids", "target_values", "distractor_ids", "answer_ids",
)  # fmt: skip
"""The fields of a line; any other field is ignored."""
ID_FIELDS = {"distractor": "distractor_ids", "answers": "answer_ids"}
"""Maps each text field to the field with the same meaning in lines of token ids."""
OPEN, CLOSE = "<predict>", "</predict>"
"""Tags around the text to predict."""


def iterate_records(path: Path | str, name: str | None = None) -> Iterator[dict]:
    """Yield the objects of a JSONL file, each with its place for error messages as `_where`.

    Args:
        path: the file.
        name: the file's name in messages; None: its path.

    Raises:
        DataError: the file does not exist, is not UTF-8, has no lines, or has a line that is not a
            JSON object.
    """
    path = Path(path)
    name = name or str(path)
    if not path.is_file():
        raise DataError(f"no data file {path}; give the path of a JSONL file")
    is_empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    is_empty = False
                    where = f"{name}, line {number}"
                    yield {**_parse_line(line, where), "_where": where}
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}; save it as UTF-8") from None
    if is_empty:
        raise DataError(f"{name} has no lines; expected one JSON object per line")


def _parse_line(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object per line") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: got a {type(record).__name__}, expected an object with 'clean' and "
            "'corrupted'"
        )
    return record


def check_fields(record: dict) -> None:
    """Check the names of a record's fields.

    Raises:
        DataError: a field is misspelt, or belongs to lines of text in a line of token ids or vice
            versa.
    """
    for name in record:
        meant = _misspelt(name)
        if meant is not None and meant not in record:
            raise DataError(
                f"unknown field {name!r}; did you mean {meant!r}? If not, choose another name"
            )
    kind = "token ids" if "clean_ids" in record else "text"
    for text_field, id_field in ID_FIELDS.items():
        wrong, right = (text_field, id_field) if kind != "text" else (id_field, text_field)
        if record.get(wrong):
            raise DataError(f"field {wrong!r} cannot be used in a line of {kind}; give {right!r}")


@lru_cache(maxsize=256)
def _misspelt(name: str) -> str | None:
    """The field that an unknown name resembles, or None."""
    near = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.8)
    return near[0] if near and name not in FIELDS else None


def split_prompt(record: dict, field: str) -> tuple[str, str]:
    """Split a text into prompt and prediction: '1 + 2 = <predict>3</predict>' -> ('1 + 2 =', ' 3').

    Whitespace before the tag goes to the prediction, because tokens begin with their space.

    Raises:
        DataError: the field is missing or malformed.
    """
    text = record.get(field)
    if not isinstance(text, str):
        found = "missing" if text is None else f"a {type(text).__name__}"
        raise DataError(f"field {field!r} is {found}, expected a string")
    _check_unicode(text, field)
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(OPEN) > text.index(CLOSE):
        raise DataError(
            f"field {field!r} needs exactly one {OPEN}...{CLOSE} around the text to predict, "
            f"got {shorten(text)}"
        )
    prompt, rest = text.split(OPEN)
    prediction, tail = rest.split(CLOSE)
    if not prediction.strip():
        raise DataError(f"field {field!r} has nothing between {OPEN} and {CLOSE}")
    if not prompt.strip():
        raise DataError(f"field {field!r} has no prompt before {OPEN}")
    if tail.strip():
        raise DataError(f"field {field!r} continues after {CLOSE}: {shorten(tail)}; remove that")
    bare = prompt.rstrip()
    return bare, prompt[len(bare) :] + prediction


def read_options(record: dict, field: str, prediction: str) -> list[str]:
    """Read the strings of `answers` or `distractor`, to be put in place of the prediction.

    Each begins with the same whitespace as the prediction, except that a string keeps its own
    whitespace if the prompt has none before its tag.

    Args:
        record: a line with a valid `clean`.
        field: `answers` or `distractor`.
        prediction: of the clean prompt, from `split_prompt`.

    Raises:
        DataError: the field is not a string or list of non-empty strings.
    """
    value = record.get(field)
    if value is None:
        return []
    options = [value] if isinstance(value, str) else value
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise DataError(f"field {field!r} must be a string or a list of strings, got {value!r}")
    for option in options:
        _check_unicode(option, field)
    has_gap = record["clean"].split(OPEN)[0][-1].isspace()
    space = prediction[: len(prediction) - len(prediction.lstrip())]
    return [o if o[0].isspace() and not has_gap else space + o.lstrip() for o in options]


def read_numbers(record: dict, field: str, kind: Any = int) -> tuple:
    """Read a field that is a non-empty list of numbers.

    Raises:
        DataError: it is not one.
    """
    value = record.get(field)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    ):
        raise DataError(f"field {field!r} must be a list of numbers, got {value!r}")
    return tuple(value)


def read_ids(record: dict, field: str, limit: int, lowest: int = 0) -> tuple[int, ...]:
    """Read a field that is a non-empty list of ids in `lowest` to `limit` - 1.

    Raises:
        DataError: it is not one.
    """
    ids = read_numbers(record, field)
    if not all(lowest <= number < limit for number in ids):
        unknown = " (or -1 for an unknown target)" if lowest < 0 else ""
        raise DataError(f"field {field!r} has ids outside of 0 to {limit - 1}{unknown}: {ids}")
    return ids


def _check_unicode(text: str, field: str) -> None:
    """Raise for a lone surrogate, which JSON can express but no tokenizer accepts."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"field {field!r} has half a character (a lone surrogate): {shorten(text)}")


def shorten(text: str, limit: int = 60) -> str:
    """Quote a text for an error message, cut to `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
