"""The task generators: their records are reproducible, distinct, and right by hand."""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from test_dataset import byte_tokenizer

from edgeprune.errors import ConfigError
from edgeprune.models.load import load_tokenizer
from edgeprune.paths import CONF
from edgeprune.prompts import SPLITS, encode_pair
from edgeprune.prompts.tasks import (
    FROM_MODEL,
    TASKS,
    boolean_expressions,
    gendered_pronoun,
    generate_records,
)
from edgeprune.prompts.tasks.vocabulary import FEMALE_NAMES, MALE_NAMES

SIZES = {"train": 30, "validation": 20, "test": 40}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def records(task, tokenizer):
    return generate_records(task, tokenizer, SIZES, seed=3)


@pytest.fixture(scope="module")
def elsewhere():
    """The records of each task, made in another process."""
    code = (
        "import json, sys; from edgeprune.models.load import load_tokenizer;"
        "from edgeprune.prompts.tasks import TASKS, generate_records;"
        "tokenizer = load_tokenizer('embedded');"
        f"made = {{task: generate_records(task, tokenizer, {SIZES!r}, seed=3) for task in TASKS}};"
        "json.dump(made, sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return json.loads(done.stdout)


def prompt(record: dict, side: str = "clean") -> str:
    return record[side].split("<predict>")[0]


def answer(record: dict, side: str = "clean") -> str:
    return record[side].split("<predict>")[1].removesuffix("</predict>").strip()


def test_sizes_are_as_requested_and_splits_do_not_overlap(task, tokenizer):
    """With a tenth more examples than the defaults, so that those leave room."""
    settings = yaml.safe_load((CONF / f"task/{task}.yaml").read_text())
    sizes = {split: settings[split] * 11 // 10 for split in SPLITS}
    records = generate_records(task, tokenizer, sizes, seed=0)
    assert Counter(record["split"] for record in records) == sizes
    clean = {prompt(record): record["split"] for record in records}
    assert len(clean) == len(records)
    for record in records:
        assert clean.get(prompt(record, "corrupted"), record["split"]) == record["split"]


def test_prompts_are_paired_token_by_token(task, records, tokenizer):
    for record in records:
        pair = encode_pair(tokenizer, record)
        assert len(pair.clean_ids) == len(pair.corrupted_ids)
        is_spelt = task.startswith("boolean_expressions")  # the tokenizer has no token for True
        assert 1 < len(pair.target_ids) < 5 if is_spelt else len(pair.target_ids) == 1
        assert pair.target_ids[pair.contrast] in pair.answer_ids
        assert pair.distractor_ids
        assert not set(pair.answer_ids) & set(pair.distractor_ids)
        assert prompt(record) != prompt(record, "corrupted")


def test_records_follow_from_the_seed_in_any_process(task, records, elsewhere, tokenizer):
    assert elsewhere[task] == records
    assert generate_records(task, tokenizer, SIZES, seed=4) != records


def test_ioi_by_hand(tokenizer):
    orders = set()
    for record in generate_records("ioi", tokenizer, {"train": 200}, seed=0):
        words = re.findall(r"\w+", prompt(record))
        right, wrong = answer(record), record["distractor"].strip()
        assert words.count(right) == 1
        assert words.count(wrong) == 2
        orders.add(words.index(right) < words.index(wrong))
        assert not {right, wrong} & set(re.findall(r"\w+", prompt(record, "corrupted")))
    assert orders == {True, False}  # ABBA and BABA


def test_greater_than_by_hand(tokenizer):
    for record in generate_records("greater_than", tokenizer, {"train": 50}, seed=0):
        year = int(prompt(record).split("from the year ")[1][2:4])
        assert record["answers"] == [f"{end:02}" for end in range(year + 1, 100)]
        assert record["distractor"] == [f"{end:02}" for end in range(year + 1)]
        assert "01 to the year" in record["corrupted"]


def test_greater_than_for_a_tokenizer_of_single_digits():
    tokenizer = byte_tokenizer([])
    record = generate_records("greater_than", tokenizer, {"train": 5}, seed=0)[0]
    assert len(record["answers"]) + len(record["distractor"]) == 10
    assert len(encode_pair(tokenizer, record).target_ids) == 1


@pytest.mark.parametrize(
    ("task", "comma", "shortest", "longest"),
    [("induction", "", 5, 8), ("induction_list", ",", 10, 12)],
)
def test_induction_by_hand(task, comma, shortest, longest):
    lengths = set()
    for seed in range(50):
        record = TASKS[task](random.Random(seed))
        parts = prompt(record).split()
        assert all(part.endswith(comma) for part in parts)
        words = [part.removesuffix(",") for part in parts]
        lengths.add(len(set(words)))
        last = words[-1]
        first = words.index(last)
        assert first < len(words) - 1
        assert answer(record) == words[first + 1]
        assert record["distractor"].strip() in words
        others = prompt(record, "corrupted").split()
        assert others.index(last + comma) == len(words) - 1
    assert (min(lengths), max(lengths)) == (shortest, longest)


EXPRESSION = r"((?:not|and|or|True|False|[() ])+?)"
LAST = re.compile(rf"(?:<</SYS>>\n\n|\[INST\] |\n){EXPRESSION}(?: is| \[/INST\] ')$")


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("form", ["instruction", "few_shot"])
def test_boolean_expressions_by_hand(form, short):
    """Python itself evaluates them; exactly one word is replaced, and the value changes."""
    rng = random.Random(0)
    replaced, answers = set(), []
    for _ in range(200):
        record = boolean_expressions.sample(rng, form, short)
        prompts = [prompt(record), prompt(record, "corrupted")]
        clean, corrupted = (str(eval(LAST.search(text)[1])) for text in prompts)
        assert answer(record) == clean
        assert record["distractor"].strip() == corrupted != clean
        assert answer(record, "corrupted") == (clean if short else corrupted)
        words = (re.findall(r"\w+", text) for text in prompts)
        (changed,) = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
        replaced.add(changed)
        answers.append(clean)
        before_answer = "'<predict>" if form == "instruction" else "is<predict> "
        assert record["clean"].endswith(f"{before_answer}{clean}</predict>")
    assert replaced == set(boolean_expressions.OTHER.items())
    assert 70 < answers.count("True") < 130


def test_boolean_expressions_of_the_examples_are_right():
    for example in boolean_expressions.EXAMPLES:
        expression, value = example.split(" is ")
        assert str(eval(expression)) == value


def test_long_forms_are_for_tokenizers_with_a_token_for_true():
    """The published 8,000 distinct prompts can be had, all of equal length word by word."""
    merges = []
    for word in ("True", "False", "and", "or"):
        merges += [(word[:end], word[end]) for end in range(1, len(word))] + [("Ġ", word)]
    tokenizer = byte_tokenizer(merges)
    sizes = {"train": 8000, "test": 1000}
    records = generate_records("boolean_expressions_instruction", tokenizer, sizes, seed=0)
    assert len(records) == 9000
    assert "<<SYS>>" in records[0]["clean"]
    assert {len(encode_pair(tokenizer, record).target_ids) for record in records[:50]} == {1}


def test_examples_that_do_not_fit_the_tokenizer_are_reported(caplog):
    caplog.set_level("INFO", "edgeprune")
    assert len(generate_records("ioi", byte_tokenizer([]), {"train": 10}, seed=0)) == 10
    assert "do not fit" in caplog.text


def test_a_compiled_model_brings_its_prompts(tokenizer):
    records = generate_records(FROM_MODEL, load_tokenizer("tracr/reverse"), {}, seed=0)
    assert len(records) == 4 * 27  # corrupted inputs of every input of three tokens out of three
    with pytest.raises(ConfigError, match="another task"):
        generate_records(FROM_MODEL, tokenizer, {}, seed=0)


def test_impossible_requests_are_refused(tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="'io'"):
        generate_records("io", tokenizer, {"train": 1}, seed=0)
    monkeypatch.setattr(gendered_pronoun, "ADJECTIVES", ("good",))
    monkeypatch.setattr(gendered_pronoun, "ROLES", ("friend",))
    number = len(gendered_pronoun.TEMPLATES) * len(MALE_NAMES + FEMALE_NAMES)
    with pytest.raises(ConfigError, match=rf"gendered_pronoun has only {number} distinct"):
        generate_records("gendered_pronoun", tokenizer, {"train": 1000}, seed=0)
