"""Clean/corrupted prompts: JSONL -> pairs -> batches of token ids.

A line of the file is `{"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 =
<predict>5</predict>", "split": "train"}`, with `distractor` (a string or a list) and `answers` (a
list) where there are any. A line may also give token ids in place of text (see `encode_ids`).
Batches are padded on the right: under causal attention the padding
cannot reach the tokens before it, so no attention mask is needed.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import random
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import DataError, MisfitError, NoneUsableError

SPLITS = ("train", "validation", "test")
FIELDS = (
    "clean", "corrupted", "split", "distractor", "answers", "clean_ids", "corrupted_ids",
    "target_ids", "target_values", "distractor_ids", "answer_ids",
)  # fmt: skip
"""What is read of a line; other fields are passed over."""
IN_IDS = {"distractor": "distractor_ids", "answers": "answer_ids"}
"""Fields of text, and those that say the same beside `clean_ids`."""
OPEN, CLOSE = "<predict>", "</predict>"


@dataclass(frozen=True)
class Pair:
    """One example as token ids.

    Attributes:
        clean_ids: the model's input on the clean prompt: the prompt and all but the last token of
            the prediction.
        corrupted_ids: as many tokens from the corrupted prompt.
        target_ids: the tokens to predict; the last `len(target_ids)` positions predict them.
        answer_ids, distractor_ids: the right and the wrong tokens at position `contrast`; empty
            without answers and distractors.
        contrast: which predicted token tells answer and distractor apart.
        text: the clean line, for people.
        target_values: the right numbers where the model's outputs are numbers, NaN for one that is
            not known; the token ids are 0 then, the only column.
        also_right: of answers that leave the target at another token than `contrast`: where, and
            the token, [(position, token)].
    """

    clean_ids: tuple[int, ...]
    corrupted_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    distractor_ids: tuple[int, ...] = ()
    contrast: int = 0
    text: str = ""
    target_values: tuple[float, ...] = ()
    also_right: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Padded token ids and where to look in them.

    Attributes:
        clean_ids, corrupted_ids: [batch, pos], padded on the right.
        lengths: [batch], tokens without padding.
        rows, cols: [predicted], batch and position indices of the tokens that predict.
        shares: [predicted], of the mean over an example's predicted tokens: 1 over their number.
        target_ids: [predicted], what they have to predict; -1 where nothing is known to be right.
        target_values: [predicted], the numbers to predict; NaN where there are none.
        contrasts: [batch], index into `predicted` of the token that tells answer and distractor
            apart.
        pairs: the examples, in order.
    """

    clean_ids: Tensor
    corrupted_ids: Tensor
    lengths: Tensor
    rows: Tensor
    cols: Tensor
    shares: Tensor
    target_ids: Tensor
    target_values: Tensor
    contrasts: Tensor
    pairs: tuple[Pair, ...]

    def map(self, function: Callable[..., Tensor], *others: Batch) -> Batch:
        """Apply a function to every tensor (and the others' at its place)."""
        mapped = {
            name: function(value, *(getattr(other, name) for other in others))
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **mapped)

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


# --------------------------------------------------------------------------------------- encoding


def encode_pair(tokenizer: Any, record: dict) -> Pair:
    """Tokenise one line of a data file.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        record: `clean`, `corrupted`, and optionally `distractor`, `answers`.

    Raises:
        DataError: a field is missing, misspelt or malformed, the clean and corrupted prompts differ
            in length, or no one token tells answers and distractors apart (see `_contrast`).
    """
    for name in record:
        meant = _misspelt(name)
        if meant is not None and meant not in record:
            raise DataError(
                f"unknown field {name!r}; did you mean {meant!r}? If not, choose another name"
            )
    is_ids = "clean_ids" in record
    for text, ids in IN_IDS.items():
        given, wanted = (text, ids) if is_ids else (ids, text)
        if record.get(given):
            line = "of token ids" if is_ids else "of text"
            raise DataError(f"field {given!r} is not for a line {line}; give {wanted!r} there")
    if is_ids:
        gives_numbers = getattr(tokenizer, "gives_numbers", False)
        wanted, other = "target_ids", "target_values"
        if gives_numbers:
            wanted, other = other, wanted
        if other in record:
            raise DataError(
                f"field {other!r} is not for this model, which gives "
                f"{'numbers' if gives_numbers else 'one of several answers'}; give {wanted!r}"
            )
        return encode_ids(record, len(tokenizer), getattr(tokenizer, "num_outputs", None))
    clean_prompt, gap, prediction = _split_text(record, "clean")
    corrupted_prompt, other_gap, corrupted_prediction = _split_text(record, "corrupted")
    prediction, corrupted_prediction = gap + prediction, other_gap + corrupted_prediction
    answers = _strings(record, "answers", gap, prediction)
    answers = [answer for answer in answers if answer.strip() != prediction.strip()]
    distractors = _strings(record, "distractor", gap, prediction)
    prompt, options = _tokenize(tokenizer, clean_prompt, [prediction, *answers, *distractors])
    target = options[0]
    other_prompt, (other_target,) = _tokenize(tokenizer, corrupted_prompt, [corrupted_prediction])
    if len(prompt) != len(other_prompt):
        raise MisfitError(
            f"clean and corrupted prompts have unequal lengths: {len(prompt)} and "
            f"{len(other_prompt)} tokens; every token of the one stands in for that of the other, "
            "so choose words with equally many tokens"
        )
    if len(target) > 1 and len(other_target) != len(target):
        raise MisfitError(
            f"clean and corrupted predictions have unequal lengths: {len(target)} and "
            f"{len(other_target)} tokens; choose predictions with equally many tokens"
        )
    split = 1 + len(answers)
    contrast, answer_ids, distractor_ids, also_right = _contrast(
        target, options[1:split], options[split:]
    )
    return Pair(
        clean_ids=tuple(prompt + target[:-1]),
        corrupted_ids=tuple(other_prompt + other_target[: len(target) - 1]),
        target_ids=tuple(target),
        answer_ids=answer_ids,
        distractor_ids=distractor_ids,
        contrast=contrast,
        text=record["clean"],
        also_right=also_right,
    )


@lru_cache(maxsize=256)
def _misspelt(name: str) -> str | None:
    """The field that one of another name stands for, if it looks like one."""
    near = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.8)
    return near[0] if near and name not in FIELDS else None


def encode_ids(record: dict, num_tokens: int, num_outputs: int | None = None) -> Pair:
    """A pair from a line that gives token ids.

    Args:
        record: `clean_ids` and `corrupted_ids`, as many; and what the last positions have to give:
            `target_ids` (-1 where nothing is known to be right) or `target_values` (null likewise).
            Beside `target_ids`, lists of tokens in place of the first of them: `distractor_ids`,
            which are wrong and give the logit difference, and `answer_ids`, which are right too.
        num_tokens: that the model knows; ids are below.
        num_outputs: columns of the model's output, and so the limit of `target_ids`; None: as many
            as tokens.

    Raises:
        DataError: a field is missing or malformed, or the lengths do not fit.
    """
    clean, corrupted = _numbers(record, "clean_ids", int), _numbers(record, "corrupted_ids", int)
    if len(clean) != len(corrupted):
        raise MisfitError(
            f"clean_ids and corrupted_ids have unequal lengths: {len(clean)} and {len(corrupted)}"
        )
    values: tuple = ()
    if "target_values" in record:
        values = _numbers(record, "target_values", (int, float, type(None)))
        if any(isinstance(value, int) and abs(value) >= 2**63 for value in values):
            raise DataError("field 'target_values' has whole numbers of more than 64 bits")
        values = tuple(math.nan if value is None else float(value) for value in values)
        targets = (0,) * len(values)
    else:
        targets = _numbers(record, "target_ids", int)
    if len(targets) > len(clean):
        raise DataError(
            f"{len(targets)} targets are more than the {len(clean)} tokens of clean_ids"
        )
    for field, ids in (("clean_ids", clean), ("corrupted_ids", corrupted)):
        if not all(0 <= number < num_tokens for number in ids):
            raise DataError(f"field {field!r} has ids outside of 0 to {num_tokens - 1}: {ids}")
    is_compiled = num_outputs is not None
    num_outputs = num_outputs if is_compiled else num_tokens
    if not all(-1 <= number < num_outputs for number in targets):
        raise DataError(
            f"field 'target_ids' has ids outside of 0 to {num_outputs - 1} (or -1, where nothing "
            f"is known to be right): {targets}"
        )
    answers, distractors = (
        () if record.get(field) in (None, []) else _numbers(record, field, int)
        for field in ("answer_ids", "distractor_ids")
    )
    if answers or distractors:
        if values or is_compiled:
            raise DataError("answer_ids and distractor_ids need logits, but outputs are values")
        for field, ids in (("answer_ids", answers), ("distractor_ids", distractors)):
            if not all(0 <= number < num_outputs for number in ids):
                raise DataError(f"field {field!r} has ids outside of 0 to {num_outputs - 1}: {ids}")
        right = {*answers, *targets[:1]} - {-1}
        if not right or right & set(distractors):
            raise DataError(
                f"the right tokens, of target_ids and answer_ids, are {sorted(right)}, and "
                f"distractor_ids {sorted(set(distractors))}; expected a right token or more, and "
                "distractors that are none of them"
            )
        answers, distractors = tuple(sorted(right)), tuple(sorted(set(distractors)))
    text = str(record.get("clean", " ".join(map(str, clean))))
    return Pair(clean, corrupted, targets, answers, distractors, 0, text, values)


def _numbers(record: dict, field: str, kind: Any) -> tuple:
    value = record.get(field)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    ):
        raise DataError(f"field {field!r} must be a list of numbers, got {value!r}")
    return tuple(value)


def _split_text(record: dict, field: str) -> tuple[str, str, str]:
    """'1 + 2 = <predict>3</predict>' -> ('1 + 2 =', ' ', '3').

    The space belongs to the prediction, since tokens begin with it.
    """
    text = record.get(field)
    if not isinstance(text, str):
        got = "nothing" if text is None else type(text).__name__
        raise DataError(f"field {field!r} is {got}, expected a string")
    _check_unicode(text, field)
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(OPEN) > text.index(CLOSE):
        raise DataError(
            f"field {field!r} needs exactly one {OPEN}...{CLOSE} around the text to predict, "
            f"got {_shorten(text)}"
        )
    prompt, rest = text.split(OPEN)
    prediction, tail = rest.split(CLOSE)
    if not prediction.strip():
        raise DataError(f"field {field!r} has nothing between {OPEN} and {CLOSE}")
    if not prompt.strip():
        raise DataError(f"field {field!r} has no prompt before {OPEN}")
    if tail.strip():
        raise DataError(f"field {field!r} goes on after {CLOSE}: {_shorten(tail)}; remove that")
    bare = prompt.rstrip()
    return bare, prompt[len(bare) :], prediction


def _strings(record: dict, field: str, gap: str, prediction: str) -> list[str]:
    """A field's strings, as they stand in place of the prediction.

    They begin with the space that the prediction begins with (the gap before its tag included),
    except that without a gap a space of their own stays.
    """
    value = record.get(field)
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f"field {field!r} must be a string or a list of strings, got {value!r}")
    for text in values:
        _check_unicode(text, field)
    space = prediction[: len(prediction) - len(prediction.lstrip())]
    return [v if v[0].isspace() and not gap else space + v.lstrip() for v in values]


def _check_unicode(text: str, field: str) -> None:
    """JSON can escape half a character (a lone surrogate), which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"field {field!r} has half a character (a lone surrogate): {_shorten(text)}"
        )


def _tokenize(
    tokenizer: Any, prompt: str, predictions: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of each prediction as it follows the prompt.

    The whole text is tokenised at once, as the model would see it, and cut where the prediction
    begins. Where that would cut a token in two ("17" + "45" read as "1745"), or where predictions
    disagree on the prompt's tokens, prompt and predictions are tokenised apart.

    Raises:
        MisfitError: tokenised apart, a prediction does not go on from the prompt.
    """
    whole = tokenizer([prompt + p for p in predictions], return_offsets_mapping=True)
    cuts = [
        _cut(ids, offsets, len(prompt))
        for ids, offsets in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
    ]
    if all(cut is not None and cut[0] == cuts[0][0] for cut in cuts):
        return cuts[0][0], [prediction for _, prediction in cuts]
    alone = tokenizer([prompt], return_offsets_mapping=True)
    ids, offsets = alone["input_ids"][0], alone["offset_mapping"][0]
    while ids and offsets[len(ids) - 1] == (0, 0):  # a closing special token spans no text
        ids = ids[:-1]
    texts = [_decode(tokenizer, one) for one in whole["input_ids"]]
    apart = tokenizer(predictions, add_special_tokens=False)["input_ids"]
    for number, prediction in enumerate(predictions):
        if _decode(tokenizer, ids + apart[number]) != texts[number]:
            apart[number] = _after_line_break(tokenizer, prediction)
            if _decode(tokenizer, ids + apart[number]) != texts[number]:
                raise MisfitError(
                    f"this tokenizer has no tokens for {_shorten(prediction)} as it goes on from "
                    "its prompt: by themselves they would read otherwise there, such as with a "
                    f"space before them; have {OPEN} follow a space or a whole word"
                )
    return ids, apart


def _after_line_break(tokenizer: Any, prediction: str) -> list[int]:
    """A prediction's tokens without what is put before every text; none if that is not to be had.

    SentencePiece's tokenizers (Llama 2's) have texts begin with a space, so that "ga" + "me" would
    read "ga me". After a line break, which joins no letters, they put none.
    """
    line = tokenizer(f"\n{prediction}", add_special_tokens=False, return_offsets_mapping=True)
    cut = _cut(line["input_ids"], line["offset_mapping"], 1)
    return [] if cut is None else cut[1]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _cut(
    ids: list[int], offsets: list[tuple[int, int]], place: int
) -> tuple[list[int], list[int]] | None:
    """The tokens before and from a character of the text; None if a token spans both."""
    first = next((i for i, (start, end) in enumerate(offsets) if end > max(start, place)), None)
    if first is None or offsets[first][0] < place:
        return None
    last = len(ids)
    while offsets[last - 1][0] == offsets[last - 1][1]:  # closing special tokens span no text
        last -= 1
    return ids[:first], ids[first:last]


def _contrast(
    target: list[int], answers: list[list[int]], distractors: list[list[int]]
) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Where and by which tokens the answers differ from the distractors.

    Tokens after the first are predicted from the target's, so an option can be compared with it at
    one token alone: where it leaves it. All distractors have to do so at the same one.

    Args:
        target: the tokens to predict.
        answers: others that are right.
        distractors: those that are wrong; without any, answers are told from one another.

    Returns:
        The `contrast`, `answer_ids`, `distractor_ids` and `also_right` of a `Pair`.

    Raises:
        DataError: a distractor never leaves the target.
        MisfitError: an answer is the beginning of the target, distractors leave the target at
            different tokens, or one leaves it by the same token as an answer.
    """
    rights = []
    for answer in answers:
        place = _leaves(target, answer)
        if place is not None:
            rights.append((place, answer[place]))
        elif len(answer) < len(target):
            raise MisfitError(
                f"one of the answers is the beginning of another, {len(answer)} of its "
                f"{len(target)} tokens, so what follows could not be judged; predict the shorter "
                "one"
            )
    places = {_leaves(target, distractor) for distractor in distractors}
    if None in places:
        raise DataError(
            "answers and distractors begin with the same tokens; choose distractors that differ "
            "from every answer"
        )
    if len(places) > 1:
        first, second, *_ = sorted(places)
        raise MisfitError(
            f"some distractors differ from the prediction in its token {first + 1}, others only "
            f"in token {second + 1}, but answers and distractors are compared at one token; leave "
            "one kind out, or have the prompt end later, so that all differ in the first token"
        )
    place = min(places or (one for one, _ in rights), default=0)
    right = {token for one, token in rights if one == place}
    if right or distractors:
        right.add(target[place])
    wrong = {distractor[place] for distractor in distractors}
    if right & wrong:
        raise MisfitError(
            f"answers and distractors share token {place + 1}, in which they are compared; choose "
            "distractors that differ there from every answer, or have the prompt end later"
        )
    others = sorted({other for other in rights if other[0] != place})
    return place, tuple(sorted(right)), tuple(sorted(wrong)), tuple(others)


def _leaves(target: list[int], option: list[int]) -> int | None:
    """The first token in which an option differs; None if one is the beginning of the other."""
    pairs = enumerate(zip(target, option, strict=False))
    return next((place for place, (a, b) in pairs if a != b), None)


def _shorten(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


# ------------------------------------------------------------------------------------------ files


class PairDataset(Sequence):
    """Pairs of one split, tokenised once; they lie in a temporary file, not in memory.

    Args:
        pairs: are written as they come.
        name: for people.
        skipped: one message for each line that did not fit the tokenizer.

    Attributes:
        has_splits: whether every line says which split it is of; one that does not is of all.
    """

    def __init__(self, pairs: Iterable[Pair], name: str, skipped: Sequence[str] = ()) -> None:
        self.name = name
        self.skipped = skipped
        self.has_splits = True
        self._file = TemporaryFile()  # noqa: SIM115 (it lasts as long as this)
        self._ends = array("q", [0])  # in bytes
        for pair in pairs:
            self._file.write(json.dumps(list(vars(pair).values())).encode())
            self._ends.append(self._file.tell())
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        start, end = self._ends[index : index + 2]
        content = os.pread(self._file.fileno(), end - start, start)
        values = json.loads(content, parse_constant=lambda _: math.nan)
        return Pair(*map(_tuples, values))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def iterate_records(path: Path | str) -> Iterator[dict]:
    """The objects of a JSONL file, one after another.

    Raises:
        DataError: no such file, a line that is no JSON object (with its number), or no line at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no data file {path}; give the path of a JSONL file")
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = _parse_line(line, f"{path}, line {number}")
                record["_where"] = f"{path}, line {number}"
                empty = False
                yield record
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
    if empty:
        raise DataError(f"{path} holds no lines; expected one JSON object a line")


def _parse_line(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: got a {type(record).__name__}, expected an object with 'clean' and "
            "'corrupted'"
        )
    return record


def load_dataset(
    path: Path | str, tokenizer: Any, split: str, max_length: int | None = None
) -> PairDataset:
    """Read one split of a JSONL file. Lines without a split are of every split.

    Lines whose clean and corrupted prompts differ in length for this tokenizer, or which do not fit
    it otherwise (`MisfitError`), are skipped, with one warning that counts them; malformed lines
    are errors.

    Args:
        path: the file.
        tokenizer: a fast Hugging Face tokenizer.
        split: `train`, `validation` or `test`.
        max_length: skip pairs with more tokens than this.

    Raises:
        DataError: as `iterate_records`; an unknown split; a malformed line, with its number.
        NoneUsableError: no line is left.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; choose {', '.join(SPLITS)}")
    found: set[str] = set()
    said: set[bool] = set()  # whether lines say their split
    skipped: list[str] = []

    def chosen() -> Iterator[dict]:
        for record in iterate_records(path):
            own = record.get("split", split)
            said.add("split" in record)
            if own not in SPLITS:
                raise DataError(
                    f"{record['_where']}: unknown split {own!r}; "
                    f"expected {', '.join(SPLITS)}, or no split at all"
                )
            found.add(own)
            if own == split:
                yield record

    pairs = _encode(chosen(), tokenizer, max_length, skipped)
    dataset = PairDataset(pairs, f"{Path(path).name} [{split}]", skipped)
    dataset.has_splits = said == {True}
    if said == {False}:
        dataset.name = f"{Path(path).name} [without splits]"
    if split not in found:
        raise DataError(f"{path} has no line of split {split!r}; it has {', '.join(sorted(found))}")
    if not dataset:
        raise _none_usable(skipped)
    if skipped:
        warnings.warn(
            f"{dataset.name}: left out {len(skipped)} of {len(dataset) + len(skipped)} examples, "
            f"for instance {skipped[0]}",
            stacklevel=2,
        )
    return dataset


def encode_records(
    records: Sequence[dict], tokenizer: Any, max_length: int | None = None
) -> tuple[list[Pair], list[str]]:
    """Tokenise records; returns the pairs and a message for each that does not fit.

    Raises:
        DataError: a malformed record.
        NoneUsableError: not one fits.
    """
    skipped: list[str] = []
    pairs = list(_encode(records, tokenizer, max_length, skipped))
    if not pairs:
        raise _none_usable(skipped)
    return pairs, skipped


def _encode(
    records: Iterable[dict], tokenizer: Any, max_length: int | None, skipped: list[str]
) -> Iterator[Pair]:
    """The pairs of records; adds a message to `skipped` for each that does not fit."""
    for number, record in enumerate(records, 1):
        where = record.get("_where", f"example {number}")
        try:
            pair = encode_pair(tokenizer, record)
        except MisfitError as error:
            skipped.append(f"{where}: {error}")
            continue
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if max_length is not None and len(pair.clean_ids) > max_length:
            skipped.append(
                f"{where}: {len(pair.clean_ids)} tokens are more than the {max_length} allowed"
            )
            continue
        yield pair


def _none_usable(skipped: list[str]) -> NoneUsableError:
    return NoneUsableError(f"none of the {len(skipped)} examples can be used. {skipped[0]}")


# ---------------------------------------------------------------------------------------- batches


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pad pairs to the longest and index their predicted tokens."""
    lengths = [len(pair.clean_ids) for pair in pairs]
    clean = torch.zeros(len(pairs), max(lengths), dtype=torch.long)  # padding is never looked at
    corrupted = torch.zeros_like(clean)
    rows, cols, shares, targets, values, contrasts = [], [], [], [], [], []
    for row, pair in enumerate(pairs):
        length = len(pair.clean_ids)
        clean[row, :length] = torch.tensor(pair.clean_ids)
        corrupted[row, :length] = torch.tensor(pair.corrupted_ids)
        contrasts.append(len(rows) + pair.contrast)
        count = len(pair.target_ids)
        rows += [row] * count
        cols += range(length - count, length)
        shares += [1 / count] * count
        targets += pair.target_ids
        values += pair.target_values or [math.nan] * count
    return Batch(
        clean_ids=clean,
        corrupted_ids=corrupted,
        lengths=torch.tensor(lengths),
        rows=torch.tensor(rows),
        cols=torch.tensor(cols),
        shares=torch.tensor(shares),
        target_ids=torch.tensor(targets),
        target_values=torch.tensor(values),
        contrasts=torch.tensor(contrasts),
        pairs=tuple(pairs),
    )


def iterate_batches(dataset: Sequence[Pair], batch_size: int) -> Iterator[Batch]:
    """All examples once, those of like length together (least padding), for evaluation.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i].clean_ids))
    for start in range(0, len(order), batch_size):
        yield collate([dataset[i] for i in order[start : start + batch_size]])


def training_pairs(dataset: Sequence[Pair], batch_size: int, seed: int, step: int) -> list[Pair]:
    """The batch of an optimisation step: a function of (seed, step) alone, so runs can resume.

    Each epoch is its own permutation of the data; what is left of it after the last whole batch is
    dropped, as the published trainer's loader does not (its last batch is short), so that every
    step weighs the same. A data set smaller than a batch is one batch.
    """
    size = min(batch_size, len(dataset))
    epoch, index = divmod(step, len(dataset) // size)
    order = _epoch_order(len(dataset), seed, epoch)
    return [dataset[i] for i in order[index * size : (index + 1) * size]]


@lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
