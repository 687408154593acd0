"""What several test files need: small models, prompts, the command line in a fresh process."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# For test_kernels.py; read when transformers imports Triton.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from transformers import GPT2Config, GPT2LMHeadModel

from edgeprune.__main__ import main, register
from edgeprune.circuit import Circuit
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.models.load import load_tokenizer, wrap_model
from edgeprune.prompts import Pair
from edgeprune.runs.run import Run

# The tests run beside each other; and the same bits need the same number of threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

register()  # for tests that compose settings without the command line

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parent / "golden"


def random_gpt2(seed: int = 0, **settings) -> GPT2LMHeadModel:
    """A small GPT-2 with random weights, biases and norms."""
    torch.manual_seed(seed)
    config = GPT2Config(
        **{
            "vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4,
            "bos_token_id": 0, "eos_token_id": 0, **settings,
        }
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():  # also biases and norms, which start at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_pairs(
    count: int, length: int = 8, vocab: int = 50, seed: int = 0, predicted: int = 1
) -> list[Pair]:
    """Prompts of random tokens, the clean and the corrupted one unrelated."""
    rng = random.Random(seed)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(number))

    pairs = []
    for _ in range(count):
        target = ids(predicted)
        wrong = rng.choice([token for token in range(vocab) if token != target[0]])
        pairs.append(Pair(ids(length), ids(length), target, target[:1], (wrong,), 0, "text"))
    return pairs


@pytest.fixture
def model() -> CircuitModel:
    return wrap_model(random_gpt2())


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """`edgeprune ...` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "edgeprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def run_here(*arguments: object) -> None:
    """`edgeprune ...` in this process, some seconds faster; raises SystemExit if it fails."""
    given = sys.argv
    try:
        main([str(argument) for argument in arguments])
    finally:
        sys.argv = given  # Hydra's are left there


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """A command in this process: exit code, output, errors."""
    code = 0
    try:
        run_here(*arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def skip_pictures(monkeypatch) -> None:
    """Let runs in this process write neither a page nor plots, most of the time of a small run."""
    monkeypatch.setattr("edgeprune.api.make_run.write_run_page", lambda *_: None)
    monkeypatch.setattr("edgeprune.api.make_run.draw_frontier", lambda *_, **__: None)
    monkeypatch.setattr("edgeprune.api.prune.draw_training", lambda *_, **__: None)


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """`skip_pictures`, until `monkeypatch.undo()`; runs of fresh processes write them."""
    skip_pictures(monkeypatch)


def fake_run(folder: Path, circuit: Circuit, data: str = "of the data", **settings) -> Path:
    """What a finished run leaves, as far as comparing goes; `data` is its data's digest."""
    folder.mkdir(parents=True)
    config = {"model": {"name": "tiny", "path": "tiny"}, "task": {"name": "ioi"}, "sparsity": None,
              "trainer": {"method": "priced", "steps": 3}, **settings}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "run.json").write_text(
        json.dumps({
            "graph": circuit.graph.to_dict(),
            "model": {"d_model": 8, "sha256": "of the model"},
            "data": {"sha256": data},
        })
    )  # fmt: skip
    Run.open(folder).write_circuit(circuit, {"scores": {"method": "priced", "step": 3}})
    return folder


def assert_refused(result: subprocess.CompletedProcess, code: int, *wanted: str) -> None:
    """One clear error on standard error, the exit code, and no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("edgeprune: "), result.stderr
    for text in wanted:
        assert text in last, last


@pytest.fixture(scope="session")
def tokenizer():
    """Of the embedded model: a word, or two digits, with the space before it, is one token."""
    return load_tokenizer("embedded")


def write_jsonl(path: Path, *records: dict | str) -> Path:
    """Records, or lines as they are."""
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(line + "\n" for line in lines))
    return path
