"""Comparing circuits: by hand, as properties, and as a command."""

import json
import math

import pytest
from conftest import call, fake_run, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edgeprune.circuit import Circuit
from edgeprune.commands.compare import Name, labels_of
from edgeprune.commands.shared import find_circuit
from edgeprune.evaluation.compare import (
    Agreement,
    Overlap,
    compare,
    consensus,
    intersection,
    iou_by_chance,
    only_in,
    times_kept,
    union,
)
from edgeprune.formats.eap import read_circuit_file
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


# ---------------------------------------------------------------------------------------- by hand


def test_overlap_and_agreement_by_hand():
    a, b = circuit(ONE, TWO), circuit(ONE, THREE, FOUR)
    overlap = Overlap.of(a, b)
    assert (overlap.shared_edges, overlap.edge_iou) == (1, 1 / 4)
    # tok_embeds and a0.h1 against tok_embeds, a0.h1 and m0
    assert (overlap.shared_nodes, overlap.node_iou) == (2, 2 / 3)
    assert Agreement.of(a.edge_set, b.edge_set) == Agreement(1 / 2, 1 / 3, 2 / 5)
    assert Agreement.of(set(), b.edge_set) == Agreement(None, 0, 0)
    assert Agreement.of(set(), set()) == Agreement(None, None, None)
    assert Overlap.of(circuit(), circuit()).edge_iou == 1
    assert Overlap.of(circuit(), a).edge_iou == 0


def test_nodes_of_a_shared_key_value_head_count_as_nodes():
    grouped = CircuitGraph(1, 4, 2, ("embeds",))
    a = Circuit.from_edges(grouped, {("embeds", "a0.h1.k")})  # embeds, a0.h2, a0.h3
    b = Circuit.from_edges(grouped, {("embeds", "a0.h3.q")})  # embeds, a0.h3
    overlap = Overlap.of(a, b)
    assert (overlap.shared_edges, overlap.edge_iou) == (0, 0.0)
    assert (overlap.shared_nodes, overlap.node_iou) == (2, 2 / 3)


def test_iou_by_chance_is_that_of_random_circuits():
    assert iou_by_chance(0, 0, 10) == 1
    assert iou_by_chance(4, 5, 10) == 2 / 7
    assert iou_by_chance(10, 10, 10) == 1
    a, b = (
        [Circuit.random(GRAPH, number, seed) for seed in range(first, first + 300)]
        for number, first in ((20, 0), (30, 1000))
    )
    overlaps = [Overlap.of(one, other) for one, other in zip(a, b, strict=True)]
    drawn = sum(overlap.edge_iou for overlap in overlaps) / len(overlaps)
    assert overlaps[0].edge_iou_by_chance == pytest.approx(drawn, abs=0.02)


def test_connected_edges_count_for_the_circuit_in_which_they_are():
    """The first edge is in both, but in the other it leads nowhere."""
    result = compare({"a": circuit(ONE, TWO), "b": circuit(ONE, THREE, FOUR)})
    (pair,) = result["pairs"]
    assert (pair["shared_edges"], pair["edge_iou"]) == (1, 1 / 4)
    assert result["connected"] == {
        "intersection": 0, "union": 4, "only_here": {"a": 2, "b": 2},
    }  # fmt: skip
    assert (pair["connected"]["shared_edges"], pair["connected"]["edge_iou"]) == (0, 0)
    chance = 4 / GRAPH.num_edges
    assert pair["connected"]["edge_iou_by_chance"] == pytest.approx(chance / (4 - chance))


def test_three_circuits_by_hand():
    circuits = {"a": circuit(ONE, TWO), "b": circuit(ONE, TWO, THREE), "c": circuit(ONE, FOUR)}
    assert intersection(circuits.values()) == circuit(ONE)
    assert union(circuits.values()) == circuit(ONE, TWO, THREE, FOUR)
    assert only_in("a", circuits) == circuit()
    assert only_in("b", circuits) == circuit(THREE)
    assert consensus(list(circuits.values())) == circuit(ONE, TWO)
    assert list(times_kept(list(circuits.values())).items())[:2] == [(ONE, 3), (TWO, 2)]
    assert consensus([circuit(ONE, TWO), circuit(ONE)]) == circuit(
        ONE
    )  # half is not more than half
    result = compare(circuits, reference="b")
    assert [(p["a"], p["b"], p["edge_iou"]) for p in result["pairs"]] == [
        ("a", "b", 2 / 3), ("a", "c", 1 / 3), ("b", "c", 1 / 4),
    ]  # fmt: skip
    assert result["agreement"]["a"]["edges"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert set(result["agreement"]) == {"a", "c"}
    assert {name: c["only_here"] for name, c in result["circuits"].items()} == {
        "a": 0, "b": 1, "c": 1,
    }  # fmt: skip


def test_circuits_of_different_graphs_are_refused():
    other = Circuit(CircuitGraph(3, 2, 2, ("tok_embeds", "pos_embeds")), frozenset())
    with pytest.raises(ValueError, match="different graphs"):
        compare({"a": circuit(), "b": other})
    with pytest.raises(ValueError, match="different graphs"):
        consensus([circuit(), other])


@settings(deadline=None)
@given(circuits=several())
def test_parts_make_up_the_union(circuits):
    named = {str(number): c for number, c in enumerate(circuits)}
    shared, all_edges = intersection(circuits), union(circuits)
    agreed = consensus(circuits)
    assert shared.edge_set <= agreed.edge_set <= all_edges.edge_set
    assert times_kept(circuits).total() == sum(map(len, circuits))
    only = [only_in(name, named).edge_set for name in named]
    assert sum(map(len, only)) == sum(count == 1 for count in times_kept(circuits).values())
    for a in circuits:
        for b in circuits:
            ab, ba = Overlap.of(a, b), Overlap.of(b, a)
            assert ab == ba
            assert 0 <= ab.edge_iou <= 1
            assert (ab.edge_iou == 1) == (a == b)
            found = Agreement.of(a.edge_set, b.edge_set)
            if found.f1 is not None and ab.edge_iou:  # Dice and Jaccard
                assert math.isclose(found.f1, 2 * ab.edge_iou / (1 + ab.edge_iou))


def test_no_circuits_and_what_are_none_are_refused():
    some = circuit(ONE)
    for function in (consensus, intersection, union, times_kept):
        with pytest.raises(ValueError, match="got no circuits, expected at least one"):
            function([])
        with pytest.raises(TypeError, match="got a list, expected a Circuit"):
            function([some, some.edges])
    with pytest.raises(TypeError, match="got a list, expected circuits by name"):
        compare([some, some])
    with pytest.raises(ValueError, match="got no circuits"):
        compare({})
    with pytest.raises(TypeError, match="got a list, expected a Circuit"):
        compare({"a": some, "b": [ONE]})
    with pytest.raises(ValueError, match="unknown reference 'c'; choose a, b"):
        compare({"a": some, "b": some}, reference="c")


def test_labels_tell_paths_apart(tmp_path):
    def labels(*names: str) -> list[str]:
        return labels_of([tmp_path / name for name in names])

    assert labels("seed-0/edges.json", "seed-1/edges.json") == ["seed-0", "seed-1"]
    assert labels("a/seed-0/edges.json", "b/seed-0/edges.json") == ["a-seed-0", "b-seed-0"]
    assert labels("a/g.json", "a/other.pt") == ["g", "other"]
    assert labels("<a>/edges.json", "g v2.json") == ["-a-", "g-v2"]
    with pytest.raises(ValueError, match="given twice"):
        labels("a/edges.json", "b/../a/edges.json")


# ------------------------------------------------------------------------------------ the command


def test_compare_runs_files_and_graphs(tmp_path):
    """In a fresh process: a grouped graph, of which the run alone knows how it is grouped."""
    graph = CircuitGraph(1, 4, 2, ("embeds",))
    shared = ("embeds", "a0.h1.k")
    a = Circuit.from_edges(graph, {shared, ("embeds", "a0.h0.q"), ("a0.h2", "resid_post")})
    b = Circuit.from_edges(graph, {shared, ("a0.h2", "resid_post"), ("a0.h3", "resid_post")})
    run = fake_run(tmp_path / "runs/a", a)
    b.save(tmp_path / "b.json")
    b.save(tmp_path / "b.pt", "eap_pt")
    output = tmp_path / "comparison"
    done = run_cli("compare", run, tmp_path / "b.pt", f"reference={tmp_path / 'b.json'}",
                   f"output={output}", "formats=[dot,svg]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "comparison.json").read_text())
    assert list(result["circuits"]) == ["a", "b.pt", "b.json"]
    assert result["reference"] == "b.json"
    assert [pair["edge_iou"] for pair in result["pairs"]] == [1 / 2, 1 / 2, 1]
    assert result["agreement"]["a"]["edges"] == {
        "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3,
    }  # fmt: skip
    for name, edges in {"intersection": a & b, "union": a | b, "only-a": a - b}.items():
        assert Circuit.load(output / name / "edges.json", graph) == edges
    dot = (output / "comparison.dot").read_text()
    assert "embeds -> a0_h2:k" in dot  # the group's heads
    assert "embeds -> a0_h3:k" in dot
    assert "shared (2)" in dot
    assert "edge IoU" in done.stdout
    # a part knows its run, and so how heads are grouped
    done = run_cli("draw", output / "intersection", "formats=[dot]", "dangling=true")
    assert done.returncode == 0, done.stderr
    dot = (output / "intersection/circuit.dot").read_text()
    assert "ioi in tiny" in dot
    assert "embeds -> a0_h2:k" in dot


def test_the_drawing_counts_what_the_table_counts(tmp_path, capsys, monkeypatch):
    """An edge that both have is of that circuit alone in which it is connected."""
    runs = [
        fake_run(tmp_path / "a", circuit(ONE, TWO)),
        fake_run(tmp_path / "b", circuit(ONE, THREE, FOUR)),
    ]
    code, out, err = call(capsys, monkeypatch, "compare", *runs, "formats=[dot]",
                          f"output={tmp_path / 'c'}")  # fmt: skip
    assert code == 0, err
    dot = (tmp_path / "c/comparison.dot").read_text()
    assert "shared" not in dot
    assert "only a (2)" in dot and "only b (2)" in dot
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["a", "2", "0.9672", "2", "1", "2", "2", "2"] in rows
    assert ["b", "3", "0.9508", "3", "2", "2", "2", "2"] in rows
    assert ["all of them", "1", "0.9836", "", "", "0", "", ""] in rows
    assert ["any of them", "4", "0.9344", "", "", "4", "", ""] in rows
    assert ["a", "b", "1", "0.250", "0.020", "2", "0.667"] in rows
    assert ["a", "b", "0", "0.000", "0.017", "1", "0.333"] in rows


def test_without_a_run_the_graph_is_the_smallest_that_fits_all(tmp_path, capsys, monkeypatch):
    circuit(ONE, TWO).save(tmp_path / "a.json")
    circuit(ONE, ("a1.h1", "resid_post")).save(tmp_path / "b.json")
    code, out, err = call(capsys, monkeypatch, "compare", tmp_path / "a.json", tmp_path / "b.json",
                          f"output={tmp_path / 'c'}", "formats=[]")  # fmt: skip
    assert code == 0, err
    assert "2 layers of 2 heads" in err
    assert f"of {GRAPH.num_edges} edges" in out
    content = {
        "cfg": {"n_layers": 2, "n_heads": 2},
        "edges": {"input->a0.h1<v>": {"in_graph": True}},
    }
    (tmp_path / "eap.json").write_text(json.dumps(content))
    code, _, err = call(capsys, monkeypatch, "compare", tmp_path / "a.json", tmp_path / "eap.json",
                        f"output={tmp_path / 'd'}", "formats=[]")  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "d/comparison.json").read_text())
    assert [c["num_edges"] for c in result["circuits"].values()] == [2, 2]
    assert result["pairs"][0]["shared_edges"] == 1


def test_wrong_usage(tmp_path, capsys, monkeypatch):
    def refused(code: int, *wanted: str, paths=(), **settings) -> None:
        given = [f"{key}={value}" for key, value in settings.items()]
        got, _, err = call(capsys, monkeypatch, "compare", *paths, "formats=[]", *given,
                           f"output={tmp_path / 'out'}")  # fmt: skip
        assert got == code, err
        lines = [line for line in err.splitlines() if line.startswith("edgeprune: ")]
        assert len(lines) == 1
        for text in wanted:
            assert text in lines[0]

    run = fake_run(tmp_path / "run", circuit(ONE))
    grouped = fake_run(
        tmp_path / "grouped", Circuit(CircuitGraph(1, 4, 2, ("embeds",)), frozenset())
    )
    pt = tmp_path / "other.pt"
    Circuit(CircuitGraph(3, 2, 2, ("embeds",)), frozenset()).save(pt, "eap_pt")
    (tmp_path / "broken.json").write_text("[[")
    (tmp_path / "unknown.json").write_text('[["a7.h0", "resid_post"]]')
    refused(2, "give paths: edgeprune compare PATH PATH")
    refused(2, "formats has 'gif'; choose of pdf, svg, png, dot", paths=[run, pt], formats="[gif]")
    refused(2, "got 1 circuit to compare, expected two or more", paths=[run])
    refused(2, "no such file or directory", "nowhere", paths=[run, "nowhere"])
    refused(2, "is given twice", paths=[run, run / "edges.json"])
    refused(2, "different graphs", "num_kv_heads=2", paths=[run, grouped])
    refused(2, "different graphs", "num_layers=3", paths=[run, pt])
    refused(1, "broken.json is not JSON", paths=[run, tmp_path / "broken.json"])
    refused(1, "unknown.json is no circuit of this model", "'a7.h0'",
            paths=[run, tmp_path / "unknown.json"])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_reference_is_one_of_the_circuits_however_it_is_written(tmp_path, capsys, monkeypatch):
    runs = [fake_run(tmp_path / n, circuit(e)) for n, e in zip("ab", (ONE, TWO), strict=True)]
    for reference in (f"{runs[0]}/", runs[0] / "edges.json"):
        settings = (f"reference={reference}", f"output={tmp_path / 'out'}", "formats=[]")
        code, _, err = call(capsys, monkeypatch, "compare", *runs, *settings)
        assert code == 0, err
        assert len(json.loads((tmp_path / "out/comparison.json").read_text())["circuits"]) == 2


def test_paths_with_spaces_commas_and_equals_signs(tmp_path, capsys, monkeypatch):
    paths = [fake_run(tmp_path / name, circuit(ONE)) for name in ("a b, [c]", "seed=1", "it's")]
    code, _, err = call(capsys, monkeypatch, "compare", *paths, "formats=[]",
                        f"output={tmp_path / 'out'}")  # fmt: skip
    assert code == 0, err
    names = json.loads((tmp_path / "out/comparison.json").read_text())["circuits"]
    assert list(names) == ["a-b---c-", "seed=1", "it-s"]


def test_export_converts_files_and_back(tmp_path, capsys, monkeypatch):
    whole = circuit(ONE, TWO, ("pos_embeds", "m0"))
    run = fake_run(tmp_path / "run", whole)

    def export(*arguments) -> None:
        code, _, err = call(capsys, monkeypatch, "export", *arguments)
        assert code == 0, err

    export(run / "edges.json", f"output={tmp_path / 'g.pt'}")
    export(tmp_path / "g.pt", "format=eap_json", f"output={tmp_path / 'g.json'}")
    export(tmp_path / "g.json", f"output={tmp_path / 'edges.json'}")
    assert Circuit.load(tmp_path / "edges.json", GRAPH) == whole
    assert (tmp_path / "edges.json").read_text() == (run / "edges.json").read_text()
    assert json.loads((tmp_path / "g.json").read_text())["cfg"]["n_layers"] == 2
    code, _, err = call(capsys, monkeypatch, "export", tmp_path / "g.pt")
    assert code == 2
    assert "Give output=FILE" in err
    code, _, err = call(capsys, monkeypatch, "export", tmp_path / "g.pt", "cleanup=0.5")
    assert code == 2
    assert "need a run directory" in err


def test_export_cuts_a_circuit_from_the_scores_of_a_graph(tmp_path, capsys, monkeypatch):
    scores = [float(number) for number in range(GRAPH.num_edges)]
    circuit().save(tmp_path / "g.pt", "eap_pt", scores=scores, d_model=8)
    last = GRAPH.edges[-6:]

    def export(source: str, *arguments) -> tuple[int, str]:
        code, _, err = call(capsys, monkeypatch, "export", tmp_path / source, *arguments)
        return code, err

    assert export("g.pt", "num_edges=6", f"output={tmp_path / 'e.json'}") == (0, "")
    assert Circuit.load(tmp_path / "e.json", GRAPH) == circuit(*last)
    output = f"output={tmp_path / 'f.json'}"
    assert export("g.pt", "sparsity=0.9", output, "format=eap_json") == (0, "")
    file = read_circuit_file(tmp_path / "f.json")
    assert (set(file.edges), file.d_model) == (set(last), 8)
    assert file.scores == read_circuit_file(tmp_path / "g.pt").scores
    code, err = export("g.pt", f"output={tmp_path / 'none.json'}")
    assert code == 0
    assert "choose edges by score: `edgeprune export FILE num_edges=" in err
    code, err = export("g.pt", "num_edges=62", f"output={tmp_path / 'h.json'}")
    assert code == 2
    assert "num_edges=62 is out of range: the graph has 61 edges" in err
    code, err = export("e.json", "num_edges=2", f"output={tmp_path / 'h.json'}")
    assert code == 2
    assert "e.json has no score for every edge" in err


def test_an_exported_file_is_read_with_the_graph_of_its_run(tmp_path, capsys, monkeypatch):
    """Else key/value head 1 of four heads in two groups would be taken for that of head 1."""
    graph = CircuitGraph(2, 4, 2, ("embeds",))
    whole = Circuit.from_edges(graph, [("embeds", "a0.h1.k"), ("a0.h2", "resid_post")])
    run = fake_run(tmp_path / "run", whole)
    folder = tmp_path / "elsewhere"

    def edgeprune(*arguments) -> tuple[str, str]:
        code, out, err = call(capsys, monkeypatch, *arguments)
        assert code == 0, err
        return out, err

    edgeprune("export", run / "edges.json", f"output={folder / 'a.json'}")
    onto = ("export", folder / "a.json", f"output={run / 'edges.json'}")
    assert "is the circuit of a run" in call(capsys, monkeypatch, *onto)[2]
    link = tmp_path / "link.json"
    link.symlink_to(run / "edges.json")
    onto = ("export", folder / "a.json", f"output={link}")
    assert "is the circuit of a run" in call(capsys, monkeypatch, *onto)[2]
    edgeprune("export", folder / "a.json", f"output={folder / 'b.pt'}")
    edgeprune("export", folder / "b.pt", f"output={folder / 'edges.json'}")
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.json", "a.json.origin", "b.pt", "edges.json", "edges.json.origin",
    ]  # fmt: skip
    assert Circuit.load(folder / "b.pt", graph) == whole
    for name, drawing in (("a.json", "a.dot"), ("edges.json", "circuit.dot")):
        out, err = edgeprune("draw", folder / name, "formats=[dot]")
        assert "drew 2 edges between 2 nodes" in out
        assert not err
        assert "embeds -> a0_h2:k" in (folder / drawing).read_text()
    assert find_circuit(str(folder / "a.json")) == (folder / "a.json", folder / "../run")
    # a file that was changed since, or of which nothing is known, is not read with that graph
    (folder / "a.json").write_text('[["embeds", "a0.h2.q"], ["a0.h2", "resid_post"]]')
    _, err = edgeprune("draw", folder / "a.json", "formats=[dot]")
    assert "does not say which model it is of" in err
    code, _, err = call(capsys, monkeypatch, "export", folder / "a.json",
                        f"output={folder / 'c.pt'}")  # fmt: skip
    assert code == 2
    assert "does not say which model it is of, but a graph holds all of its edges" in err
    assert not (folder / "c.pt").exists()


def test_a_graph_of_which_the_grouping_is_a_guess_is_said(tmp_path, capsys, monkeypatch):
    content = {"cfg": {"n_layers": 1, "n_heads": 2}, "edges": {"a0.h1->logits": {"in_graph": True}}}
    (tmp_path / "g.json").write_text(json.dumps(content))
    code, _, err = call(capsys, monkeypatch, "export", tmp_path / "g.json",
                        f"output={tmp_path / 'e.json'}")  # fmt: skip
    assert code == 0, err
    assert "does not say whether heads share keys and values" in err
    assert not (tmp_path / "e.json.origin").exists()


def test_circuits_of_different_tasks_are_measured_on_none_unasked(tmp_path, capsys, monkeypatch):
    runs = [
        fake_run(tmp_path / name, circuit(ONE, TWO), f"of {name}", task={"name": name})
        for name in ("ioi", "induction")
    ]
    again = fake_run(tmp_path / "again", circuit(ONE), "of ioi", task={"name": "ioi"}, seed=1)
    output = tmp_path / "out"

    def compare_(*paths) -> str:
        code, _, err = call(capsys, monkeypatch, "compare", *paths, "formats=[dot]",
                            f"output={output}")  # fmt: skip
        assert code == 0, err
        return (output / "comparison.dot").read_text()

    assert "<B>ioi in tiny, induction in tiny</B>" in compare_(*runs)
    assert json.loads((output / "union/circuit.json").read_text())["run"] is None
    code, _, err = call(capsys, monkeypatch, "evaluate", output / "union")
    assert code == 2
    assert "is of no run, or of several that differ in model or task, so give both" in err
    assert "<B>ioi in tiny</B>" in compare_(runs[0], again)
    assert json.loads((output / "union/circuit.json").read_text())["run"] == "../../ioi"


def test_a_second_comparison_leaves_nothing_of_the_first(tmp_path, capsys, monkeypatch):
    runs = [fake_run(tmp_path / name, circuit(ONE)) for name in "abc"]
    output = tmp_path / "out"

    def files(*arguments) -> set[str]:
        code, _, err = call(capsys, monkeypatch, "compare", *arguments, f"output={output}")
        assert code == 0, err
        return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}

    output.mkdir()
    (output / "comparison.svg").write_text("of another program")
    files(runs[0], runs[1], "formats=[dot]")
    (output / "only-b/edges.json").write_text("[]")  # changed since
    assert files(runs[0], runs[2], "formats=[]") == {
        ".compare.json", "comparison.json", "comparison.svg", "only-b/edges.json",
        *(f"{part}/{name}" for part in ("intersection", "union", "only-a", "only-c")
          for name in ("edges.json", "circuit.json")),
    }  # fmt: skip


def test_a_list_of_files_that_is_none_lists_nothing(tmp_path, capsys, monkeypatch):
    runs = [fake_run(tmp_path / name, circuit(ONE)) for name in "ab"]
    settings = ("formats=[]", f"output={tmp_path}")
    for text in ("[]", "3", "{"):
        (tmp_path / ".compare.json").write_text(text)
        assert call(capsys, monkeypatch, "compare", *runs, *settings)[::2] == (0, "")
        assert "comparison.json" in json.loads((tmp_path / ".compare.json").read_text())


def test_parts_of_a_comparison_are_not_replaced_by_their_own(tmp_path, capsys, monkeypatch):
    runs = [fake_run(tmp_path / name, circuit(ONE)) for name in "ab"]
    settings = ("formats=[]", f"output={tmp_path / 'out'}")
    assert call(capsys, monkeypatch, "compare", *runs, *settings)[0] == 0
    code, _, err = call(capsys, monkeypatch, "compare", tmp_path / "out/only-a", runs[0], *settings)
    assert code == 2
    assert "is of an earlier `edgeprune compare`, which would be replaced" in err
    assert (tmp_path / "out/only-a/edges.json").exists()


def test_numbers_can_be_read_in_80_columns(tmp_path):
    """With names as runs have them by default, below folders that differ, too."""
    first, second = (
        fake_run(tmp_path / f"{task}/sparsity-0.98-edges-any-seed-1", circuit(ONE, *more))
        for task, more in (("greater_than-embedded", [TWO, THREE]), ("induction-embedded", [TWO]))
    )
    done = run_cli("compare", first, second, f"reference={second}", "formats=[]",
                   f"output={tmp_path / 'out'}", COLUMNS="80")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 80
    for numbers in (
        ["3", "0.9508", "3", "1", "2", "2", "0"],
        ["2", "0.667", "0.020", "2", "0.667"], ["2", "1.000", "0.017", "2", "1.000"],
        ["0.667", "1.000", "0.800", "0.667", "1.000", "0.800"],
    ):  # fmt: skip
        rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
        assert any(row[-1 - len(numbers) : -1] == numbers for row in rows), done.stdout
    assert "greater_than-" in {row[1] for row in rows if len(row) > 1}  # whole words


def test_boolean_expressions_from_prompts_to_comparison(tmp_path, capsys, monkeypatch):
    """What is done to CodeLlama, small; the embedded model has no idea of the task."""

    def run(*arguments) -> str:
        code, out, err = call(capsys, monkeypatch, *arguments)
        assert code == 0, err
        return out

    sizes = ("task.train=8", "task.validation=4", "task.test=4")
    for form in ("instruction", "few_shot"):
        data = tmp_path / f"{form}.jsonl"
        run("prepare", f"task=boolean_expressions_{form}", *sizes, f"output={data}")
        run("prune", f"experiment=boolean_expressions_{form}", f"task.path={data}",
            "trainer.steps=1", "trainer.batch_size=4", f"run_dir={tmp_path / form}")  # fmt: skip
        assert len(json.loads((tmp_path / form / "edges.json").read_text())) == 276
    run("compare", tmp_path / "instruction", tmp_path / "few_shot", "formats=[]",
        f"output={tmp_path / 'both'}")  # fmt: skip
    result = json.loads((tmp_path / "both/comparison.json").read_text())
    assert list(result["circuits"]) == ["instruction", "few_shot"]
    out = run(
        "evaluate", tmp_path / "both/intersection", "model=embedded",
        "task=boolean_expressions_few_shot", f"task.path={tmp_path / 'few_shot.jsonl'}",
    )  # fmt: skip
    assert f" {result['intersection']['num_edges']} edges " in out
    # of no run, since the two tasks differ
    (written,) = (tmp_path / "both/intersection").glob(
        "evaluation-embedded-*-boolean_expressions_few_shot-*-interchange-test.json"
    )
    written = json.loads(written.read_text())
    assert written["num_examples"] == 4


@pytest.mark.parametrize(
    ("width", "lines"),
    [(40, ["sparsity-0.9-seed-0"]), (14, ["sparsity-0.9-", "seed-0"]),
     (5, ["spars", "ity-", "0.9-", "seed-", "0"])],
)  # fmt: skip
def test_names_are_parted_after_hyphens(width, lines):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(Name("sparsity-0.9-seed-0"), overflow="fold")
    assert captured.get().split() == lines
