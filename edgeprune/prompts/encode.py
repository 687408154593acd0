"""Prompts as token ids: one record -> `Pair`, a JSONL file -> `PairDataset`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import DataError, MisfitError, NoneUsableError
from edgeprune.prompts.batch import Pair
from edgeprune.prompts.schema import (
    OPEN,
    SPLITS,
    check_fields,
    iterate_records,
    read_ids,
    read_numbers,
    read_options,
    shorten,
    split_prompt,
)

MAX_VALUE = 2**63
"""Target values must be below this in magnitude."""

log = logging.getLogger("edgeprune")

# ---------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True, eq=False)
class PairDataset(Sequence[Pair]):
    """The tokenised pairs of one split.

    Attributes:
        pairs: the pairs.
        name: file and split, for display.
        skipped: one message per line that does not fit the tokenizer or the maximum length.
        has_splits: whether every line of the file names its split; lines that do not belong to all
            splits.
    """

    pairs: Sequence[Pair]
    name: str
    skipped: Sequence[str] = ()
    has_splits: bool = True

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | slice) -> Any:
        return self.pairs[index]


def load_dataset(
    path: Path | str,
    tokenizer: Any,
    split: str,
    max_length: int | None = None,
    name: str | None = None,
) -> PairDataset:
    """Read one split of a JSONL file. Lines without a split belong to every split.

    Lines that do not fit the tokenizer (see `MisfitError`) or exceed the maximum length are skipped
    with one warning; malformed lines are errors.

    Args:
        path: the file.
        tokenizer: a fast Hugging Face tokenizer.
        split: `train`, `validation` or `test`.
        max_length: skip pairs with more tokens than this.
        name: the file's name in messages; None: its path.

    Raises:
        DataError: the file cannot be read, a line is malformed, or the split is unknown or empty.
        NoneUsableError: no line fits.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; choose {', '.join(SPLITS)}")
    found: set[str | None] = set()
    records = _of_split(iterate_records(path, name), split, found, name or str(path))
    pairs, skipped = encode_records(records, tokenizer, max_length)
    suffix = "without splits" if found == {None} else split
    dataset = PairDataset(pairs, f"{Path(path).name} [{suffix}]", skipped, None not in found)
    if skipped:
        log.warning(
            f"{dataset.name}: skipped {len(skipped)} of {len(pairs) + len(skipped)} examples, "
            f"for instance {skipped[0]}"
        )
    return dataset


def _of_split(
    records: Iterable[dict], split: str, found: set[str | None], name: str
) -> Iterator[dict]:
    """Yield the records of a split; add the splits of all records to `found`, None for none."""
    for record in records:
        own = record.get("split")
        if own not in SPLITS and "split" in record:
            raise DataError(
                f"{record['_where']}: unknown split {own!r}; "
                f"expected {', '.join(SPLITS)}, or no split at all"
            )
        found.add(own)
        if own in (split, None):
            yield record
    if not found & {split, None}:
        raise DataError(f"{name} has no line of split {split!r}; it has {', '.join(sorted(found))}")


def encode_records(
    records: Iterable[dict], tokenizer: Any, max_length: int | None = None
) -> tuple[list[Pair], list[str]]:
    """Tokenise records; return the pairs and one message per record that does not fit.

    Raises:
        DataError: a record is malformed.
        NoneUsableError: no record fits.
    """
    pairs, skipped = [], []
    for number, record in enumerate(records, 1):
        where = record.get("_where", f"example {number}")
        try:
            pair = encode_pair(tokenizer, record)
            if max_length is not None and len(pair.clean_ids) > max_length:
                num_tokens = len(pair.clean_ids)
                raise MisfitError(f"{num_tokens} tokens are more than the {max_length} allowed")
            pairs.append(pair)
        except MisfitError as error:
            skipped.append(f"{where}: {error}")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not pairs:
        raise NoneUsableError(f"none of the {len(skipped)} examples can be used. {skipped[0]}")
    return pairs, skipped


# -------------------------------------------------------------------------------------- one record


def encode_pair(tokenizer: Any, record: dict) -> Pair:
    """Tokenise one line of a data file.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        record: `clean`, `corrupted`, and optionally `distractor`, `answers`; or token ids, see
            `encode_ids`.

    Raises:
        DataError: a field is missing, misspelt or malformed.
        MisfitError: clean and corrupted prompts differ in length, or no single token distinguishes
            answers from distractors (see `_contrast`).
    """
    check_fields(record)
    if "clean_ids" in record:
        _check_targets(record, getattr(tokenizer, "gives_numbers", False))
        return encode_ids(record, len(tokenizer), getattr(tokenizer, "num_outputs", None))
    return _encode_text(tokenizer, record)


def _encode_text(tokenizer: Any, record: dict) -> Pair:
    clean, prediction = split_prompt(record, "clean")
    corrupted, other_prediction = split_prompt(record, "corrupted")
    answers = read_options(record, "answers", prediction)
    answers = [answer for answer in answers if answer.strip() != prediction.strip()]
    distractors = read_options(record, "distractor", prediction)
    clean_ids, (target, *options) = _tokenize(
        tokenizer, clean, [prediction, *answers, *distractors]
    )
    corrupted_ids, (other_target,) = _tokenize(tokenizer, corrupted, [other_prediction])
    _check_same_length("prompts", clean_ids, corrupted_ids)
    if len(target) > 1:
        _check_same_length("predictions", target, other_target)
    num_answers = len(answers)
    contrast, answer_ids, distractor_ids, also_right = _contrast(
        target, options[:num_answers], options[num_answers:]
    )
    return Pair(
        clean_ids=tuple(clean_ids + target[:-1]),
        corrupted_ids=tuple(corrupted_ids + other_target[: len(target) - 1]),
        target_ids=tuple(target),
        answer_ids=answer_ids,
        distractor_ids=distractor_ids,
        contrast=contrast,
        text=record["clean"],
        also_right=also_right,
    )


def _check_same_length(what: str, clean: Sequence[int], corrupted: Sequence[int]) -> None:
    if len(clean) != len(corrupted):
        raise MisfitError(
            f"clean and corrupted {what} have unequal lengths: {len(clean)} and {len(corrupted)} "
            "tokens; each token is replaced by the one at its position, so choose words with "
            "equally many tokens"
        )


# --------------------------------------------------------------------------------------- token ids


def encode_ids(record: dict, num_tokens: int, num_outputs: int | None = None) -> Pair:
    """Make a pair from a line of token ids.

    Args:
        record: `clean_ids` and `corrupted_ids`, of equal length, and either `target_ids` (-1 where
            the right token is unknown) or `target_values` (null where unknown), for the last
            positions. With `target_ids`, optionally `distractor_ids`, wrong alternatives to the
            first target for the logit difference, and `answer_ids`, right alternatives to it.
        num_tokens: size of the vocabulary; ids are below it.
        num_outputs: number of columns of the output of a model without logits, and so the limit of
            `target_ids`; None for models with one logit per token.

    Raises:
        DataError: a field is missing or malformed.
        MisfitError: clean and corrupted prompts differ in length.
    """
    clean = read_ids(record, "clean_ids", num_tokens)
    corrupted = read_ids(record, "corrupted_ids", num_tokens)
    _check_same_length("ids", clean, corrupted)
    values: tuple[float, ...] = ()
    if "target_values" in record:
        values = _read_values(record)
        targets = (0,) * len(values)
    else:
        targets = read_ids(record, "target_ids", num_outputs or num_tokens, lowest=-1)
    if len(targets) > len(clean):
        raise DataError(
            f"{len(targets)} targets are more than the {len(clean)} tokens of clean_ids"
        )
    answers, distractors = (
        read_ids(record, field, num_tokens) if record.get(field) not in (None, []) else ()
        for field in ("answer_ids", "distractor_ids")
    )
    if answers or distractors:
        if values or num_outputs is not None:
            raise DataError("answer_ids and distractor_ids need a model with logits")
        answers, distractors = _compare_first(targets, answers, distractors)
    text = str(record.get("clean", " ".join(map(str, clean))))
    return Pair(clean, corrupted, targets, answers, distractors, 0, text, values)


def _check_targets(record: dict, gives_numbers: bool) -> None:
    """Check that a line has the kind of targets which the model's outputs can be compared with."""
    wanted, other = "target_ids", "target_values"
    if gives_numbers:
        wanted, other = other, wanted
    if other in record:
        outputs = "numbers" if gives_numbers else "one of several answers"
        raise DataError(
            f"field {other!r} is not for this model, whose outputs are {outputs}; give {wanted!r}"
        )


def _read_values(record: dict) -> tuple[float, ...]:
    values = read_numbers(record, "target_values", (int, float, type(None)))
    if any(value is not None and abs(value) >= MAX_VALUE for value in values):
        raise DataError("field 'target_values' has numbers of 2^63 or more in magnitude")
    return tuple(math.nan if value is None else float(value) for value in values)


def _compare_first(
    targets: tuple[int, ...], answers: tuple[int, ...], distractors: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the right tokens (the first target and the answers) and the wrong ones, sorted."""
    right, wrong = {*answers, targets[0]} - {-1}, set(distractors)
    if not right or right & wrong:
        raise DataError(
            f"the right tokens, from target_ids and answer_ids, are {sorted(right)}, and "
            f"distractor_ids are {sorted(wrong)}; expected at least one right token, and no token "
            "in both"
        )
    return tuple(sorted(right)), tuple(sorted(wrong))


# ---------------------------------------------------------------------------------------- text


def _tokenize(
    tokenizer: Any, prompt: str, predictions: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of the prompt, and of each prediction as a continuation of it.

    The whole text is tokenised at once, as the model would see it, and cut where the prediction
    begins. If that would split a token ("17" + "45" tokenised as "1", "74", "5"), or if predictions
    disagree on the prompt's tokens, prompt and predictions are tokenised separately.

    Raises:
        MisfitError: tokenised separately, a prediction does not continue the prompt.
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
    separate = tokenizer(predictions, add_special_tokens=False)["input_ids"]
    for number, prediction in enumerate(predictions):
        if _decode(tokenizer, ids + separate[number]) != texts[number]:
            separate[number] = _after_line_break(tokenizer, prediction)
            if _decode(tokenizer, ids + separate[number]) != texts[number]:
                raise MisfitError(
                    f"this tokenizer has no tokens for {shorten(prediction)} as a continuation of "
                    "its prompt: its own tokens would decode to other text there, such as with a "
                    f"space before it; put {OPEN} after a space or a whole word"
                )
    return ids, separate


def _after_line_break(tokenizer: Any, prediction: str) -> list[int]:
    """Tokenise a prediction without the prefix added to every text; [] if that is impossible.

    SentencePiece tokenizers (Llama 2) put a space before every text, so that "ga" + "me" would be
    decoded as "ga me". They put none after a line break, which never merges with letters.
    """
    line = tokenizer(f"\n{prediction}", add_special_tokens=False, return_offsets_mapping=True)
    cut = _cut(line["input_ids"], line["offset_mapping"], 1)
    return [] if cut is None else cut[1]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _cut(
    ids: list[int], offsets: list[tuple[int, int]], place: int
) -> tuple[list[int], list[int]] | None:
    """Cut tokens at a character of the text; None if a token spans it."""
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
    """Find the token at which answers and distractors differ.

    Each token after the first is predicted from the target's earlier tokens, so an option can be
    compared with the target only at the first token where they differ. That has to be the same
    token for all distractors.

    Args:
        target: the tokens to predict.
        answers: other right continuations.
        distractors: wrong continuations; without any, the answers are compared with one another.

    Returns:
        `contrast`, `answer_ids`, `distractor_ids` and `also_right` of a `Pair`.

    Raises:
        DataError: a distractor never differs from the target.
        MisfitError: an answer is a prefix of the target, distractors first differ from the target
            at different tokens, or a distractor has the same token there as an answer.
    """
    rights = []
    for answer in answers:
        place = _first_difference(target, answer)
        if place is not None:
            rights.append((place, answer[place]))
        elif len(answer) < len(target):
            raise MisfitError(
                f"one of the answers is the beginning of another, {len(answer)} of its "
                f"{len(target)} tokens, so the remaining tokens could not be judged; predict the "
                "shorter one"
            )
    places = {_first_difference(target, distractor) for distractor in distractors}
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
            "one kind out, or end the prompt later, so that all differ in the first token"
        )
    place = min(places or (one for one, _ in rights), default=0)
    right = {token for one, token in rights if one == place}
    if right or distractors:
        right.add(target[place])
    wrong = {distractor[place] for distractor in distractors}
    if right & wrong:
        raise MisfitError(
            f"answers and distractors share token {place + 1}, at which they are compared; choose "
            "distractors that differ there from every answer, or end the prompt later"
        )
    others = sorted({other for other in rights if other[0] != place})
    return place, tuple(sorted(right)), tuple(sorted(wrong)), tuple(others)


def _first_difference(target: list[int], option: list[int]) -> int | None:
    """Index of the first token that differs; None if one is a prefix of the other."""
    pairs = enumerate(zip(target, option, strict=False))
    return next((place for place, (a, b) in pairs if a != b), None)
