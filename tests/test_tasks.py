import json
import random
import re
import subprocess
import sys

import pytest
import yaml
from test_dataset import byte_tokenizer

from edgeprune.paths import CONF
from edgeprune.prompts import SPLITS, encode_pair
from edgeprune.prompts.tasks import TASKS, boolean_expressions, make_records

SIZES = {"train": 30, "validation": 20, "test": 40}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def records(task, tokenizer):
    return make_records(task, tokenizer, SIZES, seed=3)[0]


def prompt(record: dict, side: str = "clean") -> str:
    return record[side].split("<predict>")[0]


def test_sizes_are_as_asked_and_no_prompt_comes_twice(records):
    for split in SPLITS:
        assert sum(record["split"] == split for record in records) == SIZES[split]
    assert len({prompt(record) for record in records}) == len(records)


def test_no_split_has_the_clean_prompts_of_another_corrupted(task, tokenizer):
    settings = yaml.safe_load((CONF / f"task/{task}.yaml").read_text())
    records = make_records(task, tokenizer, {split: settings[split] for split in SPLITS}, seed=0)[0]
    clean = {prompt(record): record["split"] for record in records}
    for record in records:
        assert clean.get(prompt(record, "corrupted"), record["split"]) == record["split"]


def test_prompts_are_paired_token_by_token(task, records, tokenizer):
    for record in records:
        pair = encode_pair(tokenizer, record)
        assert len(pair.clean_ids) == len(pair.corrupted_ids)
        spelt = task.startswith("boolean_expressions")  # the embedded tokenizer has no True
        assert 1 < len(pair.target_ids) < 5 if spelt else len(pair.target_ids) == 1
        assert pair.target_ids[pair.contrast] in pair.answer_ids
        assert pair.distractor_ids
        assert not set(pair.answer_ids) & set(pair.distractor_ids)
        assert record["clean"].split("<predict>")[0] != record["corrupted"].split("<predict>")[0]


def test_records_follow_from_the_seed_in_any_process(task, records, tokenizer):
    code = (
        "import json, sys; from edgeprune.models import load_tokenizer;"
        "from edgeprune.prompts.tasks import make_records;"
        f"r = make_records({task!r}, load_tokenizer('embedded'), {SIZES!r}, seed=3)[0];"
        "json.dump(r, sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == records
    assert make_records(task, tokenizer, SIZES, seed=4)[0] != records


def test_ioi_by_hand(tokenizer):
    records, _ = make_records("ioi", tokenizer, {"train": 200}, seed=0)
    orders = set()
    for record in records:
        clean, answer = record["clean"].removesuffix("</predict>").split("<predict>")
        words, wrong = re.findall(r"\w+", clean), record["distractor"].strip()
        assert words.count(answer.strip()) == 1
        assert words.count(wrong) == 2
        orders.add(words.index(answer.strip()) < words.index(wrong))
        others = re.findall(r"\w+", prompt({"clean": record["corrupted"]}))
        assert answer.strip() not in others
        assert wrong not in others
    assert orders == {True, False}  # ABBA and BABA


def test_greater_than_by_hand(tokenizer):
    for record in make_records("greater_than", tokenizer, {"train": 50}, seed=0)[0]:
        year = int(prompt(record).split("from the year ")[1][2:4])
        assert record["answers"] == [f"{end:02}" for end in range(year + 1, 100)]
        assert record["distractor"] == [f"{end:02}" for end in range(year + 1)]
        assert "01 to the year" in record["corrupted"]


def test_greater_than_for_a_tokenizer_that_reads_digit_by_digit():
    tokenizer = byte_tokenizer([])
    record = make_records("greater_than", tokenizer, {"train": 5}, seed=0)[0][0]
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
        assert record["clean"].endswith(f"<predict> {words[first + 1]}</predict>")
        assert record["distractor"].strip() in words
        others = prompt({"clean": record["corrupted"]}).split()
        assert others.index(last + comma) == len(words) - 1
    assert (min(lengths), max(lengths)) == (shortest, longest)


FORMS = ("instruction", "few_shot")
EXPRESSION = r"((?:not|and|or|True|False|[() ])+?)"
LAST = re.compile(rf"(?:<</SYS>>\n\n|\[INST\] |\n){EXPRESSION}(?: is| \[/INST\] ')$")


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_boolean_expressions_by_hand(form, short):
    """Python itself says what they evaluate to; one word is replaced, and the value turns."""
    rng = random.Random(0)
    replaced, answers = set(), []
    for _ in range(200):
        record = boolean_expressions.sample(rng, form, short)
        prompts = [record[side].split("<predict>")[0] for side in ("clean", "corrupted")]
        clean, corrupted = (LAST.search(prompt)[1] for prompt in prompts)
        answer = record["clean"].split("<predict>")[1].removesuffix("</predict>").strip()
        assert str(eval(clean)) == answer
        assert str(eval(corrupted)) == record["distractor"].strip() != answer
        other = record["corrupted"].split("<predict>")[1].removesuffix("</predict>").strip()
        assert other == (answer if short else record["distractor"].strip())
        words = (re.findall(r"\w+", prompt) for prompt in prompts)
        (changed,) = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
        replaced.add(changed)
        answers.append(answer)
        gap = "'" if form == "instruction" else "is"
        space = "" if form == "instruction" else " "
        assert record["clean"].endswith(f"{gap}<predict>{space}{answer}</predict>")
    assert replaced == set(boolean_expressions.OTHER.items())
    assert 70 < answers.count("True") < 130


def test_boolean_expressions_of_the_examples_are_right():
    for example in boolean_expressions.EXAMPLES:
        expression, answer = example.split(" is ")
        assert str(eval(expression)) == answer


def test_boolean_expressions_by_their_tree():
    tree = ("or", ("and", ("not", "False"), "False"), "True")
    assert boolean_expressions.text(tree) == "((not False) and False) or True"
    assert boolean_expressions.value(tree)
    changed = boolean_expressions.with_one_word_replaced(tree)
    assert set(map(boolean_expressions.text, changed)) == {
        "((not False) and False) and True",
        "((not False) or False) or True",
        "((not True) and False) or True",
        "((not False) and True) or True",
        "((not False) and False) or False",
    }


def test_long_forms_are_for_tokenizers_with_a_word_for_true():
    """Enough distinct prompts for the published 8,000, all of equal length word by word."""
    merges = []
    for word in ("True", "False", "and", "or"):
        merges += [(word[:end], word[end]) for end in range(1, len(word))] + [("Ġ", word)]
    tokenizer = byte_tokenizer(merges)
    records, report = make_records(
        "boolean_expressions_instruction", tokenizer, {"train": 8000, "test": 1000}, seed=0
    )
    assert len(records) == 9000
    assert not report.misfits
    assert "<<SYS>>" in records[0]["clean"]
    assert {len(encode_pair(tokenizer, record).target_ids) for record in records[:50]} == {1}


def test_examples_that_do_not_fit_the_tokenizer_are_counted(tokenizer):
    records, report = make_records("ioi", byte_tokenizer([]), {"train": 10}, seed=0)
    assert len(records) == 10
    assert sum(report.misfits.values()) > 10
    assert "that do not fit the tokenizer" in str(report)


def test_the_sizes_that_a_task_has_by_default_leave_room(task, tokenizer):
    """`edgeprune prepare task=...` on the embedded model, and a tenth more."""
    settings = yaml.safe_load((CONF / f"task/{task}.yaml").read_text())
    sizes = {split: settings[split] * 11 // 10 for split in SPLITS}
    assert len(make_records(task, tokenizer, sizes, seed=0)[0]) == sum(sizes.values())


def test_impossible_requests_are_refused(tokenizer):
    with pytest.raises(ValueError, match="unknown task 'io'"):
        make_records("io", tokenizer, {"train": 1}, 0)
    with pytest.raises(ValueError, match="cannot make 1 examples of split 'dev'"):
        make_records("ioi", tokenizer, {"dev": 1}, 0)
    with pytest.raises(ValueError, match="yields only .* of the 100,000 examples asked for"):
        make_records("gendered_pronoun", tokenizer, {"train": 100_000}, 0)
