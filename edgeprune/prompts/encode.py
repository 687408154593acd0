"""Prompts as token ids: one record -> `Pair`, a JSONL file -> `PairDataset`."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgeprune.errors import DataError, MisfitError, NoneUsableError
from edgeprune.prompts.batch import Pair
from edgeprune.prompts.schema import (
    ID_OPTIONS,
    OPEN,
    SPLITS,
    check_fields,
    read_numbers,
    read_options,
    read_records,
    shorten,
    split_prompt,
)

log = logging.getLogger("edgeprune")

Ids = list[int]
"""Token ids of a text."""


class PairDataset(list[Pair]):
    """The tokenised pairs of one split.

    Attributes:
        name: file and split, for display.
        has_splits: whether every line of the file names its split.
        records: the lines of the file by their clean prompts, which are the pairs' texts.
    """

    def __init__(
        self, pairs: Iterable[Pair], name: str, has_splits: bool, records: Mapping[str, dict]
    ) -> None:
        super().__init__(pairs)
        self.name, self.has_splits, self.records = name, has_splits, records

    def __repr__(self) -> str:
        return f"PairDataset({self.name}: {len(self):,} pairs)"


def load_dataset(
    path: Path | str, tokenizer: Any, split: str, max_length: int | None = None
) -> PairDataset:
    """Read one split of a JSONL file. Lines without a split belong to every split.

    Lines that do not fit the tokenizer or have too many tokens are skipped with one warning.

    Args:
        path: a file in the format of `edgeprune.prompts.schema`.
        tokenizer: a fast Hugging Face tokenizer, or a `TracrTokenizer` for lines of token ids.
        split: one of `SPLITS`.
        max_length: maximum number of tokens.

    Raises DataError if the file cannot be read, a line is malformed, or none is of this split;
    NoneUsableError if none fits.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; choose {', '.join(SPLITS)}")
    records = read_records(path)
    found = {record.get("split") for record in records}
    chosen = [record for record in records if record.get("split") in (split, None)]
    if not chosen:
        raise DataError(f"{path} has no line of split {split!r}; it has {', '.join(sorted(found))}")
    name = f"{Path(path).name} [{'without splits' if found == {None} else split}]"
    pairs = encode_records(chosen, tokenizer, max_length)
    by_text = {record["clean"]: record for record in chosen if "clean" in record}
    return PairDataset(pairs, name, None not in found, by_text)


def encode_records(
    records: Iterable[dict], tokenizer: Any, max_length: int | None = None
) -> list[Pair]:
    """Tokenise records, skipping with one warning those that do not fit.

    Raises DataError if a record is malformed, NoneUsableError if none fits.
    """

    def encode(record: dict) -> Pair:
        pair = encode_pair(tokenizer, record)
        if max_length is not None and len(pair.clean_ids) > max_length:
            raise MisfitError(f"{len(pair.clean_ids)} tokens are more than {max_length}")
        return pair

    return keep_usable(records, encode)


def keep_usable(records: Iterable[dict], make: Callable[[dict], Any]) -> list:
    """What is made of each record, skipping with one warning those for which MisfitError is raised.

    Raises DataError, with the file and line, if it is raised for a record; NoneUsableError if all
    are skipped.
    """
    made, skipped = [], []
    for number, record in enumerate(records, 1):
        where = record.get("_where", f"example {number}")
        try:
            made.append(make(record))
        except MisfitError as error:
            skipped.append(f"{where}: {error}")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not made:
        raise NoneUsableError(f"none of the {len(skipped)} examples can be used. {skipped[0]}")
    if skipped:
        total = len(made) + len(skipped)
        log.warning(f"skipped {len(skipped)} of {total} examples, for instance {skipped[0]}")
    return made


def encode_pair(tokenizer: Any, record: dict) -> Pair:
    """Tokenise one line of a data file (see `edgeprune.prompts.schema`).

    Raises:
        DataError: a field is missing, misspelt or malformed.
        MisfitError: clean and corrupted prompts differ in length, or no single token distinguishes
            answers from distractors (see `_contrast`).
    """
    check_fields(record)
    return (_encode_ids if "clean_ids" in record else _encode_text)(tokenizer, record)


def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token within a prompt.

    Llama's tokenizers drop a space at the beginning of what they decode, so the token is decoded
    once and twice in a row, and the difference is its text.
    """
    once, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    return twice[len(once) :]


def marked_tokens(
    tokenizer: Any, record: dict, pair: Pair, ends: Mapping[str, int]
) -> dict[str, int]:
    """The positions of the tokens in which words of the clean prompt end.

    `ends` are the characters at which they end, by name. Empty where the tokens of the pair, which
    was made of the record, cannot be found in the text.
    """
    prompt, _ = split_prompt(record, "clean")
    tokens = _tokenizer_for(tokenizer, prompt)(prompt)
    last = [stop for _, stop in tokens["offset_mapping"]]
    found = {
        name: next(i for i, stop in enumerate(last) if stop >= end) for name, end in ends.items()
    }
    length = max(found.values(), default=0) + 1
    return found if tuple(tokens["input_ids"][:length]) == pair.clean_ids[:length] else {}


def _encode_text(tokenizer: Any, record: dict) -> Pair:
    clean, prediction = split_prompt(record, "clean")
    corrupted, other_prediction = split_prompt(record, "corrupted")
    answers = read_options(record, "answers", clean, prediction)
    answers = [answer for answer in answers if answer.strip() != prediction.strip()]
    distractors = read_options(record, "distractor", clean, prediction)
    predictions = [prediction, *answers, *distractors]
    clean_ids, (target, *options), joins = _tokenize(tokenizer, clean, predictions)
    corrupted_ids, (other_target,), _ = _tokenize(
        tokenizer, corrupted, [other_prediction], joins=joins
    )
    bos = tokenizer.bos_token_id
    if bos is not None and (clean_ids[0] == bos) != (corrupted_ids[0] == bos):
        raise MisfitError(f"only one of the prompts begins with {tokenizer.bos_token!r}")
    _check_same_length("prompts", clean_ids, corrupted_ids)
    if len(target) > 1:  # all but the last token are fed back
        _check_same_length("predictions", target, other_target)
    return Pair(
        clean_ids=tuple(clean_ids + target[:-1]),
        corrupted_ids=tuple(corrupted_ids + other_target[: len(target) - 1]),
        target_ids=tuple(target),
        text=record["clean"],
        **_contrast(target, options[: len(answers)], options[len(answers) :]),
    )


def _encode_ids(tokenizer: Any, record: dict) -> Pair:
    num_outputs = getattr(tokenizer, "num_outputs", None)  # None: one logit per token
    kinds = ("target_values", "target_ids")
    wanted, other = kinds if getattr(tokenizer, "gives_numbers", False) else kinds[::-1]
    if other in record:
        raise DataError(f"field {other!r} does not suit this model's outputs; give {wanted!r}")

    def read_ids(field: str, num_ids: int = len(tokenizer), lowest: int = 0) -> tuple[int, ...]:
        expected = f"ids from {lowest} to {num_ids - 1}"
        ids = range(lowest, num_ids)
        return read_numbers(record, field, lambda i: type(i) is int and i in ids, expected)

    clean, corrupted = read_ids("clean_ids"), read_ids("corrupted_ids")
    _check_same_length("prompts", clean, corrupted)
    values: tuple[float, ...] = ()
    if wanted == "target_values":
        numbers = read_numbers(record, wanted, _is_value, "numbers below 2^63, or null")
        values = tuple(math.nan if number is None else float(number) for number in numbers)
    targets = (0,) * len(values) or read_ids(wanted, num_outputs or len(tokenizer), lowest=-1)
    if len(targets) > len(clean):
        raise DataError(f"{len(targets)} targets are more than the {len(clean)} tokens of a prompt")
    answers, distractors = (
        () if record.get(field) in (None, []) else read_ids(field) for field in ID_OPTIONS
    )
    if answers or distractors:
        if num_outputs is not None:
            raise DataError(f"{' and '.join(ID_OPTIONS)} need a model with logits")
        answers = tuple(sorted({*answers, targets[0]} - {-1}))
        distractors = tuple(sorted(set(distractors)))
        if not answers or set(answers) & set(distractors):
            raise DataError(f"right tokens {answers} need other distractor_ids, not {distractors}")
    text = str(record.get("clean", " ".join(map(str, clean))))
    return Pair(clean, corrupted, targets, answers, distractors, 0, text, values)


def _is_value(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and not abs(value) >= 2**63)


def _check_same_length(what: str, clean: Sequence[int], corrupted: Sequence[int]) -> None:
    if len(clean) != len(corrupted):
        raise MisfitError(
            f"clean and corrupted {what} have {len(clean)} and {len(corrupted)} tokens; "
            "choose words with equally many tokens"
        )


def _tokenize(
    tokenizer: Any, prompt: str, predictions: list[str], joins: bool = False
) -> tuple[Ids, list[Ids], bool]:
    """Return the token ids of the prompt, and of each prediction as a continuation of it.

    The whole text is tokenised as the model would see it, and cut where the prediction begins, or
    before a space in front of it that the tokenizer joins to the word; the third result is whether
    it does. If that would split a token ("17" + "45" tokenised as "1", "74", "5"), or if
    predictions disagree on the prompt's tokens, prompt and predictions are tokenised separately. A
    text that begins with the tokenizer's BOS, as chat templates write it, gets no second one.

    Args:
        joins: whether to cut before the space in any case, as in the other prompt of the pair.
    """
    tokenize = _tokenizer_for(tokenizer, prompt)
    whole = tokenize([prompt + p for p in predictions])
    tokenized = list(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
    bare = prompt.removesuffix(" ")
    for place in [len(bare)] if joins else dict.fromkeys((len(prompt), len(bare))):
        cuts = [_cut(ids, offsets, place) for ids, offsets in tokenized]
        if all(cut is not None and cut[0] == cuts[0][0] for cut in cuts):
            return cuts[0][0], [prediction for _, prediction in cuts], place == len(bare)
    alone = tokenize(bare)
    ids = alone["input_ids"]
    while ids and alone["offset_mapping"][len(ids) - 1] == (0, 0):  # closing special tokens
        ids = ids[:-1]
    predictions = [prompt[len(bare) :] + prediction for prediction in predictions]
    separate = tokenizer(predictions, add_special_tokens=False)["input_ids"]
    for number, prediction in enumerate(predictions):
        text = _decode(tokenizer, whole["input_ids"][number])
        if _decode(tokenizer, ids + separate[number]) != text:
            separate[number] = _after_line_break(tokenizer, prediction)
        if _decode(tokenizer, ids + separate[number]) != text:
            raise MisfitError(
                f"the tokenizer cannot continue the prompt with {shorten(prediction)}; put {OPEN} "
                "after a space or a whole word"
            )
    return ids, separate, True


def _tokenizer_for(tokenizer: Any, prompt: str) -> Callable[..., Any]:
    """Tokenise with offsets, without a second BOS if the prompt begins with one."""
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return partial(tokenizer, add_special_tokens=not has_bos, return_offsets_mapping=True)


def _after_line_break(tokenizer: Any, prediction: str) -> Ids:
    """Tokenise a prediction without the space SentencePiece (Llama 2) adds; [] if impossible.

    It adds a space before every text ("ga" + "me" would become "ga me"), but not after a line
    break, which never merges with letters.
    """
    line = tokenizer(f"\n{prediction}", add_special_tokens=False, return_offsets_mapping=True)
    cut = _cut(line["input_ids"], line["offset_mapping"], 1)
    return [] if cut is None else cut[1]


def _decode(tokenizer: Any, ids: Ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _cut(ids: Ids, offsets: list[tuple[int, int]], place: int) -> tuple[Ids, Ids] | None:
    """Cut tokens at a character of the text; None if a token spans it."""
    with_text = [i for i, (start, end) in enumerate(offsets) if end > start]  # not special tokens
    first = next((i for i in with_text if offsets[i][1] > place), None)
    if first is None or offsets[first][0] < place:
        return None
    return ids[:first], ids[first : with_text[-1] + 1]


def _contrast(target: Ids, answers: list[Ids], distractors: list[Ids]) -> dict[str, Any]:
    """Return `contrast`, `answer_ids`, `distractor_ids` and `also_right` of a `Pair`.

    Each token after the first is predicted from the target's earlier tokens, so an option can be
    compared with the target only at the first token where they differ, the same for all
    distractors. Without distractors, the answers are compared with one another.
    """
    if any(len(answer) < len(target) and target[: len(answer)] == answer for answer in answers):
        raise MisfitError("an answer is the beginning of the prediction; predict the shorter one")
    places = {_first_difference(target, distractor) for distractor in distractors}
    if None in places:
        raise DataError("prediction and distractor begin with the same tokens; choose others")
    rights = {(p, a[p]) for a in answers if (p := _first_difference(target, a)) is not None}
    place = min(places or (place for place, _ in rights), default=0)
    right = {token for where, token in rights if where == place}
    if right or distractors:
        right.add(target[place])
    wrong = {distractor[place] for distractor in distractors}
    if len(places) > 1 or right & wrong:
        raise MisfitError(
            "every distractor must differ from the prediction first at the same token, and there "
            f"from every answer; got tokens {sorted(p + 1 for p in places)}; choose others"
        )
    return {
        "contrast": place,
        "answer_ids": tuple(sorted(right)),
        "distractor_ids": tuple(sorted(wrong)),
        "also_right": tuple(sorted(right for right in rights if right[0] != place)),
    }


def _first_difference(target: Ids, option: Ids) -> int | None:
    """Index of the first token that differs; None if one is a prefix of the other."""
    pairs = enumerate(zip(target, option, strict=False))
    return next((place for place, (a, b) in pairs if a != b), None)
