"""Drawings of circuits, and the HTML page of a report."""

import html
import re
import shutil
from xml.etree import ElementTree

import graphviz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.drawing import circuit_dot, comparison_groups, draw_circuit, render_report
from edgeprune.drawing.graphviz import COLUMN, DPI, FILL, LINE, ONLY, OUTLINE, PARTLY, SHARED
from edgeprune.errors import GraphvizMissing
from edgeprune.graph import CircuitGraph

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")

EDGES = [
    ("tok_embeds", "a0.h1.q"), ("pos_embeds", "a0.h1.k"), ("tok_embeds", "m0"), ("a0.h1", "m0"),
    ("m0", "a1.h0.v"), ("a1.h0", "resid_post"),
]  # fmt: skip
GRAPH = CircuitGraph(18, 132, 132, ("tok_embeds", "pos_embeds"))
GROUPED = CircuitGraph(1, 4, 2, ("embeds",))


def of(edges) -> Circuit:
    return Circuit.from_edges(GRAPH, edges)


CIRCUIT = of(EDGES)


def drawn_edges(dot: str) -> dict[tuple[str, str], str]:
    """(tail, head) -> colour without opacity, of every visible edge."""
    found = re.findall(r'(\S+) -> (\S+) \[color="(#\w{6})\w\w"', dot)
    return {
        (tail.removesuffix(":out:n"), head.removesuffix(":s")): color for tail, head, color in found
    }


def test_every_edge_has_the_colour_of_its_reader():
    assert drawn_edges(circuit_dot(CIRCUIT)) == {
        ("tok_embeds", "a0_h1:q"): LINE["q"],
        ("pos_embeds", "a0_h1:k"): LINE["k"],
        ("tok_embeds", "m0"): LINE["mlp"],
        ("a0_h1", "m0"): LINE["mlp"],
        ("m0", "a1_h0:v"): LINE["v"],
        ("a1_h0", "resid_post"): LINE["output"],
    }
    assert circuit_dot(CIRCUIT) == circuit_dot(of(reversed(EDGES)))
    assert drawn_edges(circuit_dot(of([]))) == {}


def test_boxes_have_names_and_the_inputs_that_are_read():
    dot = circuit_dot(CIRCUIT)
    for name in ("Head 0.1", "Head 1.0", "MLP 0", "Token embedding", "Position embedding",
                 "Output"):  # fmt: skip
        assert dot.count(f">{name}<") == 1
    head = next(line for line in dot.splitlines() if "Head 0.1" in line)
    assert f'PORT="q" BGCOLOR="{FILL["q"]}"' in head
    assert f'PORT="k" BGCOLOR="{FILL["k"]}"' in head
    assert 'PORT="v"' not in head


def test_a_shared_key_is_drawn_into_every_head_of_its_group_that_writes():
    edges = [("embeds", "a0.h1.k"), ("embeds", "a0.h2.q"), ("a0.h2", "resid_post")]
    edges += [("embeds", "a0.h0.k"), ("a0.h0", "resid_post"), ("a0.h1", "resid_post")]
    dot = circuit_dot(Circuit.from_edges(GROUPED, edges))
    assert set(drawn_edges(dot)) == {
        ("embeds", "a0_h0:k"), ("embeds", "a0_h1:k"), ("embeds", "a0_h2:k"), ("embeds", "a0_h2:q"),
        ("a0_h0", "resid_post"), ("a0_h1", "resid_post"), ("a0_h2", "resid_post"),
    }  # fmt: skip
    assert "6 edges, 4 nodes and the output" in dot
    assert "7 arrows:" in dot
    assert "arrows:" not in circuit_dot(CIRCUIT)


def test_large_circuits_lie_on_a_grid():
    edges = [("tok_embeds", f"a{layer}.h{h}.q") for layer in range(15) for h in range(8)]
    assert "layout=dot" in circuit_dot(CIRCUIT)
    dot = circuit_dot(of(edges))
    assert "layout=neato" in dot
    rows = {}
    for layer, head, x, y in re.findall(r'a(\d+)_h(\d+) \[.* pos="([\d.]+),([\d.]+)!"\]', dot):
        rows.setdefault(int(layer), set()).add(float(y))
        assert int(float(x) * 72 / COLUMN + 0.01) == int(head)
    heights = [rows[layer] for layer in range(15)]
    assert all(len(ys) == 1 for ys in heights)
    assert sorted(heights, key=min) == heights


def test_a_line_between_mlps_passes_those_in_between():
    """Otherwise m0 -> m1 -> m5 and m0 -> m1, m0 -> m5 look alike."""
    edges = [(f"a{layer}.h{h}", f"m{layer}") for layer in range(18) for h in range(8)]
    dot = circuit_dot(of(edges))
    found = re.findall(r'\bm(\d+) \[.* pos="([\d.-]+),([\d.-]+)!"\]', dot)
    at = {int(layer): (float(x), float(y)) for layer, x, y in found}
    half_box = 0.31 * COLUMN / 72  # in inches
    for low in range(18):
        for high in range(low + 2, min(low + 6, 18)):
            (x1, y1), (x2, y2) = at[low], at[high]
            for x, y in (at[layer] for layer in range(low + 1, high)):
                assert abs(x1 + (x2 - x1) * (y - y1) / (y2 - y1) - x) > half_box


# ---------------------------------------------------------------------------------- comparisons


def test_a_comparison_colours_shared_edges_and_those_of_one_circuit():
    a, b, c = set(EDGES[:4]), set(EDGES[1:5]), {EDGES[1], EDGES[5], EDGES[2]}
    groups = comparison_groups({"a<b>": a, "b": b, "c": c})
    assert [(group.name, group.edges) for group in groups] == [
        ("shared", {EDGES[1], EDGES[2]}), ("in several", {EDGES[3]}), ("only a<b>", {EDGES[0]}),
        ("only b", {EDGES[4]}), ("only c", {EDGES[5]}),
    ]  # fmt: skip
    dot = circuit_dot(CIRCUIT, groups=groups)
    assert drawn_edges(dot) == {
        ("tok_embeds", "a0_h1:q"): ONLY[0],
        ("pos_embeds", "a0_h1:k"): SHARED,
        ("tok_embeds", "m0"): SHARED,
        ("a0_h1", "m0"): PARTLY,
        ("m0", "a1_h0:v"): ONLY[1],
        ("a1_h0", "resid_post"): ONLY[2],
    }
    assert "only a&lt;b&gt; (1)" in dot
    # a box all of whose edges have one colour is outlined in it
    boxes = {line.split()[0]: line for line in dot.splitlines() if "<TABLE" in line}
    assert f'COLOR="{SHARED}"' in boxes["pos_embeds"]
    assert f'COLOR="{OUTLINE}"' in boxes["a1_h0"]
    assert f'COLOR="{ONLY[2]}"' in boxes["resid_post"]


def test_two_circuits_and_many_circuits_have_fewer_groups():
    two = comparison_groups({"a": set(EDGES[:4]), "b": set(EDGES[1:])})
    assert [group.name for group in two] == ["shared", "only a", "only b"]
    many = comparison_groups({str(n): {EDGES[0], EDGES[n % 5 + 1]} for n in range(7)})
    assert [(group.name, len(group.edges)) for group in many] == [
        ("shared", 1), ("in several", 2), ("in one only", 3),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- files


MAGIC = {"dot": b"digraph", "pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


@needs_dot
@pytest.mark.parametrize("suffix", MAGIC)
def test_formats(tmp_path, suffix):
    path = tmp_path / f"c.{suffix}"
    draw_circuit(CIRCUIT, path, title="t")
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@needs_dot
def test_an_svg_shows_the_whole_drawing(tmp_path):
    """With a resolution, Graphviz 2.43 scales the drawing but not its view box."""
    draw_circuit(CIRCUIT, tmp_path / "c.svg")
    draw_circuit(CIRCUIT, tmp_path / "c.png")
    text = (tmp_path / "c.svg").read_text()
    assert 'transform="scale(1 1)' in text
    width = re.search(r'viewBox="0.00 0.00 ([\d.]+)', text)[1]
    pixels = int.from_bytes((tmp_path / "c.png").read_bytes()[16:20])
    assert pixels == pytest.approx(float(width) * DPI / 72, abs=3)


def test_without_dot_the_source_is_left_and_the_old_picture_stays(tmp_path, monkeypatch):
    picture = tmp_path / "c.pdf"
    picture.write_text("old")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraphvizMissing):
        draw_circuit(CIRCUIT, picture)
    assert picture.read_text() == "old"
    assert (tmp_path / "c.dot").read_text() == circuit_dot(CIRCUIT)


@needs_dot
@settings(max_examples=40, deadline=None)
@given(
    st.text(max_size=20) | st.sampled_from(["<b>&", "]", '"]; x [label="', "</B>", "\\N \\G", "日"])
)
def test_a_title_is_text(title):
    """Graphviz shows it as it is, and it adds no element."""
    rendered = graphviz.pipe("dot", "svg", circuit_dot(CIRCUIT, title=title).encode(), quiet=True)
    root = ElementTree.fromstring(rendered)
    names = {element.tag.split("}")[-1] for element in root.iter()}
    assert names <= {"svg", "g", "title", "polygon", "path", "text"}
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag[-4:] == "text"]
    for word in "".join(c if c.isprintable() else " " for c in title).split():
        assert any(word in text for text in texts), texts


# --------------------------------------------------------------------------------------- the page


HOSTILE = '<script>alert("x")</script>{{ 7 * 7 }}'


def test_a_page_shows_its_sections_and_loads_nothing(tmp_path):
    (tmp_path / "p.svg").write_text("<svg/>")
    table = {"columns": ["", HOSTILE], "rows": [["row", "0.5"], ["other", HOSTILE]]}
    inner = {"heading": HOSTILE, "notes": [HOSTILE], "pictures": {HOSTILE: tmp_path / "p.svg"}}
    section = {
        "heading": HOSTILE, "tables": [table, {**table, "shades": [[1.0], [0.25]]}],
        "details": [inner], "sections": [inner],
    }  # fmt: skip
    text = render_report(HOSTILE, [{"notes": ["first"]}, section])
    assert "<script" not in text
    for tag, count in {"h1": 1, "h2": 1, "h3": 1, "details": 1, "table": 2, "img": 2}.items():
        assert len(re.findall(rf"<{tag}\b", text)) == count
    assert html.unescape(text).count(HOSTILE) == 13  # 11 texts and two descriptions of pictures
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', text)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "default-src 'none'" in text
    assert re.findall(r"background: .*?([\d.]+)\)", text) == ["0.550", "0.138"]
