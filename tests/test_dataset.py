"""Data files: encoding, checks, splits, and batches."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace

import pytest
from conftest import random_pairs, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from edgeprune.errors import DataError, MisfitError, NoneUsableError
from edgeprune.prompts import (
    SPLITS,
    collate,
    draw_pairs,
    encode_pair,
    iterate_batches,
    load_dataset,
    read_records,
    token_text,
    training_pairs,
)
from edgeprune.runs.data import first_split

SPEC = {
    "clean": "1 + 2 = <predict>3</predict>",
    "corrupted": "1 + 4 = <predict>5</predict>",
    "split": "train",
}


def byte_tokenizer(merges: list[tuple[str, str]], begin: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the given merges; `begin` puts <s> before every text, as in Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", *alphabet, *("".join(merge) for merge in merges)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentencepiece_tokenizer(merges: list[str], kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's, which puts a space before every text, with the given merges."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzS0123456789.:"]
    pairs = [tuple(merge.split()) for merge in merges]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", *every_byte, *letters, *("".join(pair) for pair in pairs)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True)
    )
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        strip = [normalizers.Strip()] if kind == "stripping" else []
        tokenizer.normalizer = normalizers.Sequence([*strip, *steps])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def words(tokenizer, ids) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]


@pytest.mark.parametrize("option", ["4", " 4"])
@pytest.mark.parametrize("tag", [" <predict>", "<predict> "])
def test_the_space_before_a_prediction_belongs_to_it_and_to_the_options(option, tag):
    tokenizer = byte_tokenizer([("Ġ", sign) for sign in "+=2345"])
    clean, corrupted = (SPEC[key].replace(" <predict>", tag) for key in ("clean", "corrupted"))
    record = {"clean": clean, "corrupted": corrupted, "answers": [option], "distractor": "5"}
    pair = encode_pair(tokenizer, record)
    assert words(tokenizer, pair.clean_ids) == ["1", " +", " 2", " ="]
    assert words(tokenizer, pair.corrupted_ids) == ["1", " +", " 4", " ="]
    assert words(tokenizer, pair.target_ids) == [" 3"]
    assert words(tokenizer, pair.answer_ids) == [" 3", " 4"]
    assert words(tokenizer, pair.distractor_ids) == [" 5"]


def test_without_such_a_space_options_keep_their_own():
    tokenizer = byte_tokenizer([])
    bare = {"clean": "ab<predict>c</predict>", "corrupted": "ad<predict>e</predict>"}
    pair = encode_pair(tokenizer, {**bare, "answers": ["x"], "distractor": ["\ny", "z"]})
    assert sorted(words(tokenizer, pair.answer_ids)) == ["c", "x"]
    assert sorted(words(tokenizer, pair.distractor_ids)) == ["\n", "z"]


def test_all_predicted_tokens_but_the_last_are_fed_back():
    tokenizer = byte_tokenizer([])
    record = {"clean": "ab:<predict>xyz</predict>", "corrupted": "cd:<predict>uvw</predict>"}
    pair = encode_pair(tokenizer, record)
    assert "".join(words(tokenizer, pair.clean_ids)) == "ab:xy"
    assert "".join(words(tokenizer, pair.corrupted_ids)) == "cd:uv"
    assert "".join(words(tokenizer, pair.target_ids)) == "xyz"
    assert collate([pair]).cols.tolist() == [2, 3, 4]  # ':' predicts x, x predicts y, y z


@pytest.mark.parametrize("kind", ["prepending", "metaspace"])
def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_into_a_word(kind):
    tokenizer = sentencepiece_tokenizer(["a m", "▁ S", "▁S h", "▁Sh e"], kind)

    def pieces(ids) -> list[str]:
        return tokenizer.convert_ids_to_tokens(list(ids))

    line = "ga<predict>me</predict>"  # tokenised at once it is g, am, e
    pair = encode_pair(tokenizer, {"clean": line, "corrupted": line, "distractor": "te"})
    assert pieces([*pair.clean_ids, pair.target_ids[-1]]) == ["<s>", "▁", "g", "a", "m", "e"]
    assert pieces(pair.target_ids) == ["m", "e"]
    assert tokenizer.decode([*pair.clean_ids, pair.target_ids[-1]]) == "<s> game"
    assert pieces(pair.distractor_ids) == ["t"]
    # One distractor that would split "am" has all of them tokenised separately.
    line = "ga<predict>te</predict>"
    pair = encode_pair(
        tokenizer, {"clean": line, "corrupted": line, "distractor": ["me", " She", "\nx"]}
    )
    assert pieces(pair.target_ids) == ["t", "e"]
    assert set(pieces(pair.distractor_ids)) == {"m", "▁She", "<0x0A>"}


def test_a_prediction_that_cannot_follow_without_a_space_is_refused():
    tokenizer = sentencepiece_tokenizer(["a m"], "stripping")  # also strips the line break
    line = "ga<predict>me</predict>"
    with pytest.raises(MisfitError, match="'me'"):
        encode_pair(tokenizer, {"clean": line, "corrupted": line})


@pytest.mark.parametrize("begin", [[], ["<s>"]])
def test_a_token_is_not_split_between_prompt_and_prediction(begin):
    tokenizer = byte_tokenizer([("7", "4")], begin=bool(begin))  # "1745" alone is 1, 74, 5
    for prediction in ("45", "55"):  # tokenised separately, and at once with the prompt
        line = f"17<predict>{prediction}</predict>"
        pair = encode_pair(tokenizer, {"clean": line, "corrupted": line})
        assert words(tokenizer, pair.clean_ids) == [*begin, "1", "7", prediction[0]]
        assert words(tokenizer, pair.target_ids) == list(prediction)


def test_answers_and_distractors_are_compared_where_they_differ():
    tokenizer = byte_tokenizer([])
    record = {
        "clean": "q:<predict>abc</predict>",
        "corrupted": "r:<predict>xyz</predict>",
        "answers": ["abc", "abd", "kbc", "aec", "abcd"],
        "distractor": ["axx", "ayc"],
    }
    pair = encode_pair(tokenizer, record)
    assert pair.contrast == 1
    assert sorted(words(tokenizer, pair.answer_ids)) == ["b", "e"]
    assert sorted(words(tokenizer, pair.distractor_ids)) == ["x", "y"]
    also_right = [(place, *words(tokenizer, [token])) for place, token in pair.also_right]
    assert also_right == [(0, "k"), (2, "d")]
    assert len({pair, replace(pair)}) == 1  # pairs can be counted
    pair = encode_pair(tokenizer, {**record, "answers": ["abc", "abd"], "distractor": []})
    assert pair.contrast == 2  # where the answers differ from one another
    assert sorted(words(tokenizer, pair.answer_ids)) == ["c", "d"]
    assert pair.distractor_ids == ()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        # Later years, digit by digit: 30 to 32 differ from 35 in the second, 00 to 29 in the first.
        ({"distractor": ["29", "30"]}, MisfitError),
        ({"distractor": ["29"], "answers": ["24"]}, MisfitError),
        ({"answers": ["3"]}, MisfitError),
        ({"distractor": ["35", "29"]}, DataError),
        ({"distractor": ["351"]}, DataError),
    ],
)
def test_options_that_no_single_token_distinguishes_are_refused(change, error):
    line = "17<predict>35</predict>"
    with pytest.raises(DataError) as refused:
        encode_pair(byte_tokenizer([]), {"clean": line, "corrupted": line, **change})
    assert refused.type is error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clean", None), ("corrupted", 3), ("clean", "1 + 2 = 3"), ("clean", "1<predict>2"),
        ("clean", "1<predict>2</predict><predict>3</predict>"), ("clean", "1</predict>2<predict>"),
        ("clean", "1 + 2 = <predict> </predict>"), ("clean", "<predict>3</predict>"),
        ("clean", "1 + 2 = <predict>3</predict> ."), ("distractor", "\udfff"),
        ("corrupted", "1 \ud800 = <predict>3</predict>"), ("distractor", 7), ("distractor", "3"),
        ("answers", [1]), ("distractor_ids", [4]),
    ],
)  # fmt: skip
def test_malformed_records_are_refused(tokenizer, field, value):
    with pytest.raises(DataError, match=field):
        encode_pair(tokenizer, {**SPEC, field: value})


@pytest.mark.parametrize("name", ["distractors", "Distractor", "anwsers", "answer", "spilt"])
def test_a_misspelt_field_is_refused(tokenizer, tmp_path, name):
    record = {"clean": SPEC["clean"], "corrupted": SPEC["corrupted"]}
    path = write_jsonl(tmp_path / "a.jsonl", record, {**record, "note": "x", name: "4"})
    with pytest.raises(DataError, match=f"line 2: .*'{name}'"):
        load_dataset(path, tokenizer, "train")


def test_other_fields_are_ignored(tokenizer):
    own = {"id": 3, "source": "x", "target": "y", "answer": "3", "answers": ["4"], "": 0}
    assert encode_pair(tokenizer, {**SPEC, **own}) == encode_pair(
        tokenizer, {**SPEC, "answers": ["4"]}
    )


IDS = {"clean_ids": [5, 6, 7], "corrupted_ids": [5, 8, 7], "target_ids": [9]}


def test_lines_of_ids_have_answers_and_distractors_too(tokenizer):
    plain = encode_pair(tokenizer, IDS)
    assert plain.answer_ids == plain.distractor_ids == ()
    more = {"distractor_ids": [12, 11, 12], "answer_ids": [10]}
    assert encode_pair(tokenizer, {**IDS, **more}) == replace(
        plain, answer_ids=(9, 10), distractor_ids=(11, 12)
    )
    unknown = encode_pair(tokenizer, {**IDS, **more, "target_ids": [-1]})
    assert unknown.answer_ids == (10,)


@pytest.mark.parametrize(
    "change",
    [
        {"distractor": "4"}, {"answers": ["4"]}, {"distractor_id": [4]}, {"distractor_ids": 4},
        {"distractor_ids": [-1]}, {"distractor_ids": [9]}, {"target_values": [1.5]},
        {"target_ids": [-1], "distractor_ids": [9]}, {"target_ids": [1, 2, 3, 4]},
    ],
)  # fmt: skip
def test_malformed_lines_of_ids_are_refused(tokenizer, change):
    with pytest.raises(DataError):
        encode_pair(tokenizer, {**IDS, **change})


@pytest.mark.parametrize(
    "corrupted", ["1 + 4 + 5 = <predict>9</predict>", "1 + 4 = <predict>5 6</predict>"]
)
def test_prompts_and_predictions_of_unequal_length_do_not_fit(corrupted):
    record = {"clean": "1 + 2 = <predict>34</predict>", "corrupted": corrupted}
    with pytest.raises(MisfitError, match=r"\d and \d"):
        encode_pair(byte_tokenizer([]), record)


def test_splits(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", SPEC, {**SPEC, "split": "test"}, SPEC)
    assert len(load_dataset(path, tokenizer, "train")) == 2
    assert len(load_dataset(path, tokenizer, "test")) == 1
    for split, listed in (("validation", "test, train"), ("dev", "train, validation, test")):
        with pytest.raises(DataError, match=f"'{split}'.* {listed}"):
            load_dataset(path, tokenizer, split)
    bare = {key: value for key, value in SPEC.items() if key != "split"}
    serves_all = write_jsonl(tmp_path / "b.jsonl", bare)
    partly = write_jsonl(tmp_path / "c.jsonl", bare, SPEC)
    for split in SPLITS:
        assert len(load_dataset(serves_all, tokenizer, split)) == 1
        assert len(load_dataset(partly, tokenizer, split)) == (2 if split == "train" else 1)
    whole = load_dataset(path, tokenizer, "train")
    assert whole.has_splits
    assert whole[1] == whole[:2][1] == list(whole)[1]
    assert not load_dataset(partly, tokenizer, "train").has_splits
    assert not load_dataset(serves_all, tokenizer, "train").has_splits


@pytest.mark.parametrize(
    "bad",
    ["{", "[1]", json.dumps({**SPEC, "split": "dev"}), json.dumps({**SPEC, "clean": "x"})],
)
def test_malformed_lines_are_named_by_number(tokenizer, tmp_path, bad):
    path = write_jsonl(tmp_path / "a.jsonl", SPEC, "", bad)  # the empty line counts
    with pytest.raises(DataError, match=f"{path}, line 3: "):
        load_dataset(path, tokenizer, "train")


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b'{"clean": "\xe9"}\n'])
def test_bad_files_are_refused(tokenizer, tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        load_dataset(path, tokenizer, "train")


RECORDS = [
    {"clean": '"é", 1; <predict>2</predict>', "corrupted": "x,\t<predict>y</predict>"},
    {"clean": "a <predict>b</predict>", "corrupted": "c <predict>d</predict>", "split": "test"},
]


def as_table(separator: str) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, ["clean", "corrupted", "split"], delimiter=separator)
    table.writeheader()
    table.writerows(RECORDS)
    return text.getvalue().encode("utf-8-sig")


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (as_table(","), "CSV"), (as_table(";"), "CSV"), (as_table("\t"), "CSV"),
        (json.dumps(RECORDS).encode(), "array"), (json.dumps(RECORDS, indent=1).encode(), "array"),
        (json.dumps(RECORDS[0], indent=1).encode(), "several lines"),
        (gzip.compress(LINES), "gzip"), (bz2.compress(LINES), "bzip2"),
        (lzma.compress(LINES), "xz"),
    ],
)  # fmt: skip
def test_a_file_of_another_format_is_named_and_the_command_given_converts_it(
    tmp_path, content, name
):
    path = tmp_path / "it's my $data"
    path.write_bytes(content)
    with pytest.raises(DataError, match="JSONL") as caught:
        read_records(path)
    assert name in str(caught.value)
    command = re.search(r"(python -c .*|\w+ -dc .*) > NEW.jsonl", str(caught.value))[0]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"no {command.split()[0]}")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    found = read_records(tmp_path / "NEW.jsonl")
    for record in found:
        del record["_where"]
    assert found == RECORDS[: len(found)] and found


def test_the_texts_of_tokens_make_up_the_text_of_the_prompt():
    for tokenizer, before in (
        (sentencepiece_tokenizer(["▁ c"], "metaspace"), " "), (byte_tokenizer([("Ġ", "c")]), ""),
    ):  # fmt: skip
        ids = tokenizer("a cab: a  2", add_special_tokens=False).input_ids
        assert "".join(token_text(tokenizer, token) for token in ids) == f"{before}a cab: a  2"


@pytest.mark.parametrize("missing", ["clean", "corrupted"])
def test_a_missing_prompt_is_refused_with_the_fields_that_there_are(missing, tokenizer, tmp_path):
    other = {"clean": "corrupted", "corrupted": "clean"}[missing]
    data = write_jsonl(tmp_path / "a.jsonl", {other: SPEC[other], "counterfactual": "2 + 1"})
    with pytest.raises(DataError, match=f"{missing}' is missing.*'{other}', 'counterfactual'$"):
        load_dataset(data, tokenizer, "train")


def test_a_field_that_is_null_is_missing(tokenizer, tmp_path):
    """As pandas writes files of lines that differ in their fields."""
    text = {"clean": SPEC["clean"], "corrupted": SPEC["corrupted"]}
    ids = {"clean_ids": [1, 2, 3], "corrupted_ids": [1, 4, 3], "target_ids": [5]}
    fields = (*text, *ids, "split", "answers", "distractor", "answer_ids", "distractor_ids",
              "target_values")  # fmt: skip
    with_null = [{**dict.fromkeys(fields), **record} for record in (text, ids)]
    paths = [
        write_jsonl(tmp_path / "null.jsonl", *with_null),
        write_jsonl(tmp_path / "none.jsonl", text, ids),
    ]
    null, none = (load_dataset(path, tokenizer, "train") for path in paths)
    assert list(null) == list(none) and len(null) == 2
    assert not null.has_splits
    assert first_split(paths[0], "validation") == "validation"


def test_lines_that_do_not_fit_are_skipped_with_one_warning(tokenizer, tmp_path, caplog):
    unequal = {**SPEC, "corrupted": "1 + 4 + 5 = <predict>9</predict>"}
    path = write_jsonl(tmp_path / "a.jsonl", SPEC, unequal, unequal)
    mixed = load_dataset(path, tokenizer, "train")
    (warning,) = caplog.messages
    assert "2 of 3 examples" in warning
    assert f"{path}, line 2" in warning
    assert len(mixed) == 1
    with pytest.raises(NoneUsableError, match="line 1: .* 6 and 9"):
        load_dataset(write_jsonl(tmp_path / "b.jsonl", unequal, unequal), tokenizer, "train")
    with pytest.raises(NoneUsableError):
        load_dataset(path, tokenizer, "train", max_length=3)


def test_batches_by_hand():
    short, long = random_pairs(1, length=3)[0], random_pairs(1, length=5, predicted=2)[0]
    batch = collate([short, long])
    assert batch.clean_ids.shape == batch.corrupted_ids.shape == (2, 5)
    assert batch.clean_ids[0].tolist() == [*short.clean_ids, 0, 0]
    assert batch.corrupted_ids[1].tolist() == list(long.corrupted_ids)
    assert batch.lengths.tolist() == [3, 5]
    assert list(zip(batch.rows.tolist(), batch.cols.tolist(), strict=True)) == [
        (0, 2), (1, 3), (1, 4),
    ]  # fmt: skip
    assert batch.target_ids.tolist() == [*short.target_ids, *long.target_ids]
    assert batch.contrasts.tolist() == [0, 1]


def test_evaluation_sees_every_example_once():
    pairs = random_pairs(7, length=4) + random_pairs(6, length=6, seed=1)
    seen = [pair for batch in iterate_batches(pairs[::2] + pairs[1::2], 4) for pair in batch.pairs]
    assert Counter(seen) == Counter(pairs)


def test_prompts_are_drawn_from_the_whole_file_and_follow_from_the_seed():
    pairs = random_pairs(50)
    some = draw_pairs(pairs, 10, seed=1)
    assert len({*some}) == 10 and {*some} <= {*pairs} and some != pairs[:10]
    assert some == draw_pairs(pairs, 10, seed=1) != draw_pairs(pairs, 10, seed=2)
    assert draw_pairs(pairs, 60, seed=1) == pairs


def test_training_batches_follow_from_seed_and_step():
    pairs = random_pairs(10)

    def batches(seed: int, steps: range) -> list[tuple]:
        return [tuple(training_pairs(pairs, 4, seed, step)) for step in steps]

    first, second, third, fourth, *_ = batches(0, range(6))
    assert batches(0, range(6))[3:] == batches(0, range(3, 6))
    assert batches(0, range(6)) != batches(1, range(6))
    assert not set(first) & set(second)  # one epoch repeats nothing
    assert (*first, *second) != (*third, *fourth)  # epochs differ in order
    assert len(training_pairs(pairs, 64, 0, 5)) == 10


text = st.text(max_size=12) | st.sampled_from(["1", "1 + 2 =", "Tom", "\ud800", "\x00", " "])
marked = st.builds("{}<predict>{}</predict>{}".format, text, text, st.sampled_from(["", " "]))
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text | marked
value = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x))
records = st.dictionaries(st.sampled_from([*SPEC, "distractor", "answers", "_where"]) | text, value)
near_misses = st.builds(lambda change: SPEC | change, records)
lines = (records | near_misses | value).map(json.dumps) | text | st.just("[" * 100_000)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(lines, max_size=4), st.sampled_from(["train", "test"]))
def test_any_file_is_read_or_refused(tokenizer, tmp_path, content, split):
    """No other exception is raised, and the pairs form a batch."""
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(content), errors="surrogatepass")
    try:
        dataset = load_dataset(path, tokenizer, split)
    except DataError as error:
        assert str(error)
    else:
        assert len(collate(list(dataset)).pairs) == len(dataset)


@pytest.mark.parametrize("gap", ["\n", "\n\n", "\n \n", "\t", ":\n"])
@pytest.mark.parametrize("kind", ["bytes", "prepending", "metaspace"])
def test_only_the_tagged_text_is_predicted(kind, gap):
    """Chat templates end in a line break, which the prompt keeps."""
    merges = [("S", "h"), ("Sh", "e")]
    tokenizer = byte_tokenizer([("Ġ", "x"), *merges])
    if kind != "bytes":
        tokenizer = sentencepiece_tokenizer(["S h", "Sh e"], kind)
    lines = [f"a{name}{gap}<predict>She</predict>" for name in "bc"]
    pair = encode_pair(tokenizer, {"clean": lines[0], "corrupted": lines[1], "distractor": "x"})
    assert tokenizer.convert_ids_to_tokens(list(pair.target_ids)) == ["She"]
    assert tokenizer.decode(pair.clean_ids).removeprefix("<s>").lstrip(" ") == f"ab{gap}"
    assert tokenizer.decode(pair.distractor_ids) == "x"


def test_a_space_moves_only_where_the_tokenizer_joins_it_to_the_word():
    for merges, prompt, target in (([("Ġ", "3")], "=", " 3"), ([], "= ", "3")):
        tokenizer = byte_tokenizer(merges)
        pair = encode_pair(tokenizer, {k: v for k, v in SPEC.items() if k != "split"})
        assert tokenizer.decode(pair.clean_ids).endswith(prompt)
        assert tokenizer.decode(pair.target_ids) == target
        assert len(pair.target_ids) == 1


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_a_text_that_begins_with_bos_gets_no_second_one(sides):
    tokenizer = byte_tokenizer([], begin=True)
    texts = [
        ("<s>" if has_bos else "") + f"{word} <predict>x</predict>"
        for has_bos, word in zip(sides, ("ab", "cd"), strict=True)
    ]
    pair = encode_pair(tokenizer, dict(zip(("clean", "corrupted"), texts, strict=True)))
    assert tokenizer.decode(pair.clean_ids) == "<s>ab "
    assert tokenizer.decode(pair.corrupted_ids) == "<s>cd "
    # With two, a prompt with one word fewer would seem to have as many tokens.
    texts[sides.index(True)] = "<s>a <predict>x</predict>"
    if not all(sides):
        with pytest.raises(MisfitError, match="tokens"):
            encode_pair(tokenizer, dict(zip(("clean", "corrupted"), texts, strict=True)))


def test_a_bos_that_only_one_prompt_has_is_refused():
    tokenizer = byte_tokenizer([])  # which puts none before texts
    record = {"clean": "<s>a<predict>x</predict>", "corrupted": "bc<predict>x</predict>"}
    with pytest.raises(MisfitError, match="<s>"):
        encode_pair(tokenizer, record)
