"""The graph's edges and their numbering, and the checks of its counts and sizes."""

import itertools
import math

import pytest

from edgeprune.errors import ConfigError
from edgeprune.graph import CircuitGraph

GPT2 = ("tok_embeds", "pos_embeds")


def brute_force(graph: CircuitGraph) -> set[tuple[str, str]]:
    """Edges by comparing times: embeddings at -1, the heads of layer l at 2l, its MLP at 2l + 1."""

    def layer(name: str) -> int:
        return int(name.split(".")[0][1:])

    def wrote(name: str) -> int:
        return -1 if "embeds" in name else 2 * layer(name) + (name[0] == "m")

    def reads(name: str) -> int:
        return 10**6 if name == "resid_post" else 2 * layer(name) + (name[0] == "m")

    return {(w, r) for w in graph.writers for r in graph.readers if wrote(w) < reads(r)}


@pytest.mark.parametrize(
    "graph",
    [
        CircuitGraph(layers, heads, kv, embeddings)
        for layers, (heads, kv), embeddings in itertools.product(
            (1, 2, 3), ((1, 1), (2, 2), (4, 2), (6, 1)), ((), ("embeds",), GPT2)
        )
    ],
    ids=str,
)
def test_edges_are_those_whose_writer_comes_first(graph):
    assert set(graph.edges) == brute_force(graph)
    assert len(graph.edges) == graph.num_edges == len(set(graph.edges))
    assert [graph.edge_index(edge) for edge in graph.edges] == list(range(graph.num_edges))
    assert [graph.writers[w] for w in graph.edge_writers()] == [w for w, _ in graph.edges]
    assert [graph.readers[r] for r in graph.edge_readers()] == [r for _, r in graph.edges]
    assert [i for own in graph.edges_into.values() for i in own] == list(range(graph.num_edges))


@pytest.mark.parametrize(
    ("graph", "edges"),
    [
        (CircuitGraph(12, 12, 12, GPT2), 32_936),
        (CircuitGraph(40, 40, 40, ("embeds",)), 3_877_661),
        (CircuitGraph(40, 40, 40, ()), 3_872_820),
        (CircuitGraph(30, 9, 3, ("embeds",)), 70_651),
        (CircuitGraph(5, 8, 4, ("embeds",)), 1_701),
        # As EAP-IG and MIB count them: only tokens write, and every query head has its own readers.
        (CircuitGraph(12, 12, 12, GPT2[:1]), 32_491),
        (CircuitGraph(24, 14, 14, ("embeds",)), 179_749),  # Qwen2.5-0.5B
        (CircuitGraph(26, 8, 8, ("embeds",)), 74_218),  # Gemma-2-2B
        (CircuitGraph(32, 32, 32, ("embeds",)), 1_592_881),  # Llama-3.1-8B
    ],
)
def test_edge_counts_of_known_models(graph, edges):
    assert graph.num_edges == edges


def test_gate_groups_cover_every_edge_once():
    graph = CircuitGraph(2, 4, 2, ())
    covered = [i for group in graph.gate_groups() for i in range(group.start, group.stop)]
    assert covered == list(range(graph.num_edges))
    first = graph.gate_groups()[0]  # layer 0 has no writers before it, so m0 comes first
    assert {graph.edges[i][1] for i in range(first.start, first.stop)} == {"m0"}
    nodes = [i for group in graph.node_groups() for i in range(group.start, group.stop)]
    assert nodes == list(range(graph.num_writers))


def test_unknown_and_impossible_edges_are_refused():
    graph = CircuitGraph(2, 2, 2, GPT2)
    for edge in (("a9.h0", "m0"), ("tok_embeds", "m7"), ("m0", "a0.h0.q"), ("m0", "m0")):
        with pytest.raises(ValueError):
            graph.edge_index(edge)
    with pytest.raises(ValueError, match="3 heads"):
        CircuitGraph(1, 3, 2, ())


def test_a_size_is_given_in_exactly_one_way():
    graph = CircuitGraph(2, 2, 2, GPT2)  # 61 edges
    assert graph.resolve_size(num_edges=61) == graph.resolve_size(sparsity=0.0) == 61
    assert graph.resolve_size(sparsity=0.9) == 6
    wrong_sizes = ((None, None), (3, 0.5), (62, None), (-1, None))
    wrong_sparsities = ((None, 1.1), (None, -0.1), (None, math.nan))
    for wrong in (*wrong_sizes, *wrong_sparsities):
        with pytest.raises(ConfigError):
            graph.resolve_size(*wrong)


@pytest.mark.parametrize("counts", [(0, 2, 2), (2, 2, 0), (2, -2, 2), (2, 2, 1.0), (True, 2, 2)])
def test_counts_are_positive_integers(counts):
    with pytest.raises(ValueError, match="positive"):
        CircuitGraph(*counts, GPT2)


def test_counts_beyond_any_model_are_refused_at_once():
    with pytest.raises(ValueError, match="1,000,000,000"):
        CircuitGraph(10**9, 1, 1, ())
    assert CircuitGraph(126, 128, 8, ("embeds",)).num_edges > 10**8  # Llama 3.1 405B


def test_key_and_value_readers_feed_every_head_of_their_group():
    graph = CircuitGraph(1, 6, 2, ())
    assert graph.nodes_fed_by("a0.h1.k") == ["a0.h3", "a0.h4", "a0.h5"]
    assert graph.nodes_fed_by("a0.h4.q") == ["a0.h4"]
    assert graph.nodes_fed_by("m0") == ["m0"]
    assert graph.nodes_fed_by("resid_post") == []
