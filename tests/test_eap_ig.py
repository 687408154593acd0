"""Circuits and scores that EAP-IG's own code wrote, against its own evaluation of them.

Skipped without the recorded results; the environment variable EDGEPRUNE_ATTRIBUTION names their
folder. It has a folder per model with `prompts.jsonl` and graphs with scores. That of the GPT-2 has
the `model` too, and `interop`: circuits, their numbers of edges, logit differences and KLs.
"""

import json
import os
import re
from pathlib import Path

import pytest

from edgeprune.evaluation.evaluate import evaluate
from edgeprune.formats import read_circuit, write_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.models.load import load_model
from edgeprune.prompts import Pair

DEFAULT = Path(__file__).parents[2] / "shared/attribution"
FOLDER = Path(os.environ.get("EDGEPRUNE_ATTRIBUTION", DEFAULT))
GPT2, LLAMA = FOLDER / "gpt2_embedded_ioi", FOLDER / "stories260k_ioi"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="recorded attribution is missing")

RECORDED = GPT2 / "interop/eapig_evaluation.json"
CIRCUITS = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}


@pytest.fixture(scope="module")
def models() -> dict:
    """The model with each choice of embedding writers."""
    return {
        writers: load_model(GPT2 / "model", device="cpu", embedding_writers=writers)
        for writers in ("tokens", "all")
    }


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    records = map(json.loads, (GPT2 / "prompts.jsonl").read_text().splitlines())
    names = ("clean_ids", "corrupted_ids", "target_ids", "target_ids", "distractor_ids")
    return [Pair(*(tuple(record[name]) for name in names), 0, "text") for record in records]


@pytest.mark.parametrize("writers", ["tokens", "all"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_a_circuit_of_theirs_has_their_edges_logit_difference_and_kl(models, pairs, name, writers):
    model, expected = models[writers], CIRCUITS[name]
    file = read_circuit(GPT2 / "interop" / name, model.graph)
    circuit = file.circuit
    assert sum(writer != "pos_embeds" for writer, _ in circuit) == expected["n"]
    assert len(file.notes) == (writers == "all")
    if writers == "tokens":
        assert circuit.without_dangling() == circuit  # their code has dropped dangling edges
    found = evaluate(model, circuit, pairs).circuit
    assert found.logit_difference == pytest.approx(expected["ld"], abs=1e-4)
    assert found.kl == pytest.approx(expected["kl"], abs=1e-4)


@pytest.mark.parametrize("name", CIRCUITS)
def test_a_circuit_of_theirs_is_written_as_they_wrote_it(models, tmp_path, name):
    """Through our own files, with the same flags of edges and nodes."""
    graph, theirs = models["tokens"].graph, GPT2 / "interop" / name
    write_circuit(read_circuit(theirs, graph).circuit, tmp_path / "c.json", "circuit")
    write_circuit(read_circuit(tmp_path / "c.json").circuit, tmp_path / "g.json", "eap_json")
    ours = json.loads((tmp_path / "g.json").read_text())
    expected = json.loads(theirs.with_suffix(".json").read_text())

    def kept(entries: dict) -> dict:
        return {name: entry["in_graph"] for name, entry in entries.items()}

    for part in ("edges", "nodes"):
        assert kept(ours[part]) == kept(expected[part])


def their_name(edge: tuple[str, str]) -> str:
    writer, reader = ("input" if "embeds" in edge[0] else edge[0]), edge[1]
    reader = re.sub(r"\.([qkv])$", r"<\1>", reader).replace("resid_post", "logits")
    return f"{writer}->{reader}"


@pytest.mark.parametrize(
    ("path", "graph"),
    [
        (GPT2 / "EAP_logit_diff.json", CircuitGraph(4, 16, 16, ("tok_embeds",))),
        (LLAMA / "EAP-IG-inputs_kl.json", CircuitGraph(5, 8, 8, ("embeds",))),
    ],
    ids=["gpt2", "llama"],
)
def test_scores_of_theirs_are_written_as_they_wrote_them(tmp_path, path, graph):
    file = read_circuit(path, graph)
    assert len(file.notes) == 1  # no edge is in the graph
    write_circuit(file.circuit, tmp_path / "g.json", "eap_json", scores=file.scores)
    edges = json.loads(path.read_text())["edges"]
    assert json.loads((tmp_path / "g.json").read_text())["edges"] == edges
    best = file.scores.circuit(num_edges=50).edges
    by_score = sorted(edges, key=lambda name: -abs(edges[name]["score"]))
    assert {their_name(edge) for edge in best} == set(by_score[:50])
