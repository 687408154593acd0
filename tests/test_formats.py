"""Circuit files: known answers by hand, round trips, and what is refused."""

import json
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.errors import CircuitError
from edgeprune.formats.eap import FORMATS, infer_graph, read_circuit_file
from edgeprune.graph import CircuitGraph

GPT2 = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))
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
"""The same circuit with keys and values once per query head, worked out by hand."""


def their_edges(layers: int, heads: int) -> list[str]:
    """Every edge name of the graph formats, written from their description, not from our graph."""
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


@st.composite
def circuits(draw) -> Circuit:
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    embeddings = draw(st.sampled_from([(), ("embeds",), ("tok_embeds", "pos_embeds")]))
    graph = CircuitGraph(draw(st.integers(1, 3)), heads, kv_heads, embeddings)
    return Circuit.from_mask(
        graph, draw(st.lists(st.booleans(), min_size=graph.num_edges, max_size=graph.num_edges))
    )


# -------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
def test_grouped_heads_are_expanded_by_hand(tmp_path, format):
    circuit = Circuit.from_edges(GROUPED, WRITTEN)
    path = tmp_path / "graph"
    circuit.save(path, format, d_model=16)
    if format == "eap_json":
        content = json.loads(path.read_text())
        flags = {name: entry["in_graph"] for name, entry in content["edges"].items()}
        scores = {name: entry["score"] for name, entry in content["edges"].items()}
        nodes = {name: entry["in_graph"] for name, entry in content["nodes"].items()}
    else:
        content = torch.load(path, weights_only=True)
        writers, readers = content["src_nodes"], content["dst_nodes"]
        assert content["edges_in_graph"].shape == content["edges_scores"].shape == (6, 14)
        flags, scores = (
            {
                f"{writer}->{reader}": content[key][row, column].item()
                for row, writer in enumerate(writers)
                for column, reader in enumerate(readers)
                if f"{writer}->{reader}" in their_edges(1, 4)
            }
            for key in ("edges_in_graph", "edges_scores")
        )
        assert content["edges_in_graph"].sum() == len(EXPANDED)
        nodes = dict(zip(writers, content["nodes_in_graph"].tolist(), strict=True))
        assert readers == [
            *(f"a0.h{head}<{kind}>" for kind in "qkv" for head in range(4)), "m0", "logits",
        ]  # fmt: skip
    assert content["cfg"] == {
        "n_layers": 1, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16,
    }  # fmt: skip
    assert set(flags) == set(their_edges(1, 4))
    assert {name for name, kept in flags.items() if kept} == EXPANDED
    assert {name for name, score in scores.items() if score == 1} == EXPANDED
    wanted = {"input": True, "a0.h0": False, "a0.h1": False, "a0.h2": True, "a0.h3": True}
    assert {name: nodes[name] for name in wanted} == wanted
    assert nodes["m0"]


def test_a_partly_set_group_is_kept_and_said(tmp_path):
    """Key/value head 1 read by head 3 alone is kept; one that no head reads is not."""
    path = write_json(tmp_path / "g.json", their_file(1, 4, {"input->a0.h3<k>", "a0.h3->logits"}))
    file = read_circuit_file(path, GROUPED)
    assert file.edges == [("embeds", "a0.h1.k"), ("a0.h3", "resid_post")]
    assert "1 edges into a shared key or value head" in " ".join(file.notes)
    whole = write_json(tmp_path / "w.json", their_file(1, 4, EXPANDED))
    file = read_circuit_file(whole, GROUPED)
    assert set(file.edges) == set(WRITTEN)
    assert not file.notes


def test_an_edge_from_the_input_stands_for_both_embeddings(tmp_path):
    path = write_json(tmp_path / "g.json", their_file(2, 2, {"input->a0.h1<q>", "m1->logits"}))
    assert read_circuit_file(path, GPT2).edges == [
        ("tok_embeds", "a0.h1.q"), ("pos_embeds", "a0.h1.q"), ("m1", "resid_post"),
    ]  # fmt: skip
    no_writers = CircuitGraph(2, 2, 2, ())
    file = read_circuit_file(path, no_writers)
    assert file.edges == [("m1", "resid_post")]
    assert "always flow" in " ".join(file.notes)
    file = read_circuit_file(path)  # of no known model
    assert file.edges == [("embeds", "a0.h1.q"), ("m1", "resid_post")]
    assert file.graph == CircuitGraph(2, 2, 2, ("embeds",))
    assert not file.sure


def test_either_embedding_puts_the_input_in_the_graph(tmp_path):
    circuit = Circuit.from_edges(GPT2, {("pos_embeds", "m0"), ("m0", "resid_post")})
    circuit.save(tmp_path / "g.json", "eap_json")
    content = json.loads((tmp_path / "g.json").read_text())
    kept = {name for name, entry in content["edges"].items() if entry["in_graph"]}
    assert kept == {"input->m0", "m0->logits"}
    assert Circuit.load(tmp_path / "g.json", GPT2) == circuit  # by what our own key holds
    del content["edgeprune"]  # as another program writes it anew
    write_json(tmp_path / "g.json", content)
    with pytest.warns(UserWarning, match=r"g\.json: edges from the input are kept from tok_embeds"):
        read = Circuit.load(tmp_path / "g.json", GPT2)
    assert read.edge_set == circuit.edge_set | {("tok_embeds", "m0")}


def test_scores_are_written_and_the_higher_of_two_embeddings_counts(tmp_path):
    circuit = Circuit.from_edges(GPT2, {("pos_embeds", "m0")})
    scores = [0.0] * GPT2.num_edges
    for edge, score in {("tok_embeds", "m0"): 0.25, ("pos_embeds", "m0"): 0.75}.items():
        scores[GPT2.edge_index(edge)] = score
    circuit.save(tmp_path / "g.json", "eap_json", scores=scores)
    circuit.save(tmp_path / "g.pt", "eap_pt", scores=scores)
    content = json.loads((tmp_path / "g.json").read_text())["edges"]
    assert {name for name, entry in content.items() if entry["score"]} == {"input->m0"}
    assert content["input->m0"] == {"score": 0.75, "in_graph": True}
    tensors = torch.load(tmp_path / "g.pt", weights_only=True)
    assert tensors["edges_scores"].sum() == 0.75
    assert tensors["edges_scores"].dtype == torch.float32


def test_older_and_sparser_files_are_read_too(tmp_path):
    """Nodes as bare flags, edges without scores, only the kept edges listed."""
    content = {
        "cfg": {"n_layers": 2, "n_heads": 2},
        "nodes": {"input": True},
        "edges": {"m1->logits": {"in_graph": True}},
    }
    assert read_circuit_file(write_json(tmp_path / "g.json", content), GPT2).edges == [
        ("m1", "resid_post")
    ]


def test_cells_of_no_edge_mean_nothing(tmp_path):
    """Graphs made node by node set whole rows, impossible edges among them."""
    Circuit(GPT2, frozenset()).save(tmp_path / "g.pt", "eap_pt")
    content = torch.load(tmp_path / "g.pt", weights_only=True)
    content["edges_in_graph"][-1] = True  # m1, which only the output reads
    del content["edges_scores"], content["edgeprune"]
    torch.save(content, tmp_path / "g.pt")
    assert read_circuit_file(tmp_path / "g.pt", GPT2).edges == [("m1", "resid_post")]


def test_scores_without_a_circuit_are_said(tmp_path):
    path = write_json(tmp_path / "g.json", their_file(2, 2, set()))
    assert "no edge is in the graph; choose edges" in " ".join(read_circuit_file(path, GPT2).notes)


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
def test_scores_are_read_back_and_the_largest_by_magnitude_chosen(tmp_path, format):
    """Of a group's heads and of two embeddings, the largest by magnitude; ties in order."""
    scores = [0.0] * GROUPED.num_edges
    large = {("embeds", "a0.h1.k"): -3.0, ("m0", "resid_post"): 2.0, ("embeds", "a0.h0.q"): 0.5}
    for edge, score in large.items():
        scores[GROUPED.edge_index(edge)] = score
    Circuit(GROUPED, frozenset()).save(tmp_path / "g", format, scores=scores, d_model=16)
    file = read_circuit_file(tmp_path / "g")
    assert (file.scores, file.d_model) == (scores, 16)
    assert file.largest(3) == list(large)
    assert file.largest(4)[3] == ("embeds", "a0.h1.q")
    content = their_file(1, 4, set())
    content["edges"]["input->a0.h3<k>"]["score"] = -9.0
    chosen = read_circuit_file(write_json(tmp_path / "h.json", content), GROUPED).largest(2)
    assert chosen == [("embeds", "a0.h1.k"), ("embeds", "a0.h0.q")]
    del content["edges"]["m0->logits"]["score"]
    assert read_circuit_file(write_json(tmp_path / "h.json", content)).scores is None


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
def test_scores_that_were_changed_since_count_in_place_of_our_own(tmp_path, format):
    scores = [number / GPT2.num_edges for number in range(GPT2.num_edges)]
    path = tmp_path / "g"
    Circuit(GPT2, frozenset()).save(path, format, scores=scores)
    best = ("pos_embeds", "a0.h0.q")
    assert best not in read_circuit_file(path).largest(20)
    if format == "eap_json":
        content = json.loads(path.read_text())
        content["edges"]["input->a0.h0<q>"]["score"] = 2.0
        write_json(path, content)
    else:
        content = torch.load(path, weights_only=True)
        content["edges_scores"][0, 0] = 2.0
        torch.save(content, path)
    assert read_circuit_file(path).largest(2) == [("tok_embeds", "a0.h0.q"), best]


def test_files_of_ours_without_own_scores_are_read_by_theirs(tmp_path):
    """As they were written before."""
    path = tmp_path / "g.json"
    Circuit(GPT2, frozenset()).save(path, "eap_json", scores=list(range(GPT2.num_edges)))
    content = json.loads(path.read_text())
    del content["edgeprune"]["scores"]
    file = read_circuit_file(write_json(path, content))
    assert file.scores[:2] == [1, 1]  # both embeddings have the higher one
    assert file.scores[-1] == GPT2.num_edges - 1


# ---------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("format", ["eap_json", "eap_pt"])
@settings(max_examples=40, deadline=None)
@given(circuit=circuits(), seed=st.integers(0, 99))
def test_every_edge_has_its_own_score_again(tmp_path_factory, format, circuit, seed):
    """Also where two embeddings are one input, or scores differ by less than float32 can say."""
    rng = random.Random(seed)
    scores = [
        rng.choice((-1, 1)) * (1 - rng.random() * 10 ** -rng.randrange(12))
        for _ in range(circuit.graph.num_edges)
    ]
    path = tmp_path_factory.mktemp("formats") / "circuit"
    circuit.save(path, format, scores=scores)
    assert read_circuit_file(path).scores == scores
    assert read_circuit_file(path, circuit.graph).scores == scores
    circuit.save(path, format)
    assert set(read_circuit_file(path).largest(len(circuit))) == circuit.edge_set


@pytest.mark.filterwarnings("ignore:.*no edge is in the graph")
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(circuit=circuits())
def test_what_is_written_is_read_back(tmp_path_factory, format, circuit):
    path = tmp_path_factory.mktemp("formats") / "circuit"
    circuit.save(path, format)
    assert Circuit.load(path, circuit.graph) == circuit
    file = read_circuit_file(path)
    assert set(file.edges) == circuit.edge_set
    if format != "edges":
        assert file.graph == circuit.graph
        assert file.sure
        assert not circuit.edge_set or not file.notes


@settings(max_examples=40, deadline=None)
@given(circuit=circuits())
def test_without_our_key_a_circuit_that_the_format_can_hold_is_the_same(tmp_path_factory, circuit):
    graph = circuit.graph
    whole = {  # all embeddings or none
        (writer, reader)
        for writer, reader in circuit.edge_set
        if writer not in graph.embedding_writers
        or all((w, reader) in circuit.edge_set for w in graph.embedding_writers)
    }
    circuit = Circuit.from_edges(graph, whole)
    folder = tmp_path_factory.mktemp("formats")
    circuit.save(folder / "g.json", "eap_json")
    content = json.loads((folder / "g.json").read_text())
    del content["edgeprune"]
    write_json(folder / "g.json", content)
    assert set(read_circuit_file(folder / "g.json", graph).edges) == circuit.edge_set


# -------------------------------------------------------------------------------------- bad input


def changed(**changes) -> dict:
    return {**their_file(2, 2, {"m1->logits"}), **changes}


def of_graph(scores: list | None = None, **counts: object) -> dict:
    """With our own key, in which the graph has other counts."""
    ours = {"graph": {**GPT2.to_dict(), **counts}, "left_out": [], "scores": scores}
    return changed(edgeprune=ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(cfg=[]), "'cfg' is list, expected a dictionary"),
        (changed(cfg={"n_layers": 2}), "n_layers=2 and n_heads=None"),
        (changed(cfg={"n_layers": 0, "n_heads": 2}), "n_layers=0"),
        (changed(cfg={"n_layers": True, "n_heads": 2}), "num_layers=True must be a whole number"),
        (changed(cfg={"n_layers": 3, "n_heads": 2}), "3 layers of 2 heads, the model 2 of 2"),
        (changed(cfg={"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": True}), "parallel_attn"),
        (changed(edges=[]), "'edges' is list"),
        (changed(edges={"m1->m0": {"in_graph": True}}), "no edge 'm1->m0'"),
        (changed(edges={"input->a0.h0": {"in_graph": True}}), "no edge 'input->a0.h0'"),
        (changed(edges={"input->a0.h0.q": {"in_graph": True}}), "no edge 'input->a0.h0.q'"),
        (changed(edges={"input->a0.h5<q>": {"in_graph": True}}), "no edge 'input->a0.h5<q>'"),
        (changed(edges={"input": {"in_graph": True}}), "no edge 'input'"),
        (changed(edges={"m1->logits": {"score": 1}}), "'m1->logits' has no 'in_graph'"),
        (changed(edges={"m1->logits": True}), "'m1->logits' has no 'in_graph'"),
        (changed(nodes={"m0": {"in_graph": True, "neurons": [True, False]}}), "circuits of neuron"),
        (changed(edgeprune={"graph": 3}), "'edgeprune' cannot be read"),
        (of_graph(num_kv_heads=0), "'edgeprune' cannot be read .* num_kv_heads=0 must be a whole"),
        (of_graph(num_heads=2.0), "num_heads=2.0 must be a whole number above 0"),
        (of_graph(num_layers=10**9), "1,000,000,000 layers of 2 heads .* check its numbers"),
        (of_graph(num_layers=3, scores=[1.0]), "'graph' has not the layers and heads of 'cfg'"),
        (
            changed(edgeprune={"graph": GPT2.to_dict(), "left_out": [], "scores": [1.0]}),
            "'scores' are not 30 or 61 numbers",
        ),
        ({"cfg": {}}, "nor a graph of EAP-IG"),
    ],
)
def test_bad_graph_files_are_refused(tmp_path, content, message):
    with pytest.raises(CircuitError, match=message) as error:
        read_circuit_file(write_json(tmp_path / "g.json", content), GPT2)
    assert "g.json" in str(error.value)


def test_bad_pt_files_are_refused(tmp_path):
    path = tmp_path / "g.pt"

    def refused(message: str, **changes) -> None:
        Circuit(GPT2, frozenset()).save(path, "eap_pt")
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
        with pytest.raises(CircuitError, match=message) as error:
            read_circuit_file(path, GPT2)
        assert "g.pt" in str(error.value)

    refused(r"edges_in_graph is \(2, 2\), expected a tensor of shape \(7, 15\)",
            edges_in_graph=torch.zeros(2, 2))  # fmt: skip
    refused("edges_in_graph is int", edges_in_graph=3)
    for value in (float("nan"), 0.5, -1):
        refused("edges_in_graph has other values than true and false",
                edges_in_graph=torch.full((7, 15), value))  # fmt: skip
    flags = torch.zeros(7, 15)
    for tensor in (flags.to_sparse(), flags.to("meta"), flags.T, flags + 1j, [0]):
        refused("edges_in_graph is .* expected a tensor of shape", edges_in_graph=tensor)
        refused("edges_scores is .* expected a tensor of shape", edges_scores=tensor)
        refused(r"neurons_in_graph is .* of shape \(7, any\)", nodes_in_graph=flags[:, 0],
                neurons_in_graph=tensor[:5] if tensor is flags.T else tensor)  # fmt: skip
        refused(r"nodes_in_graph is .* of shape \(7,\)", nodes_in_graph=tensor,
                neurons_in_graph=flags)  # fmt: skip
    refused("'edgeprune' cannot be read", edgeprune={"graph": GPT2.to_dict(), "left_out": [],
            "scores": torch.zeros(GPT2.num_edges, device="meta")})  # fmt: skip
    refused("src_nodes and dst_nodes are not those", src_nodes=["input"])
    refused("circuits of neurons", nodes_in_graph=torch.ones(7),
            neurons_in_graph=torch.tensor([[1, 0]] * 7))  # fmt: skip
    torch.save({"cfg": {}}, path)
    with pytest.raises(CircuitError, match="it lacks src_nodes, dst_nodes"):
        read_circuit_file(path, GPT2)
    path.write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CircuitError, match="cannot be read as a .pt"):
        read_circuit_file(path, GPT2)


@pytest.mark.parametrize("format", ["edges", "eap_json"])
def test_no_json_is_written_that_would_be_read_as_tensors(tmp_path, format):
    circuit = Circuit.random(CircuitGraph(2, 2, 2, ("embeds",)), 5, seed=0)
    with pytest.raises(CircuitError, match="y.pt: a .pt file .* give format='eap_pt'"):
        circuit.save(tmp_path / "y.pt", format)
    assert not (tmp_path / "y.pt").exists()
    circuit.save(tmp_path / "y.pt", "eap_pt")
    assert Circuit.load(tmp_path / "y.pt", circuit.graph) == circuit


def test_code_in_a_pt_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"cfg": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"cfg": Evil()}, protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CircuitError, match="others may run code"):
            read_circuit_file(tmp_path / name, GPT2)
    assert not (tmp_path / "ran").exists()


def test_a_list_of_edges_may_stand_under_edges_as_tracr_has_it(tmp_path):
    (tmp_path / "truth.json").write_text('{"program": "x", "edges": [["tok_embeds", "m0"]]}')
    graph = CircuitGraph(1, 2, 2, ("tok_embeds", "pos_embeds"))
    assert Circuit.load(tmp_path / "truth.json", graph).edges == [("tok_embeds", "m0")]


@pytest.mark.parametrize("name", ["m99999999", "a99999999.h0", "a0.h99999999"])
def test_numbers_beyond_any_model_are_refused_before_a_graph_is_built(name, tmp_path):
    with pytest.raises(CircuitError, match=r"e\.json: a model of .* check its numbers"):
        infer_graph([("tok_embeds", "m0"), (name, "resid_post")], "e.json")
    path = tmp_path / "graph.json"
    path.write_text('{"cfg": {"n_layers": 99999999, "n_heads": 1}, "edges": {}}')
    with pytest.raises(CircuitError, match=r"of 99,999,999 layers of 1 heads"):
        read_circuit_file(path)
    assert infer_graph([("m199", "resid_post")], "e.json").num_layers == 200
