"""All commands on a trained Llama with a SentencePiece tokenizer and BOS: stories260k.

Skipped without the model; the environment variable EDGEPRUNE_STORIES names its folder.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import run_cli, write_jsonl

from edgeprune.models.load import load_tokenizer
from edgeprune.prompts import encode_pair, load_dataset

DEFAULT = Path(__file__).parents[2] / "shared/models/stories260k"
FOLDER = Path(os.environ.get("EDGEPRUNE_STORIES", DEFAULT))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="stories260k is missing")

STORIES = (
    "Once upon a time, there was a little {child} named {name}.",
    "One day, a {child} named {name} went to the park.",
    "{name} was a happy {child}.",
    "There was a {child}. The name was {name}.",
    "A {child} named {name} saw a big dog.",
)
CHILDREN = {"She": ("girl", ("Lily", "Mia", "Sue")), "He": ("boy", ("Tim", "Max", "Bob"))}


def edges_of(path: Path) -> list:
    return json.loads(path.read_text())


def records() -> list[dict]:
    """A girl's story with a boy's of the same length, and the reverse."""

    def prompt(story: str, pronoun: str, number: int) -> str:
        child, names = CHILDREN[pronoun]
        return f"{story.format(child=child, name=names[number])} <predict>{pronoun}</predict>"

    return [
        {
            "clean": prompt(story, pronoun, number),
            "corrupted": prompt(story, other, number),
            "distractor": other,
        }
        for story in STORIES
        for number in range(3)
        for pronoun, other in (("She", "He"), ("He", "She"))
    ]


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "stories.jsonl", *records())


def test_prompts_begin_with_bos_and_predictions_are_one_token(data):
    tokenizer = load_tokenizer(FOLDER)
    for pair in load_dataset(data, tokenizer, "train"):
        assert pair.clean_ids.count(tokenizer.bos_token_id) == 1
        assert pair.clean_ids[0] == tokenizer.bos_token_id
        assert tokenizer.convert_ids_to_tokens(list(pair.target_ids)) in (["▁She"], ["▁He"])
        assert tokenizer.convert_ids_to_tokens(list(pair.distractor_ids)) in (["▁He"], ["▁She"])


def test_no_space_is_inserted_into_a_word():
    tokenizer = load_tokenizer(FOLDER)
    line = "Once upon a ga<predict>me</predict>"  # tokenised whole, it ends in g, am, e
    pair = encode_pair(tokenizer, {"clean": line, "corrupted": line, "distractor": " She"})
    assert tokenizer.convert_ids_to_tokens(list(pair.target_ids)) == ["m", "e"]
    assert tokenizer.convert_ids_to_tokens(list(pair.distractor_ids)) == ["▁She"]


def test_prune_resume_export_evaluate_draw(tmp_path, data):
    prune = (
        "prune", "task=custom", f"task.path={data}", "model=custom", f"model.path={FOLDER}",
        "model.name=stories", "num_edges=170", "trainer.steps=200", "trainer.checkpoint_every=50",
    )  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(*arguments: object) -> str:
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*prune, f"run_dir={whole}")
    assert len(edges_of(whole / "edges.json")) == 170
    run("evaluate", whole, "head_permuted=2")
    result = json.loads((whole / "evaluation-test.json").read_text())
    assert result["circuit"]["two_way_accuracy"] >= 0.9 > result["empty"]["two_way_accuracy"]
    assert result["circuit"]["kl"] < result["empty"]["kl"] / 3

    run("export", whole, "num_edges=300", f"output={tmp_path / 'edges.json'}")
    assert len(edges_of(tmp_path / "edges.json")) == 300
    run("draw", whole, "formats=[dot]")
    assert "Head 4." in (whole / "circuit.dot").read_text()

    shutil.copytree(whole, broken)
    (broken / "checkpoints/step-00000200.safetensors").unlink()
    (broken / "edges.json").unlink()
    run(*prune, f"run_dir={broken}", "resume=auto")
    assert edges_of(broken / "edges.json") == edges_of(whole / "edges.json")
