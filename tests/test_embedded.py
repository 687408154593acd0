"""The embedded model: what it can do, and that its circuits are found."""

import json

import pytest
from conftest import run_cli

from edgeprune import evaluate, load_model
from edgeprune.circuit import Circuit
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.prompts import encode_records
from edgeprune.prompts.tasks import TASKS, make_records


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded", device="cpu")


def pairs_of(task, tokenizer, **sizes):
    return encode_records(make_records(task, tokenizer, sizes, seed=0)[0], tokenizer)[0]


def test_it_is_small():
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.iterdir()) <= 8 * 2**20


NOT_LEARNED = ("induction_list", "boolean_expressions_instruction", "boolean_expressions_few_shot")
LEARNED = [task for task in TASKS if task not in NOT_LEARNED]


@pytest.mark.parametrize("task", LEARNED)
def test_it_does_every_task_on_prompts_it_was_not_trained_on(embedded, task):
    """Validation prompts of seed 0; the training script keeps them out."""
    pairs = pairs_of(task, embedded.tokenizer, train=0, validation=150)
    whole = Circuit.from_mask(embedded.graph, [True] * embedded.graph.num_edges)
    result = evaluate(embedded, whole, pairs)
    assert result.full.two_way_accuracy >= 0.97
    assert result.circuit.kl < 1e-6
    assert result.corrupted.two_way_accuracy < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["ioi", "induction", "greater_than"])
def test_a_twentieth_of_the_edges_answers_as_the_model_does(tmp_path, task, seed):
    """The experiments as they are shipped, on their test prompts."""
    run = tmp_path / "run"
    for arguments in (["prune", f"experiment={task}", f"seed={seed}", f"run_dir={run}"],
                      ["evaluate", str(run)]):  # fmt: skip
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
    assert json.loads((run / "circuit.json").read_text())["sparsity"] >= 0.95
    result = json.loads((run / "evaluation-test.json").read_text())
    assert result["circuit"]["exact_match"] >= 0.95
