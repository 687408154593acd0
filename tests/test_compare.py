"""Comparing circuits: by hand, and as properties."""

import json
import math

import pytest
from conftest import call, fake_run
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.evaluation.compare import (
    agreement,
    compare,
    comparison_tables,
    consensus,
    kinds_of_heads,
    overlap,
    parts,
    times_kept,
)
from edgeprune.graph import CircuitGraph

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))
ONE, TWO, THREE, FOUR = (
    ("tok_embeds", "a0.h1.v"), ("a0.h1", "resid_post"), ("tok_embeds", "m0"), ("m0", "resid_post"),
)  # fmt: skip


def circuit(*edges) -> Circuit:
    return Circuit.from_edges(GRAPH, edges)


@st.composite
def several(draw) -> list[Circuit]:
    few = st.sets(st.sampled_from(GRAPH.edges), max_size=12)
    return [circuit(*edges) for edges in draw(st.lists(few, min_size=1, max_size=5))]


def test_overlap_and_agreement_by_hand():
    a, b = circuit(ONE, TWO), circuit(ONE, THREE, FOUR)
    found = overlap(a, b)
    assert (found["shared_edges"], found["edge_iou"]) == (1, 1 / 4)
    # tok_embeds and a0.h1 against tok_embeds, a0.h1 and m0
    assert (found["shared_nodes"], found["node_iou"]) == (2, 2 / 3)
    assert list(agreement(a.edge_set, b.edge_set).values()) == [1 / 2, 1 / 3, 2 / 5]
    assert list(agreement(set(), b.edge_set).values()) == [None, 0, 0]
    assert list(agreement(set(), set()).values()) == [None, None, None]
    assert overlap(circuit(), circuit())["edge_iou"] == 1
    assert overlap(circuit(), a)["edge_iou"] == 0


def test_iou_by_chance_is_that_of_random_circuits():
    some, others = (
        [Circuit.random(GRAPH, number, seed) for seed in range(first, first + 300)]
        for number, first in ((20, 0), (30, 1000))
    )
    found = [overlap(a, b) for a, b in zip(some, others, strict=True)]
    mean = sum(pair["edge_iou"] for pair in found) / len(found)
    assert found[0]["edge_iou_by_chance"] == pytest.approx(mean, abs=0.02)


def test_an_edge_that_dangles_in_one_circuit_can_be_connected_in_another():
    """Both have the first edge, but in the second it leads nowhere."""
    result = compare({"a": circuit(ONE, TWO), "b": circuit(ONE, THREE, FOUR)})
    (pair,) = result["pairs"]
    assert (pair["shared_edges"], pair["edge_iou"]) == (1, 1 / 4)
    assert result["connected"] == {
        "intersection": 0, "union": 4, "only_here": {"a": 2, "b": 2},
    }  # fmt: skip
    assert (pair["connected"]["shared_edges"], pair["connected"]["edge_iou"]) == (0, 0)
    chance = 4 / GRAPH.num_edges
    assert pair["connected"]["edge_iou_by_chance"] == pytest.approx(chance / (4 - chance))
    sizes, overlaps, connected = comparison_tables(result)
    assert sizes.rows == [
        ["a", "0.9672", "2", "2", "1", "2", "2", "2"],
        ["b", "0.9508", "3", "3", "2", "2", "2", "2"],
        ["intersection", "0.9836", "1", "", "", "0", "", ""],
        ["union", "0.9344", "4", "", "", "4", "", ""],
    ]
    assert overlaps.rows == [["a", "b", "1", "0.250", "0.020", "2", "0.667"]]
    assert connected.rows == [["a", "b", "0", "0.000", "0.017", "1", "0.333"]]


def test_three_circuits_by_hand():
    circuits = {"a": circuit(ONE, TWO), "b": circuit(ONE, TWO, THREE), "c": circuit(ONE, FOUR)}
    assert parts(circuits) == {
        "intersection": circuit(ONE), "union": circuit(ONE, TWO, THREE, FOUR),
        "only-a": circuit(), "only-b": circuit(THREE), "only-c": circuit(FOUR),
    }  # fmt: skip
    assert consensus(list(circuits.values())) == circuit(ONE, TWO)
    assert consensus([circuit(ONE, TWO), circuit(ONE)]) == circuit(ONE)  # half is not enough
    assert list(times_kept(list(circuits.values())).items())[:2] == [(ONE, 3), (TWO, 2)]
    result = compare(circuits, reference="b")
    assert [(p["a"], p["b"], p["edge_iou"]) for p in result["pairs"]] == [
        ("a", "b", 2 / 3), ("a", "c", 1 / 3), ("b", "c", 1 / 4),
    ]  # fmt: skip
    assert result["agreement"]["a"]["edges"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert set(result["agreement"]) == {"a", "c"}
    assert {name: c["only_here"] for name, c in result["circuits"].items()} == {
        "a": 0, "b": 1, "c": 1,
    }  # fmt: skip
    assert comparison_tables(result)[-1].rows[0][:4] == ["a", "1.000", "0.667", "0.800"]


def test_kinds_of_heads_are_counted_whatever_the_circuits_are_called():
    circuits = {"model": circuit(ONE, TWO), "all": circuit(THREE, FOUR)}
    labels = {"a0.h1": ["induction", "copying"], "a1.h0": ["induction"]}
    result = compare(circuits) | {"kinds_of_heads": kinds_of_heads(labels, circuits)}
    assert comparison_tables(result)[-1].rows == [
        ["induction", "2", "1", "0", "0"], ["copying", "1", "1", "0", "0"]
    ]  # fmt: skip


def test_circuits_that_cannot_be_compared_are_errors():
    other = Circuit(CircuitGraph(3, 2, 2, ("tok_embeds", "pos_embeds")), frozenset())
    with pytest.raises(ValueError, match="CircuitGraph"):
        compare({"a": circuit(), "b": other})
    with pytest.raises(ValueError, match="CircuitGraph"):
        consensus([circuit(), other])
    with pytest.raises(KeyError, match="'c'"):
        compare({"a": circuit(), "b": circuit()}, reference="c")
    for function, none in ((compare, {}), (consensus, [])):
        with pytest.raises(ValueError, match="no circuits"):
            function(none)
    for function, wrong in ((compare, [circuit()]), (compare, {"a": "b"}), (consensus, ["a"])):
        with pytest.raises(TypeError, match="expected"):
            function(wrong)


@settings(deadline=None)
@given(circuits=several())
def test_parts_add_up_to_the_union(circuits):
    found = parts({str(number): c for number, c in enumerate(circuits)})
    shared, every = found["intersection"], found["union"]
    assert shared.edge_set <= consensus(circuits).edge_set <= every.edge_set
    counts = times_kept(circuits)
    assert sum(counts.values()) == sum(map(len, circuits))
    only = [len(part) for name, part in found.items() if name.startswith("only-")]
    assert sum(only) == sum(count == 1 for count in counts.values())
    for a in circuits:
        for b in circuits:
            ab = overlap(a, b)
            assert ab == overlap(b, a)
            assert 0 <= ab["edge_iou"] <= 1
            assert (ab["edge_iou"] == 1) == (a == b)
            f1 = agreement(a.edge_set, b.edge_set)["f1"]
            if f1 is not None and ab["edge_iou"]:  # Dice and Jaccard
                assert math.isclose(f1, 2 * ab["edge_iou"] / (1 + ab["edge_iou"]))


def test_command_compare_writes_measures_draws_and_parts(tmp_path, capsys, monkeypatch):
    runs = [
        fake_run(tmp_path / "a", circuit(ONE, TWO)),
        fake_run(tmp_path / "b", circuit(ONE, THREE, FOUR)),
    ]
    output = tmp_path / "comparison"
    code, out, err = call(capsys, monkeypatch, "compare", *runs, f"reference={runs[1]}",
                          "formats=[dot]", f"output={output}")  # fmt: skip
    assert code == 0, err
    assert "edge IoU" in out
    result = json.loads((output / "comparison.json").read_text())
    assert list(result["circuits"]) == ["a", "b"]
    assert [pair["edge_iou"] for pair in result["pairs"]] == [1 / 4]
    assert result["agreement"]["a"]["edges"]["precision"] == 1 / 2
    parts = {"intersection": {ONE}, "union": {ONE, TWO, THREE, FOUR}, "only-a": {TWO}}
    for name, edges in parts.items():
        written = json.loads((output / name / "edges.json").read_text())
        assert set(map(tuple, written)) == edges
        origin = json.loads((output / name / "circuit.json").read_text())["origin"]
        assert origin["chosen_by"] == f"{name} of a, b"
    dot = (output / "comparison.dot").read_text()  # ONE is connected only in a
    assert "shared" not in dot
    assert "only a (2)" in dot and "only b (2)" in dot
