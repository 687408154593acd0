"""EdgeScores: the circuits cut from them, and their files."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgeprune.circuit import Circuit
from edgeprune.errors import CircuitError
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

GRAPH = CircuitGraph(1, 2, 1, ("embeds",))
EDGES = GRAPH.edges
"""11 edges."""


def scores(values: dict[int, float], **more) -> EdgeScores:
    """Scores of the edges with these indices; 0 for the others."""
    return EdgeScores(GRAPH, torch.tensor([values.get(i, 0.0) for i in range(len(EDGES))]), **more)


def test_the_highest_ranked_edges_are_kept():
    values = {3: 2.0, 7: -5.0, 1: 1.0}
    assert scores(values).ranking()[:2].tolist() == [3, 1]
    assert scores(values).ranking()[-1] == 7
    found = scores(values, by_magnitude=True).circuit(num_edges=2)
    assert found == Circuit.from_edges(GRAPH, [EDGES[3], EDGES[7]])


def test_ties_are_broken_by_the_order_of_the_graph():
    assert scores({5: 1.0}).ranking().tolist() == [5, *range(5), *range(6, len(EDGES))]
    tied = scores({2: 1.0, 9: -1.0}, by_magnitude=True)
    assert tied.circuit(num_edges=1).edges == [EDGES[2]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([-1e9, -3.0, -0.5, 0.0, 0.5, 40.0]), min_size=11, max_size=11),
    st.booleans(),
)
def test_smaller_circuits_are_contained_in_larger_ones(values, by_magnitude):
    found = EdgeScores(GRAPH, torch.tensor(values), by_magnitude)
    circuits = [found.circuit(num_edges=size) for size in range(len(EDGES) + 1)]
    assert [len(circuit) for circuit in circuits] == list(range(len(EDGES) + 1))
    for small, large in zip(circuits, circuits[1:], strict=False):
        assert small.edge_set < large.edge_set


def test_magnitudes_rank_edges_as_the_scores_do():
    values = {3: 2.0, 7: -5.0, 1: 1.0}
    learned, attributed = scores(values), scores(values, by_magnitude=True)
    assert learned.magnitudes()[[3, 0]].tolist() == pytest.approx([1 / (1 + 2.718281828**-2), 0.5])
    assert attributed.magnitudes().equal(attributed.values)
    again = EdgeScores(GRAPH, learned.magnitudes(), by_magnitude=True)
    assert again.ranking().equal(learned.ranking())


def test_a_file_holds_values_graph_and_origin(tmp_path):
    found = scores({3: 1 / 3, 7: -5.0}, by_magnitude=True, origin={"method": "x", "steps": [1]})
    found.save(tmp_path / "scores.safetensors")
    read = EdgeScores.load(tmp_path / "scores.safetensors")
    assert read.values.equal(found.values) and read.values.dtype == torch.float64
    assert (read.graph, read.by_magnitude, read.origin) == (GRAPH, True, found.origin)


def test_bad_scores_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[3\]"):
        EdgeScores(GRAPH, torch.zeros(3))
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="1 scores are"):
            scores({0: wrong})
    path = tmp_path / "scores.safetensors"
    with pytest.raises(CircuitError):
        EdgeScores.load(path)
    path.write_bytes(b"damaged")
    with pytest.raises(CircuitError):
        EdgeScores.load(path)
    save_file({"scores": torch.zeros(len(EDGES))}, path)  # without a graph
    with pytest.raises(CircuitError):
        EdgeScores.load(path)
