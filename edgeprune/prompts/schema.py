"""The JSONL format of clean/corrupted prompts: reading lines and checking their fields.

A line is `{"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>",
"split": "train"}`, optionally with `distractor` and `answers` (strings or lists of strings), and
`template` (a number or a string), which prompts of the same template share.

A line of token ids instead has `clean_ids` and `corrupted_ids`, of equal length, and for the last
positions either `target_ids` (-1 where the right token is unknown) or, for models that output
numbers, `target_values` (null where unknown). `answer_ids` and `distractor_ids` are right and wrong
alternatives to the first target.
"""

import difflib
import json
import re
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgeprune.config import SPLITS
from edgeprune.errors import DataError

TEXT_OPTIONS, ID_OPTIONS = ("answers", "distractor"), ("answer_ids", "distractor_ids")
"""Optional fields of lines of text, and the corresponding ones of lines of token ids."""
FIELDS = (
    "clean", "corrupted", "split", "clean_ids", "corrupted_ids", "target_ids", "target_values",
    "template", *TEXT_OPTIONS, *ID_OPTIONS,
)  # fmt: skip
"""The fields of a line; any other field is ignored."""
COMPRESSED = {
    "gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ", "zstd": b"\x28\xb5\x2f\xfd",
}  # fmt: skip
"""Compression programs, and how their files begin."""
OPEN, CLOSE = "<predict>", "</predict>"
"""Tags around the text to predict."""


def read_records(path: Path | str) -> list[dict]:
    """Read the objects of a JSONL file, each with its file and line as `_where`.

    A field that is null, as some libraries write a missing one, is left out.

    The records are shared by all who read the file; a file that has not changed is parsed once.

    Raises DataError if the file cannot be read, is empty, of another format, or has a line without
    an object or of an unknown split.
    """
    try:
        about = Path(path).stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return _parse(str(path), about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=1)
def _parse(path: str, mtime: int, size: int) -> list[dict]:
    """The records of a file of this time and size."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        records = [_parse_line(line, f"{path}, line {number}") for number, line in numbered]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, DataError) as error:
        _refuse_other_formats(Path(path))
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path} as a JSONL file in UTF-8: {error}") from None
    if not records:
        raise DataError(f"{path} has no lines; expected one JSON object per line")
    return records


def _parse_line(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object per line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: got {shorten(record)}, expected a JSON object")
    record = {name: value for name, value in record.items() if value is not None}
    if record.get("split", SPLITS[0]) not in SPLITS:
        raise DataError(f"{where}: got split {record['split']!r}, expected one of {SPLITS} or none")
    return {**record, "_where": where}


def _refuse_other_formats(path: Path) -> None:
    """Raise DataError, with a command that makes JSONL of it, for a file of another format: a
    compressed one, a table, or a single JSON document."""
    content = path.read_bytes()
    text, source = content.decode("utf-8-sig", "replace"), json.dumps(str(path), ensure_ascii=False)
    program = next((key for key, start in COMPRESSED.items() if content.startswith(start)), None)
    fields = re.split(r"([,;\t])", text.partition("\n")[0])  # and what separates them
    document = _parse_document(text)
    write = "[print(json.dumps(record)) for record in {}]"
    if program is not None:
        kind, command = f"compressed by {program}", f"{program} -dc {shlex.quote(str(path))}"
    elif content.startswith(b"PAR1"):
        table = f"pandas.read_parquet({source}).to_json(orient='records', lines=True)"
        kind, command = (
            "a Parquet table",
            f"python -c {shlex.quote(f'import pandas; print({table})')}",
        )
    elif len(fields) > 1 and {f.strip(' "\r') for f in fields} & {"clean", "clean_ids"}:
        table = f'open({source}, encoding="utf-8-sig"), delimiter={json.dumps(fields[1])}'
        rows = f"({{k: v for k, v in row.items() if v}} for row in csv.DictReader({table}))"
        kind, command = "a table (CSV)", _python(write.format(rows))
    elif isinstance(document, list):
        kind, command = "a JSON array", _python(write.format(f"json.load(open({source}))"))
    elif isinstance(document, dict) and "\n" in text.strip():
        kind = "a JSON object over several lines"
        command = _python(f"print(json.dumps(json.load(open({source}))))")
    else:
        return
    raise DataError(
        f"{path} is {kind}; expected JSONL, one JSON object per line. Convert it, for instance "
        f"with: {command} > NEW.jsonl"
    ) from None


def _python(code: str) -> str:
    """The shell command for a line of Python."""
    return f"python -c {shlex.quote(f'import csv, json; {code}')}"


def _parse_document(text: str) -> Any:
    """A whole text as JSON; None if it is not."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return None


def check_fields(record: dict) -> None:
    """Raise DataError for a row of MIB, for a misspelt field, and for one of lines of text in a
    line of token ids."""
    if "clean" not in record and any(name.endswith("_counterfactual") for name in record):
        raise DataError(
            "this is a row of the MIB benchmark; make prompts of such rows for a model's tokenizer "
            "with: edgeprune prepare task.path=FILE output=NEW.jsonl model.path=MODEL"
        )
    for name in record:
        meant = _misspelt(name)
        if meant is not None and meant not in record:
            raise DataError(f"unknown field {name!r} resembles {meant!r}; rename it")
    options = (ID_OPTIONS, TEXT_OPTIONS) if "clean_ids" in record else (TEXT_OPTIONS, ID_OPTIONS)
    for right, wrong in zip(*options, strict=True):
        if record.get(wrong):
            raise DataError(f"field {wrong!r} cannot be used in this line; give {right!r}")


@lru_cache(maxsize=256)
def _misspelt(name: str) -> str | None:
    """The field that an unknown name resembles, or None."""
    near = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.8)
    return near[0] if near and name not in FIELDS else None


def split_prompt(record: dict, field: str) -> tuple[str, str]:
    """Split '1 + 2 = <predict>3</predict>' into the prompt '1 + 2 = ' and the prediction '3'."""
    if field not in record:
        names = ", ".join(repr(name) for name in record if name != "_where")
        raise DataError(f"field {field!r} is missing; the line has {names}")
    text = record[field]
    prompt, _, rest = (text if isinstance(text, str) else "").partition(OPEN)
    prediction, close, tail = rest.partition(CLOSE)
    is_nested = CLOSE in prompt or OPEN in prediction
    if not (prompt.strip() and prediction.strip() and close) or tail.strip() or is_nested:
        expected = f"a prompt and, once and at the end, {OPEN}text to predict{CLOSE}"
        raise DataError(f"field {field!r} must be {expected}, got {shorten(text)}")
    _check_unicode(text, field)
    return prompt, prediction


def read_options(record: dict, field: str, prompt: str, prediction: str) -> list[str]:
    """Read the strings of `answers` or `distractor`, each an alternative to the prediction.

    Each begins with the whitespace of the prediction, or after a word with its own.
    """
    space = prediction[: len(prediction) - len(prediction.lstrip())]
    value = record.get(field)
    options = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise DataError(f"field {field!r} must be text or a list of texts, got {shorten(value)}")
    _check_unicode("".join(options), field)
    keeps_own = not prompt[-1].isspace()
    return [o if o[0].isspace() and keeps_own else space + o.lstrip() for o in options]


def _check_unicode(text: str, field: str) -> None:
    """Raise for a lone surrogate, which JSON can express but no tokenizer accepts."""
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"field {field!r} has half a character (a lone surrogate): {shorten(text)}")


def read_numbers(
    record: dict, field: str, is_valid: Callable[[Any], bool], expected: str
) -> tuple[Any, ...]:
    """Read a non-empty list of valid numbers, or raise DataError; `expected` describes them."""
    numbers = record.get(field)
    if not isinstance(numbers, list) or not numbers or not all(map(is_valid, numbers)):
        raise DataError(f"field {field!r} must be a list of {expected}, got {shorten(numbers)}")
    return tuple(numbers)


def shorten(value: object) -> str:
    """Show a value in an error message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
