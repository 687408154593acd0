import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_pairs
from omegaconf import OmegaConf

from edgeprune.circuit import Circuit
from edgeprune.config import AblationConfig, AblationKind
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import CircuitError, ConfigError
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.formats.eap import infer_graph, read_circuit_file
from edgeprune.graph import CircuitGraph
from edgeprune.paths import CONF

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))

PATH = {("tok_embeds", "a0.h1.v"), ("a0.h1", "m1"), ("m1", "resid_post")}
NEVER_FED = {("a1.h0", "resid_post")}
FED_BY_THE_NEVER_FED = {("m0", "a1.h1.q"), ("a1.h1", "resid_post")}
REACHES_NOTHING = {("pos_embeds", "m0"), ("tok_embeds", "a1.h0.k")}


def circuit(*parts: set) -> Circuit:
    return Circuit.from_edges(GRAPH, set().union(*parts))


def test_set_algebra():
    a, b = circuit(PATH), circuit(NEVER_FED, {("m1", "resid_post")})
    assert (a & b).edge_set == {("m1", "resid_post")}
    assert (a | b).edge_set == PATH | NEVER_FED
    assert (a - b).edge_set == PATH - {("m1", "resid_post")}
    assert len(a) == 3
    assert a.sparsity == 1 - 3 / GRAPH.num_edges


def test_circuits_of_different_graphs_do_not_mix():
    other = Circuit(CircuitGraph(3, 2, 2, ("tok_embeds", "pos_embeds")), frozenset())
    for operation in ("__and__", "__or__", "__sub__"):
        with pytest.raises(ValueError, match="different graphs"):
            getattr(circuit(PATH), operation)(other)


def test_a_circuit_holds_its_edges_in_the_order_of_the_graph():
    a = circuit(PATH, NEVER_FED)
    assert list(a) == a.edges
    assert ("m1", "resid_post") in a
    assert ["m1", "resid_post"] in a  # as JSON has it
    assert ("m0", "resid_post") not in a
    with pytest.raises(TypeError, match="got a list, expected a Circuit"):
        _ = a & a.edges


@pytest.mark.parametrize("size", [-1, GRAPH.num_edges + 1])
def test_a_random_circuit_has_no_more_edges_than_the_graph(size):
    with pytest.raises(ValueError, match=f"num_edges={size} is out of range: the graph has 61"):
        Circuit.random(GRAPH, size, seed=0)
    assert len(Circuit.random(GRAPH, GRAPH.num_edges, seed=0)) == GRAPH.num_edges


def test_mask_and_edges_are_in_the_order_of_the_graph():
    a = circuit(PATH, NEVER_FED)
    order = [edge for edge in GRAPH.edges if edge in a.edge_set]
    assert a.edges == order
    assert [edge for edge, kept in zip(GRAPH.edges, a.mask(), strict=True) if kept] == order
    assert Circuit.from_mask(GRAPH, a.mask()) == a
    with pytest.raises(ValueError, match="got 3 booleans for"):
        Circuit.from_mask(GRAPH, [True] * 3)


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ([PATH], PATH),
        ([PATH, NEVER_FED], PATH),
        ([PATH, REACHES_NOTHING], PATH),
        # m0 is fed only where REACHES_NOTHING is there too; then its edges live as well
        ([PATH, FED_BY_THE_NEVER_FED], PATH),
        (
            [PATH, FED_BY_THE_NEVER_FED, {("pos_embeds", "m0")}],
            PATH | FED_BY_THE_NEVER_FED | {("pos_embeds", "m0")},
        ),
        ([REACHES_NOTHING], set()),
        ([set()], set()),
    ],
)
def test_dangling_edges_by_hand(parts, kept):
    assert circuit(*parts).without_dangling().edge_set == kept


def test_dropping_dangling_edges_changes_no_output(model):
    pairs = random_pairs(20)
    dropped = 0
    for seed in range(10):
        whole = Circuit.random(model.graph, 40, seed)
        connected = whole.without_dangling()
        dropped += len(whole) - len(connected)
        a, b = (evaluate(model, c, pairs).circuit for c in (whole, connected))
        assert a.kl == pytest.approx(b.kl, abs=1e-5)
        assert a.logit_difference == pytest.approx(b.logit_difference, abs=1e-5)
    assert dropped > 50


def test_without_embedding_writers_every_node_is_fed():
    graph = CircuitGraph(2, 2, 2, ())
    edges = {("a1.h0", "resid_post"), ("a0.h0", "a1.h1.q")}
    kept = Circuit.from_edges(graph, edges).without_dangling().edge_set
    assert kept == {("a1.h0", "resid_post")}


def test_nodes_write_or_are_read_into():
    edges = {("tok_embeds", "a0.h1.v"), ("a0.h1", "m1")}
    assert circuit(edges).nodes == ["tok_embeds", "a0.h1", "m1"]
    grouped = CircuitGraph(1, 4, 2, ("embeds",))
    fed = Circuit.from_edges(grouped, {("embeds", "a0.h1.k")})
    assert fed.nodes == ["embeds", "a0.h2", "a0.h3"]
    one_writes = Circuit.from_edges(grouped, {("embeds", "a0.h1.k"), ("a0.h3", "resid_post")})
    assert one_writes.nodes == ["embeds", "a0.h3"]
    assert one_writes.nodes_fed_by("a0.h1.k") == ["a0.h3"]
    assert one_writes.nodes_fed_by("a0.h0.v") == ["a0.h0", "a0.h1"]


def test_random_circuits_are_seeded_and_of_the_size():
    a = Circuit.random(GRAPH, 7, seed=1)
    assert len(a) == 7
    assert a == Circuit.random(GRAPH, 7, seed=1) != Circuit.random(GRAPH, 7, seed=2)


def test_a_shuffled_circuit_is_the_same_between_other_heads():
    whole = circuit(PATH, {("tok_embeds", "m0"), ("a0.h0", "a1.h1.v")})
    found = {whole.shuffled(seed) for seed in range(20)}
    assert whole.shuffled(3) == whole.shuffled(3)
    assert 1 < len(found) <= 4  # two heads in each of two layers
    for other in found:
        assert len(other) == len(whole)
        assert len(other.without_dangling()) == len(whole.without_dangling())
        assert {("tok_embeds", "m0"), ("m1", "resid_post")} <= other.edge_set


def test_shuffling_keeps_query_heads_with_their_keys_and_values():
    graph = CircuitGraph(3, 6, 2, ("embeds",))
    for seed in range(50):
        whole = Circuit.random(graph, 60, seed)
        other = whole.shuffled(seed)
        assert other != whole
        for one, two in ((whole, other), (whole.without_dangling(), other.without_dangling())):
            assert (len(one), len(one.nodes)) == (len(two), len(two.nodes))


def test_edges_json_is_a_list_of_pairs_and_reads_back(tmp_path):
    a = circuit(PATH)
    a.save(tmp_path / "edges.json")
    assert json.loads((tmp_path / "edges.json").read_text()) == [list(e) for e in a.edges]
    assert Circuit.load(tmp_path / "edges.json", GRAPH) == a
    circuit().save(tmp_path / "empty.json")
    assert len(Circuit.load(tmp_path / "empty.json", GRAPH)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[", "not JSON"),
        ('{"a": 1}', "not a list of"),
        ('[["tok_embeds", "m0", 1]]', "not a list of"),
        ('[["tok_embeds", "m9"]]', "no circuit of this model.*m9"),
        ('[["m1", "m0"]]', "no circuit of this model"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "edges.json"
    path.write_text(text)
    with pytest.raises(CircuitError, match=message):
        Circuit.load(path, GRAPH)
    with pytest.raises(CircuitError, match="cannot read"):
        Circuit.load(tmp_path / "missing.json", GRAPH)


def test_a_graph_is_inferred_from_names_alone():
    assert infer_graph(list(PATH), "x") == GRAPH
    llama = infer_graph([("embeds", "a3.h5.q")], "x")
    assert (llama.num_layers, llama.num_heads) == (4, 6)
    assert llama.embedding_writers == ("embeds",)
    with pytest.raises(CircuitError, match="'h3' is not the name of a node"):
        infer_graph([("h3", "m0")], "x")


def test_failed_writes_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "edges.json"
    circuit(PATH).save(path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        circuit(NEVER_FED).save(path)
    assert read_circuit_file(path).edges == circuit(PATH).edges
    assert [p.name for p in tmp_path.iterdir()] == ["edges.json"]


def test_evaluation_of_all_and_no_edges_is_the_full_and_the_corrupted_model(model):
    pairs = random_pairs(20)
    whole = Circuit(model.graph, frozenset(model.graph.edges))
    result = evaluate(model, whole, pairs)
    assert result.circuit.kl == pytest.approx(0, abs=1e-5)
    assert result.circuit.exact_match == result.full.exact_match == 1
    assert result.circuit.logit_difference_recovered == pytest.approx(1, abs=1e-4)
    empty = evaluate(model, Circuit(model.graph, frozenset()), pairs)
    scores = empty.to_dict()  # None in place of NaN, which equals nothing
    assert scores["circuit"] == scores["corrupted"]
    # the fully corrupted circuit is the model on the corrupted prompts
    swapped = [type(p)(p.corrupted_ids, p.clean_ids, *list(vars(p).values())[2:]) for p in pairs]
    on_corrupted = evaluate(model, whole, swapped).full
    difference = pytest.approx(on_corrupted.logit_difference, abs=1e-4)
    assert empty.corrupted.logit_difference == difference
    assert empty.corrupted.accuracy == on_corrupted.accuracy


def test_rounding_makes_no_negative_kl(model, monkeypatch):
    pairs = random_pairs(20)
    whole = Circuit(model.graph, frozenset(model.graph.edges))
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "edgeprune.metrics.kl_per_token",
        lambda reference, _: -1e-9 * torch.rand(len(reference), generator=noise),
    )
    result = evaluate(model, whole, pairs)
    assert (result.circuit.kl, result.worst.kl) == (0, 0)


def test_lines_without_distractors_are_left_out_of_differences(model):
    with_distractors, others = random_pairs(6), random_pairs(3, seed=1)
    pairs = [*with_distractors, *(replace(p, answer_ids=(), distractor_ids=()) for p in others)]
    some = Circuit.random(model.graph, 60, seed=0)
    results = [evaluate(model, some, p) for p in (pairs, with_distractors)]
    assert [result.num_with_distractors for result in results] == [6, 6]
    assert [result.num_examples for result in results] == [9, 6]
    mixed, alone = (result.circuit for result in results)
    for name in ("logit_difference_recovered", "logit_difference", "two_way_accuracy"):
        assert getattr(mixed, name) == pytest.approx(getattr(alone, name), rel=1e-4)


def test_all_predicted_tokens_of_the_least_faithful_example_are_shown(model):
    """So the two texts are the same just where the example is an exact match."""
    model.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    some = Circuit.random(model.graph, 200, seed=0)
    found = set()
    for pair in random_pairs(12, predicted=3):
        result = evaluate(model, some, [pair])
        texts = result.worst.full_prediction, result.worst.circuit_prediction
        first, second = ([int(token) for token in text.split()] for text in texts)
        assert len(first) == len(second) == 3
        assert (first == second) == (result.circuit.exact_match == 1)
        found.add(first[0] == second[0] and first != second)
    assert found == {False, True}


def test_an_ablation_is_given_or_named(model):
    pairs = random_pairs(20)
    some = Circuit.random(model.graph, 60, seed=0)

    def measured(**settings) -> dict:
        return evaluate(model, some, pairs, **settings).to_dict()["circuit"]

    found = []
    for kind in AblationKind:
        settings = OmegaConf.load(CONF / f"ablation/{kind.name}.yaml")
        as_commanded = OmegaConf.to_object(OmegaConf.merge(AblationConfig, settings))
        found.append(measured(ablation=kind.name))
        assert found[-1] == measured(ablation=Ablation(model, as_commanded, pairs))
    assert measured() == found[0]
    assert found[0] != found[1] != found[2] != found[0]
    for wrong in ("noise", ["zero"], None):
        with pytest.raises(ConfigError, match="unknown ablation .*; choose interchange, zero"):
            evaluate(model, some, pairs, ablation=wrong)


def test_numbers_out_of_range_are_refused(model):
    pairs = random_pairs(2)
    some = Circuit.random(model.graph, 60, seed=0)
    for ablation in ("interchange", "mean"):
        with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
            evaluate(model, some, pairs, ablation=ablation, batch_size=0)
    with pytest.raises(ValueError, match="shuffled_circuits=-1 must be 0 or more"):
        evaluate(model, some, pairs, shuffled_circuits=-1)


def test_batch_size_does_not_change_an_evaluation(model):
    pairs = random_pairs(10, length=5) + random_pairs(13, length=9, predicted=2)
    some = Circuit.random(model.graph, 60, seed=0)
    one, other = (evaluate(model, some, pairs, batch_size=size) for size in (3, 64))
    assert one.circuit.kl == pytest.approx(other.circuit.kl, rel=1e-4)
    assert one.circuit.exact_match == other.circuit.exact_match
    assert one.num_examples == 23
    assert torch.isfinite(torch.tensor(one.circuit.kl))
