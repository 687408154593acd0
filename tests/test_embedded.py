"""The embedded model: what it can do, and that its circuits are found."""

import json

import pytest
from conftest import run_cli

from edgeprune.circuit import Circuit
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.models.load import load_model
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.prompts import encode_records
from edgeprune.prompts.tasks import TASKS, generate_records

NOT_LEARNED = ("induction_list", "boolean_expressions_instruction", "boolean_expressions_few_shot",
               "whereabouts")  # fmt: skip
LEARNED = [task for task in TASKS if task not in NOT_LEARNED]


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded", device="cpu")


def test_the_model_is_small():
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.iterdir()) <= 8 * 2**20


@pytest.mark.parametrize("task", LEARNED)
def test_the_model_does_every_task_on_prompts_it_was_not_trained_on(embedded, task):
    """Validation prompts of seed 0, which the training script holds out."""
    records = generate_records(task, embedded.tokenizer, {"train": 0, "validation": 150}, 0)
    pairs = encode_records(records, embedded.tokenizer)
    all_edges = Circuit.from_mask(embedded.graph, [True] * embedded.graph.num_edges)
    result = evaluate(embedded, all_edges, pairs)
    assert result.full.two_way_accuracy >= 0.97
    assert result.circuit.kl < 1e-6
    assert result.empty.two_way_accuracy < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["ioi", "induction", "greater_than"])
def test_a_twentieth_of_the_edges_answers_as_the_model_does(tmp_path, task, seed):
    """The experiments as they are shipped, on their test prompts."""
    run = tmp_path / "run"
    settings = (f"experiment={task}", f"seed={seed}", "sparsity=0.95", f"run_dir={run}")
    for arguments in (["prune", *settings], ["evaluate", str(run)]):
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
    result = json.loads((run / "evaluation-test.json").read_text())
    assert result["circuit"]["exact_match"] >= 0.95
