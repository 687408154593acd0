"""Circuits: set algebra, dangling edges, and circuits for comparison."""

import pytest
from conftest import random_pairs

from edgeprune.circuit import Circuit
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.graph import CircuitGraph

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
        with pytest.raises(ValueError, match="CircuitGraph"):
            getattr(circuit(PATH), operation)(other)


@pytest.mark.parametrize("size", [-1, GRAPH.num_edges + 1])
def test_a_random_circuit_has_no_more_edges_than_the_graph(size):
    with pytest.raises(ValueError, match=f"num_edges={size}"):
        Circuit.random(GRAPH, size, seed=0)
    assert len(Circuit.random(GRAPH, GRAPH.num_edges, seed=0)) == GRAPH.num_edges
    a = Circuit.random(GRAPH, 7, seed=1)
    assert a == Circuit.random(GRAPH, 7, seed=1) != Circuit.random(GRAPH, 7, seed=2)


def test_mask_and_edges_are_in_the_order_of_the_graph():
    a = circuit(PATH, NEVER_FED)
    order = [edge for edge in GRAPH.edges if edge in a.edge_set]
    assert list(a) == a.edges == order
    assert ["m1", "resid_post"] in a  # as JSON has it
    assert ("m0", "resid_post") not in a
    assert [edge for edge, kept in zip(GRAPH.edges, a.mask(), strict=True) if kept] == order
    assert Circuit.from_mask(GRAPH, a.mask()) == a
    with pytest.raises(ValueError):
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


def test_a_head_permuted_circuit_is_the_same_between_other_heads():
    whole = circuit(PATH, {("tok_embeds", "m0"), ("a0.h0", "a1.h1.v")})
    found = {whole.head_permuted(seed) for seed in range(20)}
    assert whole.head_permuted(3) == whole.head_permuted(3)
    assert 1 < len(found) <= 4  # two heads in each of two layers
    for other in found:
        assert len(other) == len(whole)
        assert len(other.without_dangling()) == len(whole.without_dangling())
        assert {("tok_embeds", "m0"), ("m1", "resid_post")} <= other.edge_set


def test_permuting_heads_keeps_query_heads_with_their_keys_and_values():
    graph = CircuitGraph(3, 6, 2, ("embeds",))
    for seed in range(50):
        whole = Circuit.random(graph, 60, seed)
        other = whole.head_permuted(seed)
        assert other != whole
        for one, two in ((whole, other), (whole.without_dangling(), other.without_dangling())):
            assert (len(one), len(one.nodes)) == (len(two), len(two.nodes))
