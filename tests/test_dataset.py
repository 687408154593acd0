import json
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import random_pairs, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from edgeprune.errors import DataError, MisfitError
from edgeprune.prompts import (
    PairDataset,
    collate,
    encode_pair,
    iterate_batches,
    load_dataset,
    training_pairs,
)

SPEC = {
    "clean": "1 + 2 = <predict>3</predict>",
    "corrupted": "1 + 4 = <predict>5</predict>",
    "split": "train",
}


def byte_tokenizer(merges: list[tuple[str, str]], begin: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, and the merges given; `begin` puts <s> before every text, as Llama's do."""
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
    """As Llama 2's, which begins every text with a space: letters, bytes, and the merges given."""
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


def test_the_arithmetic_example_of_the_format():
    tokenizer = byte_tokenizer([("Ġ", sign) for sign in "+=2345"])
    pair = encode_pair(tokenizer, SPEC)
    assert words(tokenizer, pair.clean_ids) == ["1", " +", " 2", " ="]
    assert words(tokenizer, pair.corrupted_ids) == ["1", " +", " 4", " ="]
    assert words(tokenizer, pair.target_ids) == [" 3"]
    assert pair.answer_ids == pair.distractor_ids == ()


@pytest.mark.parametrize("distractor", ["4", " 4"])
def test_the_space_before_the_prediction_stands_before_distractors_too(distractor):
    tokenizer = byte_tokenizer([("Ġ", sign) for sign in "+=2345"])
    pair = encode_pair(tokenizer, {**SPEC, "distractor": distractor})
    assert words(tokenizer, pair.answer_ids) == [" 3"]
    assert words(tokenizer, pair.distractor_ids) == [" 4"]


@pytest.mark.parametrize("option", ["4", " 4"])
def test_so_does_the_space_within_its_tag(option):
    tokenizer = byte_tokenizer([("Ġ", sign) for sign in "+=2345"])
    clean, corrupted = (
        SPEC[key].replace(" <predict>", "<predict> ") for key in ("clean", "corrupted")
    )
    pair = encode_pair(
        tokenizer,
        {"clean": clean, "corrupted": corrupted, "answers": [option], "distractor": "5"},
    )
    assert words(tokenizer, pair.target_ids) == [" 3"]
    assert words(tokenizer, pair.answer_ids) == [" 3", " 4"]
    assert words(tokenizer, pair.distractor_ids) == [" 5"]


def test_without_a_space_there_options_are_taken_as_they_are():
    tokenizer = byte_tokenizer([])
    bare = {"clean": "ab<predict>c</predict>", "corrupted": "ad<predict>e</predict>"}
    pair = encode_pair(tokenizer, {**bare, "answers": ["x"], "distractor": ["\ny", "z"]})
    assert sorted(words(tokenizer, pair.answer_ids)) == ["c", "x"]
    assert sorted(words(tokenizer, pair.distractor_ids)) == ["\n", "z"]


def test_several_predicted_tokens_are_fed_back_but_the_last():
    tokenizer = byte_tokenizer([])
    pair = encode_pair(
        tokenizer,
        {"clean": "ab:<predict>xyz</predict>", "corrupted": "cd:<predict>uvw</predict>"},
    )
    assert "".join(words(tokenizer, pair.clean_ids)) == "ab:xy"
    assert "".join(words(tokenizer, pair.corrupted_ids)) == "cd:uv"
    assert "".join(words(tokenizer, pair.target_ids)) == "xyz"
    batch = collate([pair])
    assert batch.cols.tolist() == [2, 3, 4]  # ':' predicts x, x predicts y, y predicts z


def test_a_token_across_prompt_and_prediction_is_not_cut():
    tokenizer = byte_tokenizer([("7", "4")])  # "1745" alone would be 1, 74, 5
    pair = encode_pair(
        tokenizer,
        {"clean": "17<predict>45</predict>", "corrupted": "17<predict>22</predict>"},
    )
    assert words(tokenizer, pair.clean_ids) == ["1", "7", "4"]
    assert words(tokenizer, pair.target_ids) == ["4", "5"]


@pytest.mark.parametrize("kind", ["prepending", "metaspace"])
def test_a_tokenizer_that_begins_texts_with_a_space_puts_none_into_a_word(kind):
    tokenizer = sentencepiece_tokenizer(["a m", "▁ S", "▁S h", "▁Sh e"], kind)

    def pieces(ids) -> list[str]:
        return tokenizer.convert_ids_to_tokens(list(ids))

    line = "ga<predict>me</predict>"  # which in one piece is g, am, e
    pair = encode_pair(tokenizer, {"clean": line, "corrupted": line, "distractor": "te"})
    assert pieces([*pair.clean_ids, pair.target_ids[-1]]) == ["<s>", "▁", "g", "a", "m", "e"]
    assert pieces(pair.target_ids) == ["m", "e"]
    assert tokenizer.decode([*pair.clean_ids, pair.target_ids[-1]]) == "<s> game"
    assert pieces(pair.distractor_ids) == ["t"]
    # One distractor of several, which would cut "am", has all of them read apart.
    line = "ga<predict>te</predict>"
    pair = encode_pair(
        tokenizer, {"clean": line, "corrupted": line, "distractor": ["me", " She", "\nx"]}
    )
    assert pieces(pair.target_ids) == ["t", "e"]
    assert set(pieces(pair.distractor_ids)) == {"m", "▁She", "<0x0A>"}


def test_a_prediction_that_cannot_go_on_without_a_space_is_refused():
    tokenizer = sentencepiece_tokenizer(["a m"], "stripping")  # takes the line break away, too
    line = "ga<predict>me</predict>"
    with pytest.raises(MisfitError, match="no tokens for 'me' as it goes on from its prompt"):
        encode_pair(tokenizer, {"clean": line, "corrupted": line})


def test_special_tokens_at_the_beginning_are_kept_once():
    tokenizer = byte_tokenizer([("7", "4")], begin=True)
    for prediction in ("45", "55"):  # read in one piece with the prompt, and apart from it
        line = f"17<predict>{prediction}</predict>"
        pair = encode_pair(tokenizer, {"clean": line, "corrupted": line})
        assert words(tokenizer, pair.clean_ids) == ["<s>", "1", "7", prediction[0]]
        assert words(tokenizer, pair.target_ids) == list(prediction)


def test_answers_and_distractors_are_compared_where_they_part():
    tokenizer = byte_tokenizer([])
    record = {
        "clean": "q:<predict>abc</predict>",
        "corrupted": "r:<predict>xyz</predict>",
        "answers": ["abc", "abd"],
        "distractor": ["axx", "ayy"],
    }
    pair = encode_pair(tokenizer, record)
    assert pair.contrast == 1
    assert words(tokenizer, pair.answer_ids) == ["b"]
    assert sorted(words(tokenizer, pair.distractor_ids)) == ["x", "y"]
    pair = encode_pair(tokenizer, {**record, "distractor": []})
    assert pair.contrast == 2  # where the answers part from one another
    assert sorted(words(tokenizer, pair.answer_ids)) == ["c", "d"]
    assert pair.distractor_ids == ()


def test_answers_that_leave_the_target_elsewhere_are_right_too():
    tokenizer = byte_tokenizer([])
    record = {
        "clean": "q:<predict>abc</predict>",
        "corrupted": "r:<predict>xyz</predict>",
        "answers": ["abd", "kbc", "aec", "abcd"],
        "distractor": ["axx", "ayc"],
    }
    pair = encode_pair(tokenizer, record)
    assert pair.contrast == 1
    assert sorted(words(tokenizer, pair.answer_ids)) == ["b", "e"]
    assert [(place, *words(tokenizer, [token])) for place, token in pair.also_right] == [
        (0, "k"), (2, "d"),
    ]  # fmt: skip
    dataset = PairDataset([pair], "one")
    assert dataset[0] == pair
    assert hash(dataset[0]) == hash(pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Later years, digit by digit: 30 to 32 differ from 35 in the second, 00 to 29 in the first.
        ({"distractor": ["29", "30"]}, "in its token 1, others only in token 2.*prompt end later"),
        ({"distractor": ["29"], "answers": ["24"]}, "share token 1, in which they are compared"),
        ({"distractor": ["35", "29"]}, "begin with the same tokens"),
        ({"distractor": ["351"]}, "begin with the same tokens"),
        ({"answers": ["3"]}, "one of the answers is the beginning of another, 1 of its 2 tokens"),
    ],
)
def test_options_that_no_one_token_tells_apart_are_refused(change, message):
    line = "17<predict>35</predict>"
    with pytest.raises(DataError, match=message):
        encode_pair(byte_tokenizer([]), {"clean": line, "corrupted": line, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": None}, "'clean' is nothing, expected a string"),
        ({"corrupted": 3}, "'corrupted' is int"),
        ({"clean": "1 + 2 = 3"}, "exactly one <predict>...</predict>"),
        ({"clean": "1<predict>2</predict><predict>3</predict>"}, "exactly one"),
        ({"clean": "1</predict>2<predict>"}, "exactly one"),
        ({"clean": "1 + 2 = <predict></predict>"}, "nothing between"),
        ({"clean": "1 + 2 = <predict> </predict>"}, "nothing between"),
        ({"clean": "<predict>3</predict>"}, "no prompt before"),
        ({"clean": "1 + 2 = <predict>3</predict> ."}, "goes on after"),
        ({"corrupted": "1 + 4 + 5 = <predict>9</predict>"}, "unequal lengths: 6 and 9 tokens"),
        ({"distractor": 7}, "'distractor' must be a string or a list"),
        ({"distractor": "3"}, "begin with the same tokens"),
        ({"answers": [1]}, "'answers' must be"),
        ({"corrupted": "1 \ud800 = <predict>3</predict>"}, "'corrupted' has half a character"),
        ({"distractor": "\udfff"}, "'distractor' has half a character"),
    ],
)
def test_bad_records_are_refused(tokenizer, change, message):
    with pytest.raises(DataError, match=message):
        encode_pair(tokenizer, {**SPEC, **change})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("distractors", "distractor"), ("Distractor", "distractor"), ("anwsers", "answers"),
     ("answer", "answers"), ("spilt", "split"), ("clean_id", "clean_ids")],
)  # fmt: skip
def test_a_misspelt_field_is_refused(tokenizer, tmp_path, name, meant):
    record = {"clean": SPEC["clean"], "corrupted": SPEC["corrupted"]}
    path = write_jsonl(tmp_path / "a.jsonl", record, {**record, "note": "x", name: "4"})
    with pytest.raises(DataError, match=f"line 2: unknown field '{name}'; did you mean '{meant}'"):
        load_dataset(path, tokenizer, "train")


def test_fields_of_ones_own_are_passed_over(tokenizer):
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
    ("record", "message"),
    [
        ({**IDS, "distractor": "4"}, "'distractor' .* of token ids; give 'distractor_ids'"),
        ({**IDS, "answers": ["4"]}, "'answers' .* of token ids; give 'answer_ids'"),
        ({**SPEC, "distractor_ids": [4]}, "'distractor_ids' .* of text; give 'distractor'"),
        ({**IDS, "distractor_id": [4]}, "did you mean 'distractor_ids'"),
        ({**IDS, "distractor_ids": 4}, "'distractor_ids' must be a list of numbers"),
        ({**IDS, "distractor_ids": [-1]}, "'distractor_ids' has ids outside of 0 to"),
        ({**IDS, "distractor_ids": [9]}, r"right tokens.* are \[9\], and distractor_ids \[9\]"),
        ({**IDS, "target_ids": [-1], "distractor_ids": [9]}, r"the right tokens.* are \[\]"),
        ({**IDS, "target_values": [1.5]}, "'target_values' is not for this model.* 'target_ids'"),
    ],
)
def test_answers_and_distractors_that_do_not_fit_a_line_are_refused(tokenizer, record, message):
    with pytest.raises(DataError, match=message):
        encode_pair(tokenizer, record)


def test_predictions_of_unequal_length_are_refused():
    record = {"clean": "a<predict>bc</predict>", "corrupted": "a<predict>b</predict>"}
    with pytest.raises(DataError, match="predictions have unequal lengths: 2 and 1"):
        encode_pair(byte_tokenizer([]), record)


def test_splits(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", SPEC, {**SPEC, "split": "test"}, SPEC)
    assert len(load_dataset(path, tokenizer, "train")) == 2
    assert len(load_dataset(path, tokenizer, "test")) == 1
    with pytest.raises(DataError, match="no line of split 'validation'; it has test, train"):
        load_dataset(path, tokenizer, "validation")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        load_dataset(path, tokenizer, "dev")
    bare = {key: value for key, value in SPEC.items() if key != "split"}
    serves_all = write_jsonl(tmp_path / "b.jsonl", bare)
    for split in ("train", "validation", "test"):
        assert len(load_dataset(serves_all, tokenizer, split)) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[1]", "line 3: got a list"),
        (json.dumps({**SPEC, "split": "dev"}), "line 3: unknown split 'dev'"),
        (json.dumps({**SPEC, "clean": "x"}), "line 3: field 'clean' needs exactly one"),
    ],
)
def test_bad_lines_are_named_by_number(tokenizer, tmp_path, bad, message):
    path = write_jsonl(tmp_path / "a.jsonl", SPEC, "", bad)  # the empty line counts
    with pytest.raises(DataError, match=message):
        load_dataset(path, tokenizer, "train")


def test_bad_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no data file"):
        load_dataset(tmp_path / "none.jsonl", tokenizer, "train")
    with pytest.raises(DataError, match="holds no lines"):
        load_dataset(write_jsonl(tmp_path / "empty.jsonl", ""), tokenizer, "train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"clean": "\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_dataset(tmp_path / "latin.jsonl", tokenizer, "train")


def test_lines_that_do_not_fit_are_skipped_and_counted_or_refused_if_all(tokenizer, tmp_path):
    unequal = {**SPEC, "corrupted": "1 + 4 + 5 = <predict>9</predict>"}
    path = write_jsonl(tmp_path / "a.jsonl", SPEC, unequal, unequal)
    with pytest.warns(UserWarning, match="left out 2 of 3 examples, for instance .*line 2") as said:
        mixed = load_dataset(path, tokenizer, "train")
    assert len(said) == 1
    assert len(mixed) == 1
    assert len(mixed.skipped) == 2
    assert "line 2" in mixed.skipped[0]
    with pytest.raises(DataError, match="none of the 2 examples can be used.*unequal lengths"):
        load_dataset(write_jsonl(tmp_path / "b.jsonl", unequal, unequal), tokenizer, "train")
    with pytest.raises(DataError, match="3 examples .* 6 tokens are more than the 3 allowed"):
        load_dataset(tmp_path / "a.jsonl", tokenizer, "train", max_length=3)


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


def test_training_batches_follow_from_seed_and_step():
    pairs = random_pairs(10)

    def batches(seed: int, steps: range) -> list[tuple]:
        return [tuple(training_pairs(pairs, 4, seed, step)) for step in steps]

    assert batches(0, range(6)) == batches(0, range(6))
    assert batches(0, range(6))[3:] == batches(0, range(3, 6))
    assert batches(0, range(6)) != batches(1, range(6))
    first, second, third = batches(0, range(3))
    assert not set(first) & set(second)  # one epoch repeats nothing
    assert (*first, *second) != (*third, *batches(0, range(3, 4))[0])  # epochs differ in order
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
def test_whatever_a_file_holds_it_is_read_or_refused(tokenizer, tmp_path, content, split):
    """Never another exception than ours; what is read makes a batch."""
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(content), errors="surrogatepass")
    try:
        dataset = load_dataset(path, tokenizer, split)
    except DataError as error:
        assert str(error)
    else:
        assert len(collate(list(dataset)).pairs) == len(dataset)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_bytes_changed_at_random_are_read_or_refused(tokenizer, tmp_path, data):
    content = bytearray((json.dumps(SPEC) + "\n" + json.dumps(SPEC) + "\n").encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(DataError):
        load_dataset(path, tokenizer, "train")


def test_a_data_set_is_read_in_any_order_and_takes_no_memory(tokenizer, tmp_path):
    """Of thousands of pairs; what is held of each is a place in a file."""
    first = random_pairs(3, predicted=2)
    dataset = PairDataset(first, "some")
    assert [dataset[2], dataset[0], dataset[1]] == [first[2], first[0], first[1]]
    assert list(dataset) == first
    assert hash(dataset[1]) == hash(first[1])
    with pytest.raises(IndexError, match="pair 3 of 3"):
        dataset[3]

    record = {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>"}
    path = write_jsonl(tmp_path / "many.jsonl", *[{**record, "note": "x" * 500}] * 3_000)
    load_dataset(write_jsonl(tmp_path / "few.jsonl", record), tokenizer, "train")  # imports
    tracemalloc.start()
    try:
        dataset = load_dataset(path, tokenizer, "train")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert len(dataset) == 3_000
    assert dataset[2_999] == dataset[0]
