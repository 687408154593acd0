"""Circuit files: known answers worked out by hand, round trips, and what is refused."""

import gc
import json
import os
import pickle
import random
import re

import pytest
import torch
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.errors import CircuitError
from edgeprune.formats import FORMATS, read_circuit, write_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

GPT2 = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))
TOKENS = CircuitGraph(2, 2, 2, ("tok_embeds",))
"""The graph of EAP-IG and MIB: positions always flow."""
GROUPED = CircuitGraph(1, 4, 2, ("embeds",))
"""Heads 0 and 1 share key/value head 0, heads 2 and 3 share key/value head 1."""
WRITTEN = (
    ("embeds", "a0.h2.q"), ("embeds", "a0.h1.k"), ("embeds", "a0.h0.v"),
    ("a0.h2", "m0"), ("a0.h3", "resid_post"), ("m0", "resid_post"),
)  # fmt: skip
EXPANDED = {
    "input->a0.h2<q>", "input->a0.h2<k>", "input->a0.h3<k>", "input->a0.h0<v>", "input->a0.h1<v>",
    "a0.h2->m0", "a0.h3->logits", "m0->logits",
}  # fmt: skip
"""The same circuit with keys and values per query head, worked out by hand."""


def their_edges(layers: int, heads: int) -> list[str]:
    """Every edge of the graph formats, written from their description, not from our graph."""
    names, seen = [], ["input"]
    for layer in range(layers):
        here = [f"a{layer}.h{head}" for head in range(heads)]
        names += [f"{w}->{head}<{kind}>" for w in seen for head in here for kind in "qkv"]
        seen += here
        names += [f"{w}->m{layer}" for w in seen]
        seen.append(f"m{layer}")
    return names + [f"{w}->logits" for w in seen]


def their_file(layers: int, heads: int, kept: set[str], **more) -> dict:
    return {
        "cfg": {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {"input": {"in_graph": True}},
        "edges": {
            name: {"score": 0.5, "in_graph": name in kept} for name in their_edges(layers, heads)
        },
        **more,
    }


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def scored(graph: CircuitGraph, values: list[float] | dict) -> EdgeScores:
    if isinstance(values, dict):
        values = [values.get(edge, 0.0) for edge in graph.edges]
    return EdgeScores(graph, torch.tensor(values, dtype=torch.float64), by_magnitude=True)


@st.composite
def circuits(draw) -> Circuit:
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    writers = [(), ("embeds",), TOKENS.embedding_writers, GPT2.embedding_writers]
    embeddings = draw(st.sampled_from(writers))
    graph = CircuitGraph(draw(st.integers(1, 3)), heads, kv_heads, embeddings)
    return Circuit.from_mask(
        graph, draw(st.lists(st.booleans(), min_size=graph.num_edges, max_size=graph.num_edges))
    )


# ---------------------------------------------------------------------------- lists of edges


def test_edges_json_is_a_list_of_pairs_without_a_graph(tmp_path):
    circuit = Circuit.random(GPT2, 9, seed=0)
    write_circuit(circuit, tmp_path / "edges.json")
    assert json.loads((tmp_path / "edges.json").read_text()) == [list(e) for e in circuit.edges]
    with pytest.raises(CircuitError):
        read_circuit(tmp_path / "edges.json")


def test_circuit_json_describes_itself(tmp_path):
    circuit, origin = Circuit.random(GPT2, 9, seed=0), {"scores": {"method": "x"}, "data": ["é"]}
    path = tmp_path / "circuit.json"
    write_circuit(circuit, path, "circuit", origin=origin)
    file = read_circuit(path)
    assert (file.circuit, file.origin) == (circuit, origin)
    assert circuit.sizes().items() <= json.loads(path.read_text()).items()
    with pytest.raises(CircuitError):
        read_circuit(path, CircuitGraph(2, 2, 2, ("embeds",)))


def test_ground_truth_of_tracr_is_a_list_below_a_key(tmp_path):
    (tmp_path / "truth.json").write_text('{"program": "x", "edges": [["tok_embeds", "m0"]]}')
    assert read_circuit(tmp_path / "truth.json", GPT2).circuit.edges == [("tok_embeds", "m0")]


# ------------------------------------------------------------------- known answers of graphs


def edges_of(path) -> dict[str, tuple[bool, float]]:
    """(in_graph, score) of each edge of a .json or .pt file."""
    if path.suffix == ".json":
        entries = json.loads(path.read_text())["edges"]
        return {name: (entry["in_graph"], entry["score"]) for name, entry in entries.items()}
    content = torch.load(path, weights_only=True)
    names = [f"{w}->{r}" for w in content["src_nodes"] for r in content["dst_nodes"]]
    matrices = (content[key].flatten().tolist() for key in ("edges_in_graph", "edges_scores"))
    return dict(zip(names, zip(*matrices, strict=True), strict=True))


def test_grouped_heads_are_expanded_by_hand(tmp_path):
    paths = tmp_path / "g.json", tmp_path / "g.pt"
    for path, format in zip(paths, ("eap_json", "eap_pt"), strict=True):
        write_circuit(Circuit.from_edges(GROUPED, WRITTEN), path, format, d_model=16)
        edges = edges_of(path)
        assert edges.keys() >= set(their_edges(1, 4))
        assert {name for name, entry in edges.items() if entry == (True, 1)} == EXPANDED
        assert {entry for name, entry in edges.items() if name not in EXPANDED} == {(False, 0)}
    content, tensors = json.loads(paths[0].read_text()), torch.load(paths[1], weights_only=True)
    config = {"n_layers": 1, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16}
    assert content["cfg"] == tensors["cfg"] == config
    assert set(content["edges"]) == set(their_edges(1, 4))
    nodes = {name: entry["in_graph"] for name, entry in content["nodes"].items()}
    assert {name for name, kept in nodes.items() if not kept} == {"a0.h0", "a0.h1"}
    assert tensors["src_nodes"] == [name for name in nodes if name != "logits"]
    assert tensors["nodes_in_graph"].tolist() == [nodes[name] for name in tensors["src_nodes"]]
    assert tensors["edges_scores"].dtype == torch.float32
    readers = [f"a0.h{head}<{kind}>" for kind in "qkv" for head in range(4)]
    assert tensors["dst_nodes"] == [*readers, "m0", "logits"]


def test_a_shared_key_is_kept_if_any_of_its_heads_has_it(tmp_path):
    path = write_json(tmp_path / "g.json", their_file(1, 4, {"input->a0.h3<k>", "a0.h3->logits"}))
    file = read_circuit(path, GROUPED)
    assert file.circuit.edges == [("embeds", "a0.h1.k"), ("a0.h3", "resid_post")]
    assert len(file.notes) == 1
    file = read_circuit(write_json(tmp_path / "w.json", their_file(1, 4, EXPANDED)), GROUPED)
    assert file.circuit.edge_set == set(WRITTEN)
    assert not file.notes


def test_the_input_is_the_token_embedding_and_positions_always_flow(tmp_path):
    path = write_json(tmp_path / "g.json", their_file(2, 2, {"input->a0.h1<q>", "m1->logits"}))
    file = read_circuit(path, TOKENS)
    assert file.circuit.edges == [("tok_embeds", "a0.h1.q"), ("m1", "resid_post")]
    assert (file.notes, file.d_model, file.is_eap) == ((), 8, True)
    assert file.scores.values.tolist() == [0.5] * TOKENS.num_edges
    both = read_circuit(path, GPT2)
    positions = {edge for edge in GPT2.edges if edge[0] == "pos_embeds"}
    assert both.circuit.edge_set == file.circuit.edge_set | positions
    assert len(both.notes) == 1
    scores = dict(zip(GPT2.edges, both.scores.values.tolist(), strict=True))
    assert {edge for edge, score in scores.items() if score == 0} == positions
    file = read_circuit(path, CircuitGraph(2, 2, 2, ()))
    assert file.circuit.edges == [("m1", "resid_post")]
    assert len(file.notes) == 1  # all edges from the input flow
    with pytest.raises(CircuitError):
        read_circuit(path)


def test_edges_from_positions_are_not_written(tmp_path):
    edges = {("pos_embeds", "m0"), ("tok_embeds", "a0.h1.v"), ("m0", "resid_post")}
    circuit = Circuit.from_edges(GPT2, edges)
    path = tmp_path / "g.json"
    write_circuit(circuit, path, "eap_json")
    kept = {name for name, (kept, _) in edges_of(path).items() if kept}
    assert kept == {"input->a0.h1<v>", "m0->logits"}
    assert read_circuit(path, GPT2).circuit == circuit  # thanks to our own key
    content = json.loads(path.read_text())
    content["edges"]["m1->logits"]["in_graph"] = True  # by another program
    changed = read_circuit(write_json(path, content), GPT2).circuit
    positions = {edge for edge in GPT2.edges if edge[0] == "pos_embeds"}
    assert changed.edge_set == edges | positions | {("m1", "resid_post")}


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
def test_where_no_embedding_is_a_writer_the_input_ranks_first(tmp_path, format):
    graph = CircuitGraph(2, 2, 2, ())
    scores = EdgeScores(graph, torch.linspace(-9, 2, graph.num_edges), by_magnitude=True)
    path = tmp_path / f"g.{format.removeprefix('eap_')}"
    write_circuit(scores.circuit(num_edges=3), path, format, scores=scores)
    found = edges_of(path)
    assert {found[name] for name in their_edges(2, 2) if name.startswith("input")} == {(True, 9)}
    assert sum(kept for kept, _ in found.values()) == 15 + 3  # readers and edges


def test_older_and_sparser_files_are_read_too(tmp_path):
    """Nodes as bare flags, edges without scores, only the kept edges listed."""
    content = {
        "cfg": {"n_layers": 2, "n_heads": 2},
        "nodes": {"input": True},
        "edges": {"m1->logits": {"in_graph": True}},
    }
    file = read_circuit(write_json(tmp_path / "g.json", content), TOKENS)
    assert (file.circuit.edges, file.scores) == ([("m1", "resid_post")], None)


def test_cells_without_an_edge_are_ignored(tmp_path):
    """Graphs made node by node set whole rows, including impossible edges."""
    write_circuit(Circuit(TOKENS, frozenset()), tmp_path / "g.pt", "eap_pt")
    content = torch.load(tmp_path / "g.pt", weights_only=True)
    content["edges_in_graph"][-1] = True  # m1, which only the output reads
    del content["edges_scores"], content["edgeprune"]
    torch.save(content, tmp_path / "g.pt")
    assert read_circuit(tmp_path / "g.pt", TOKENS).circuit.edges == [("m1", "resid_post")]


# ------------------------------------------------------------------------ what the user is told


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["interchange", "zero", "mean"])
def test_zero_ablation_is_warned_of(tmp_path, caplog, format, kind):
    circuit, origin = Circuit.random(TOKENS, 9, seed=0), {"ablation": {"kind": kind}}
    write_circuit(circuit, tmp_path / "g", format, origin=origin)
    assert ("zero ablation" in caplog.text) == (kind == "zero" and format.startswith("eap"))


def test_a_file_of_theirs_needs_a_model_and_is_warned_of(tmp_path, capsys, monkeypatch):
    kept = {"input->a0.h1<q>", "a0.h1->m0", "m0->logits"}
    path, edges = write_json(tmp_path / "g.json", their_file(4, 16, kept)), tmp_path / "e.json"
    code, _, error = call(capsys, monkeypatch, "export", path, f"output={edges}")
    assert (code, edges.exists()) == (1, False)
    assert "does not identify its model" in error
    model = ("model=embedded", "model.embedding_writers=tokens")
    code, _, error = call(capsys, monkeypatch, "export", path, f"output={edges}", *model)
    assert code == 0, error
    expected = [["tok_embeds", "a0.h1.q"], ["a0.h1", "m0"], ["m0", "resid_post"]]
    assert json.loads(edges.read_text()) == expected
    for file, ablation, is_warned in (
        (path, "zero", True), (path, "interchange", False), (edges, "zero", False),
    ):  # fmt: skip
        code, _, error = call(
            capsys, monkeypatch, "evaluate", file, *model, "task=ioi", "task.test=4",
            f"ablation={ablation}",
        )  # fmt: skip
        assert code == 0, error
        assert ("EAP-IG" in error) == is_warned


# ------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
def test_of_two_embeddings_the_tokens_score_is_written(tmp_path, format):
    circuit = Circuit.from_edges(GPT2, {("tok_embeds", "m0")})
    scores = scored(GPT2, {("tok_embeds", "m0"): 0.25, ("pos_embeds", "m0"): -0.75})
    path = tmp_path / f"g.{format.removeprefix('eap_')}"
    write_circuit(circuit, path, format, scores=scores)
    found = {name: entry for name, entry in edges_of(path).items() if entry != (False, 0)}
    assert found == {"input->m0": (True, 0.25)}


def test_learned_scores_are_written_so_that_magnitude_ranks_them(tmp_path):
    values = torch.linspace(-9, 9, GPT2.num_edges, dtype=torch.float64)
    scores = EdgeScores(GPT2, values)
    write_circuit(scores.circuit(num_edges=5), tmp_path / "g", "eap_json", scores=scores)
    found = read_circuit(tmp_path / "g").scores
    assert found.by_magnitude
    for size in (1, 20, 50):
        assert found.circuit(num_edges=size) == scores.circuit(num_edges=size)


def test_of_a_groups_heads_the_largest_score_by_magnitude_is_read(tmp_path):
    content = their_file(1, 4, set())
    content["edges"]["input->a0.h3<k>"]["score"] = -9.0
    file = read_circuit(write_json(tmp_path / "h.json", content), GROUPED)
    assert len(file.notes) == 2  # of the score of a0.h2<k>, and that no edge is in the graph
    scores = file.scores
    assert scores.origin == {"method": "file", "file": "h.json"}
    assert scores.circuit(num_edges=2).edges == [("embeds", "a0.h0.q"), ("embeds", "a0.h1.k")]
    for damaged in (None, "1", float("inf")):
        content["edges"]["m0->logits"]["score"] = damaged
        file = read_circuit(write_json(tmp_path / "h.json", content), GROUPED)
        assert file.scores is None


def test_scores_that_were_changed_replace_our_own(tmp_path):
    path, best = tmp_path / "g.json", ("tok_embeds", "a0.h0.q")
    scores = scored(GPT2, [number / GPT2.num_edges for number in range(GPT2.num_edges)])
    write_circuit(Circuit(GPT2, frozenset()), path, "eap_json", scores=scores)
    assert best not in read_circuit(path).scores.circuit(num_edges=20)
    content = json.loads(path.read_text())
    content["edges"]["input->a0.h0<q>"]["score"] = 2.0
    found = read_circuit(write_json(path, content)).scores.circuit(num_edges=1)
    assert found.edges == [best]


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
@settings(max_examples=40, deadline=None)
@given(circuit=circuits(), seed=st.integers(0, 99))
def test_scores_are_read_back_exactly(tmp_path_factory, format, circuit, seed):
    """Also if two embeddings are one input, or scores differ by less than float32 resolves."""
    rng, graph = random.Random(seed), circuit.graph
    scores = [
        rng.choice((-1, 1)) * (1 - rng.random() * 10 ** -rng.randrange(12)) for _ in graph.edges
    ]
    path = tmp_path_factory.mktemp("formats") / "circuit"
    write_circuit(circuit, path, format, scores=scored(graph, scores))
    assert read_circuit(path).scores.values.tolist() == scores
    assert read_circuit(path, graph).scores.values.tolist() == scores
    write_circuit(circuit, path, format)
    assert read_circuit(path).scores.circuit(num_edges=len(circuit)) == circuit


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(circuit=circuits())
def test_circuits_are_read_back_exactly(tmp_path_factory, format, circuit):
    path = tmp_path_factory.mktemp("formats") / "circuit"
    write_circuit(circuit, path, format)
    assert read_circuit(path, circuit.graph).circuit == circuit
    if format != "edges":
        file = read_circuit(path)
        assert file.circuit == circuit
        in_file = [writer for writer, _ in circuit.edge_set if writer != "pos_embeds"]
        assert not in_file or not file.notes


@settings(max_examples=40, deadline=None)
@given(circuit=circuits())
def test_a_circuit_that_the_format_can_represent_needs_no_key_of_ours(tmp_path_factory, circuit):
    graph = circuit.graph
    whole = circuit.edge_set | {edge for edge in graph.edges if edge[0] == "pos_embeds"}
    path = tmp_path_factory.mktemp("formats") / "g.json"
    write_circuit(Circuit.from_edges(graph, whole), path, "eap_json")
    content = json.loads(path.read_text())
    del content["edgeprune"]
    assert read_circuit(write_json(path, content), graph).circuit.edge_set == whole


# ---------------------------------------------------------------------------------- bad input


def refused(path) -> None:
    with pytest.raises(CircuitError, match=re.escape(path.name)):
        read_circuit(path, GPT2)


def changed(**changes) -> dict:
    return {**their_file(2, 2, {"m1->logits"}), **changes}


def circuit_json(**changes) -> dict:
    return {
        "format": "edgeprune/circuit", "version": 1, "graph": GPT2.to_dict(), "edges": [],
        "origin": {}, **changes,
    }  # fmt: skip


OWN = {"graph": GPT2.to_dict(), "kept": [], "scores": []}


@pytest.mark.parametrize(
    "content",
    [
        3, {"a": 1}, [["tok_embeds", "m0", 1]], [["tok_embeds", "m9"]], [["m1", "m0"]],
        circuit_json(version=2), circuit_json(graph=3), circuit_json(edges=3),
        circuit_json(edges=[["m1", "m0"]]), circuit_json(origin=3),
        changed(cfg=[]), changed(cfg={"n_layers": 2}),
        changed(cfg={"n_layers": 10**9, "n_heads": 2}),
        changed(cfg={"n_layers": 3, "n_heads": 2}, edges={}),
        changed(cfg={"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": True}),
        changed(edges=[]), changed(edges={"m1->m0": {"in_graph": True}}),
        changed(edges={"input->a0.h0.q": {"in_graph": True}}),
        changed(edges={"m1->logits": {"in_graph": 2}}), changed(edges={"m1->logits": {"score": 1}}),
        changed(nodes={"m0": {"in_graph": True, "neurons": [True, False]}}),
        changed(edgeprune={**OWN, "graph": 3}), changed(edgeprune={**OWN, "kept": ["x"]}),
        changed(edgeprune={**OWN, "kept": [61]}),
    ],
)  # fmt: skip
def test_bad_json_is_refused(tmp_path, content):
    refused(write_json(tmp_path / "g.json", content))


def test_missing_and_broken_files_are_refused(tmp_path):
    path = tmp_path / "broken.json"
    for data in (b"[[", b"[" * 100_000, b"\xff", b"PK\x03\x04 and then nothing"):
        path.write_bytes(data)
        refused(path)
    refused(tmp_path / "missing.json")
    refused(tmp_path)


FLAGS = torch.zeros(7, 15)


@pytest.mark.parametrize(
    "changes",
    [
        {"edges_in_graph": FLAGS.T}, {"edges_in_graph": FLAGS + 0.5},
        {"edges_in_graph": FLAGS + 1j}, {"edges_in_graph": FLAGS.to_sparse()},
        {"edges_in_graph": [0]}, {"edges_scores": FLAGS.T}, {"edges_scores": FLAGS.to("meta")},
        {"src_nodes": ["input"]}, {"cfg": None}, {"neurons_in_graph": 3},
        {"nodes_in_graph": FLAGS[:, 0] + 1, "neurons_in_graph": torch.eye(7)},
    ],
)  # fmt: skip
def test_bad_pt_files_are_refused(tmp_path, changes):
    path = tmp_path / "g.pt"
    write_circuit(Circuit(GPT2, frozenset()), path, "eap_pt")
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    refused(path)


def test_code_in_a_pt_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"cfg": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"cfg": Evil()}, protocol=2))
    for name in ("a.pt", "b.pt"):
        refused(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
@pytest.mark.parametrize("format", FORMATS)
def test_reading_leaves_no_file_open(tmp_path, format):
    write_circuit(Circuit.random(GPT2, 9, seed=0), tmp_path / "g", format)
    gc.collect()
    gc.disable()  # nothing but the reader itself closes its files
    try:
        before = os.listdir("/proc/self/fd")
        file = read_circuit(tmp_path / "g", GPT2)
        assert os.listdir("/proc/self/fd") == before
    finally:
        gc.enable()
    assert len(file.circuit) == 9


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, circuit = tmp_path / "edges.json", Circuit.random(GPT2, 5, seed=0)
    write_circuit(circuit, path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    for format in FORMATS:
        with pytest.raises(OSError, match="No space"):
            write_circuit(Circuit.random(GPT2, 9, seed=1), path, format)
    assert read_circuit(path, GPT2).circuit == circuit
    assert [p.name for p in tmp_path.iterdir()] == ["edges.json"]
