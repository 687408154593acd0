"""Rows of the form that MIB's datasets have, as prompts. The datasets themselves are not here."""

from pathlib import Path

import pytest
from conftest import call, write_jsonl
from test_dataset import byte_tokenizer

from edgeprune import load_model
from edgeprune.errors import DataError, NoneUsableError
from edgeprune.evaluation.mib import mib_areas
from edgeprune.prompts import encode_pair, load_dataset
from edgeprune.prompts.mib import make_records, read_rows
from edgeprune.scores import EdgeScores

ALL = {"train": 9, "validation": 9, "test": 9}


def ioi(one="Mary", two="John", third="Paul", split=None) -> dict:
    """A row in which `one` is the indirect object."""
    text = "When {} and {} went to the store, {} gave a drink to".format
    row = {
        "template": "...", "prompt": text(one, two, two), "choices": [one, two], "answerKey": 0,
        "metadata": {"indirect_object": one, "subject": two, "random_c": third, "place": "store"},
        "abc_counterfactual": {"prompt": text("Ann", "Bob", third), "choices": ["Ann", "Bob"],
                               "answerKey": 0},
        "s2_io_flip_counterfactual": {"prompt": text(one, two, one), "choices": [one, two],
                                      "answerKey": 1},
    }  # fmt: skip
    return row | ({"split": split} if split else {})


def arithmetic(label="7", other=9) -> dict:
    return {
        "prompt": "3 + 4 = ", "label": label, "operator": "+", "operand1": 3, "operand2": 4,
        "random_counterfactual": {"prompt": "3 + 6 = ", "label": other, "operand2": 6},
        "ones_carry_counterfactual": None,
    }  # fmt: skip


def choice(labels=(1, 2, 3), key=2, other="symbol_counterfactual") -> dict:
    """A row of copycolors_mcqa, whose counterfactual has numbers as symbols."""
    question = "A box is red. What color is a box?\n{}. gray\n{}. black\n{}. red\nAnswer:".format
    choices = {"label": ["A", "B", "C"], "text": ["gray", "black", "red"]}
    changed = {"prompt": question(*labels), "choices": choices | {"label": [*labels]},
               "answerKey": key}  # fmt: skip
    return {"prompt": question("A", "B", "C"), "choices": choices, "answerKey": 2, other: changed}


@pytest.fixture(scope="module")
def letters():
    """One token per byte, but "12" is one."""
    return byte_tokenizer([("1", "2")])


@pytest.mark.parametrize(
    ("row", "end", "answer", "other", "distractor"),
    [
        (ioi(), "drink to", " Mary", " John", " John"),
        (arithmetic(), " = ", "7", "9", "9"),
        (choice(), "Answer:", "C", "3", "3"),
        (choice(("X", "Y", "C"), key=0), "Answer:", "C", "X", "X"),
    ],
)
def test_the_answers_are_those_that_the_benchmark_compares(
    row, end, answer, other, distractor, letters
):
    (record,) = make_records([row], letters, ALL, None)
    assert record["clean"] == f"{row['prompt']}<predict>{answer}</predict>"
    assert row["prompt"].endswith(end)
    column = next(name for name in reversed(row) if name.endswith("_counterfactual") and row[name])
    assert record["corrupted"] == f"{row[column]['prompt']}<predict>{other}</predict>"
    assert record["distractor"] == distractor
    pair = encode_pair(letters, record)
    place = pair.contrast  # where answer and distractor begin to differ
    ids = [letters(text, add_special_tokens=False)["input_ids"] for text in (answer, distractor)]
    assert pair.answer_ids == (ids[0][place],) and pair.distractor_ids == (ids[1][place],)


def test_another_counterfactual_keeps_the_subject_as_the_distractor(letters):
    (record,) = make_records([ioi(two="Bob", one="Ann", third="Cat")], letters, ALL,
                             "abc_counterfactual")  # fmt: skip
    assert "Cat gave" in record["corrupted"]
    assert record["distractor"] == " Bob"


@pytest.mark.parametrize(
    "row",
    [
        ioi("Mary", "Jo"),
        ioi(third="Paula"),
        arithmetic("13", 9),
        arithmetic("7", 13),
        arithmetic("7", 7),
        arithmetic() | {"random_counterfactual": None},
        arithmetic() | {"random_counterfactual": {"prompt": None, "label": None}},
        choice((11, 12, 13)),
        choice() | {"prompt": "Longer. " + choice()["prompt"]},
    ],
)
def test_rows_are_left_out_that_the_benchmark_or_the_tokenizer_leaves_out(row, letters, caplog):
    kept = make_records([arithmetic(), row], letters, ALL, None)
    assert len(kept) == 1 and "skipped 1 of 2" in caplog.text
    with pytest.raises(NoneUsableError):
        make_records([row], letters, ALL, None)


def test_two_digits_may_be_one_token(letters):
    (record,) = make_records([arithmetic("12", 9)], letters, ALL, None)
    assert encode_pair(letters, record).target_ids == tuple(letters("12")["input_ids"])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"clean": "1 <predict>2</predict>", "corrupted": "3 <predict>4</predict>"}, "not a row"),
        (ioi() | {"answerKey": 5}, "answerKey"),
        (ioi() | {"answerKey": "A"}, "answerKey"),
        (choice() | {"choices": {"text": ["a"]}}, "choices"),
        (arithmetic() | {"random_counterfactual": "3 + 6"}, "random_counterfactual"),
        ({k: v for k, v in arithmetic().items() if k != "label"}, "label"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(row, wanted, tmp_path, letters):
    path = write_jsonl(tmp_path / "rows.jsonl", arithmetic(), row)
    with pytest.raises(DataError, match=rf"line 2: .*{wanted}"):
        make_records(read_rows(path), letters, ALL, None)


def test_a_folder_gives_splits_of_the_sizes_asked_for(tmp_path, letters):
    write_jsonl(tmp_path / "test.jsonl", ioi(), ioi("Ann", "Bob"), ioi(two="Luke"))  # one misfit
    write_jsonl(tmp_path / "train.jsonl", ioi(), ioi(two="Luke"))
    records = make_records(read_rows(tmp_path), letters, {**ALL, "train": 1}, None)
    assert [record["split"] for record in records] == ["train", "test", "test"]
    with pytest.raises(DataError, match=r"train\.jsonl"):
        read_rows(Path(__file__).parent)


def test_prompts_made_by_the_command_are_measured_like_any_other(tmp_path, capsys, monkeypatch):
    names = ("Adam", "Alice", "Ben", "Carl")
    rows = [ioi(a, b, c) for a in names for b in names for c in names[:2] if a != b]
    write_jsonl(tmp_path / "test.jsonl", *rows)
    pairs = tmp_path / "pairs.jsonl"
    settings = (f"task.path={tmp_path}", "task.test=5", f"output={pairs}")
    code, out, err = call(capsys, monkeypatch, "prepare", *settings)
    assert code == 0 and "5 lines" in out, err
    model = load_model("embedded")
    found = mib_areas(model, EdgeScores(model.graph, range(model.graph.num_edges)),
                      load_dataset(pairs, model.tokenizer, "test"))  # fmt: skip
    assert found.faithfulness[-1] == pytest.approx(1, abs=1e-4)


def test_rows_given_as_prompts_are_refused_with_the_command(tmp_path):
    with pytest.raises(DataError, match=r"edgeprune prepare task\.path="):
        load_dataset(write_jsonl(tmp_path / "rows.jsonl", ioi()), None, "train")
    parquet = tmp_path / "rows.parquet"
    parquet.write_bytes(b"PAR1\xff\x00PAR1")
    with pytest.raises(DataError, match="read_parquet"):
        load_dataset(parquet, None, "train")
