import re
import subprocess
import sys
from xml.etree import ElementTree

import graphviz
import pytest
from conftest import call, fake_run
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.drawing import circuit_dot, comparison_groups, draw, draw_circuit
from edgeprune.errors import GraphvizMissing
from edgeprune.graph import CircuitGraph

EDGES = [
    ("tok_embeds", "a0.h1.q"),
    ("pos_embeds", "a0.h1.k"),
    ("tok_embeds", "m0"),
    ("a0.h1", "m0"),
    ("m0", "a1.h0.v"),
    ("a1.h0", "resid_post"),
]
GRAPH = CircuitGraph(15, 132, 132, ("tok_embeds", "pos_embeds"))


def of(edges) -> Circuit:
    return Circuit.from_edges(GRAPH, edges)


CIRCUIT = of(EDGES)


def drawn_edges(dot: str) -> set[tuple[str, str, str]]:
    """(tail, head, colour without opacity) of every visible edge."""
    found = re.findall(r'(\S+) -> (\S+) \[color="(#\w{6})\w\w"', dot)
    return {
        (tail.removesuffix(":out:n"), head.removesuffix(":s"), color) for tail, head, color in found
    }


def test_every_edge_is_drawn_in_the_colour_of_its_reader():
    assert drawn_edges(circuit_dot(CIRCUIT)) == {
        ("tok_embeds", "a0_h1:q", draw.LINE["q"]),
        ("pos_embeds", "a0_h1:k", draw.LINE["k"]),
        ("tok_embeds", "m0", draw.LINE["mlp"]),
        ("a0_h1", "m0", draw.LINE["mlp"]),
        ("m0", "a1_h0:v", draw.LINE["v"]),
        ("a1_h0", "resid_post", draw.LINE["output"]),
    }


def test_boxes_carry_names_ports_and_colours():
    dot = circuit_dot(CIRCUIT)
    for name in (
        "Head 0.1",
        "Head 1.0",
        "MLP 0",
        "Token embedding",
        "Position embedding",
        "Output",
    ):
        assert dot.count(f">{name}<") == 1
    head = next(line for line in dot.splitlines() if "Head 0.1" in line)
    assert f'PORT="q" BGCOLOR="{draw.FILL["q"]}"' in head
    assert f'PORT="k" BGCOLOR="{draw.FILL["k"]}"' in head
    assert 'PORT="v"' not in head  # nothing is read there


def test_key_value_readers_join_every_head_of_their_group_that_writes():
    edges = [("embeds", "a0.h1.k"), ("embeds", "a0.h2.q"), ("a0.h2", "resid_post")]
    edges += [("embeds", "a0.h0.k"), ("a0.h0", "resid_post"), ("a0.h1", "resid_post")]
    grouped = CircuitGraph(1, 4, 2, ("embeds",))
    drawn = drawn_edges(circuit_dot(Circuit.from_edges(grouped, edges)))
    assert {(t, h) for t, h, _ in drawn} == {
        ("embeds", "a0_h0:k"),
        ("embeds", "a0_h1:k"),
        ("embeds", "a0_h2:k"),
        ("embeds", "a0_h2:q"),
        ("a0_h0", "resid_post"),
        ("a0_h1", "resid_post"),
        ("a0_h2", "resid_post"),
    }


def test_edges_and_arrows_are_both_counted_where_they_differ():
    grouped = CircuitGraph(1, 4, 2, ("embeds",))
    edges = [("embeds", "a0.h1.k"), ("embeds", "a0.h1.v")]
    edges += [("a0.h2", "resid_post"), ("a0.h3", "resid_post")]
    dot = circuit_dot(Circuit.from_edges(grouped, edges))
    assert "4 edges, 3 nodes and the output" in dot
    assert f"{len(drawn_edges(dot))} arrows: an edge into a key or value that heads share" in dot
    assert len(drawn_edges(dot)) == 6
    assert "arrows:" not in circuit_dot(Circuit.from_edges(grouped, edges[2:]))
    assert "arrows:" not in circuit_dot(CIRCUIT)


def test_a_list_of_edges_is_no_circuit(tmp_path):
    with pytest.raises(TypeError, match="got a list, expected a Circuit"):
        draw_circuit(EDGES, tmp_path / "c.dot")


def test_order_of_edges_does_not_matter():
    assert circuit_dot(CIRCUIT) == circuit_dot(of(reversed(EDGES)))


def test_small_circuits_are_laid_out_and_large_ones_lie_on_a_grid():
    large = [("tok_embeds", f"a{layer}.h{h}.q") for layer in range(15) for h in range(8)]
    assert "layout=dot" in circuit_dot(CIRCUIT)
    dot = circuit_dot(of(large))
    assert "layout=neato" in dot
    rows = {}
    for layer, head, x, y in re.findall(r'a(\d+)_h(\d+) \[.* pos="([\d.]+),([\d.]+)!"\]', dot):
        rows.setdefault(int(layer), set()).add(float(y))
        assert int(float(x) * 72 / draw.COLUMN + 0.01) == int(head)
    assert len(rows) == 15
    heights = [rows[layer] for layer in sorted(rows)]
    assert all(len(ys) == 1 for ys in heights)
    assert sorted(heights, key=min) == heights


def test_a_line_between_mlps_passes_beside_those_in_between():
    """Else m0 -> m1 -> m5 and m0 -> m1, m0 -> m5 look alike."""
    nodes = [node for layer in range(18) for node in (f"a{layer}.h7", f"m{layer}")]
    places = draw._grid(nodes)
    at = [places[f"m{layer}"] for layer in range(18)]
    box = 0.31 * draw.COLUMN / 72  # half of a box's width, in inches
    for low in range(18):
        for high in range(low + 2, min(low + 6, 18)):
            (x1, y1), (x2, y2) = at[low], at[high]
            for x, y in at[low + 1 : high]:
                assert abs(x1 + (x2 - x1) * (y - y1) / (y2 - y1) - x) > box


def test_lines_get_thinner_with_their_number_and_can_still_be_seen():
    def stroke(count: int) -> tuple[int, float]:
        graph = CircuitGraph(1, count, count, ())
        dot = circuit_dot(Circuit.from_edges(graph, [(f"a0.h{n}", "m0") for n in range(count)]))
        (found,) = set(re.findall(r'color="#\w{6}(\w\w)" penwidth=([\d.]+)', dot))
        return int(found[0], 16), float(found[1])

    strokes = [stroke(count) for count in (100, 125, 300, 1000, 3000, 5000)]
    assert strokes == sorted(strokes, reverse=True)
    assert strokes[1][0] > 0x90 and strokes[1][1] >= 0.9
    assert strokes[-1][1] >= 0.5
    assert strokes[-1] < strokes[1]


@pytest.mark.parametrize("extra", [0, 130])
def test_in_a_comparison_what_is_shared_is_heavier_than_what_some_have(extra):
    more = {(f"a0.h{n}", "m0") for n in range(2, extra + 2)}
    sets = {"a": {EDGES[0], EDGES[2]} | more, "b": {EDGES[0], EDGES[2]} | more, "c": {EDGES[0]}}
    dot = circuit_dot(of(set().union(*sets.values())), groups=comparison_groups(sets))
    found = dict(re.findall(r'color="(#\w{6})\w\w" penwidth=([\d.]+)', dot))
    assert float(found[draw.SHARED]) > float(found[draw.PARTLY])
    assert f"in several ({1 + extra})" in dot
    assert "only" not in dot  # nobody has an edge alone


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml"), ("dot", b"digraph")],
)
def test_formats(tmp_path, suffix, magic):
    path = tmp_path / f"c.{suffix}"
    draw_circuit(CIRCUIT, path, title="t")
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_svg_shows_the_whole_drawing(tmp_path):
    """With a resolution asked for, Graphviz 2.43 scales the drawing and not its view box."""
    draw_circuit(CIRCUIT, tmp_path / "c.svg")
    draw_circuit(CIRCUIT, tmp_path / "c.png")
    text = (tmp_path / "c.svg").read_text()
    assert 'transform="scale(1 1)' in text
    width = re.search(r'viewBox="0.00 0.00 ([\d.]+)', text)[1]
    pixels = int.from_bytes((tmp_path / "c.png").read_bytes()[16:20])
    assert pixels == pytest.approx(float(width) * draw.DPI / 72, abs=3)


def test_a_comparison_colours_what_is_shared_and_what_one_has():
    a, b, c = set(EDGES[:4]), set(EDGES[1:5]), {EDGES[1], EDGES[5], EDGES[2]}
    groups = comparison_groups({"a<b>": a, "b": b, "c": c})
    assert [(group.name, group.edges) for group in groups] == [
        ("shared", {EDGES[1], EDGES[2]}),
        ("in several", {EDGES[3]}),
        ("only a<b>", {EDGES[0]}),
        ("only b", {EDGES[4]}),
        ("only c", {EDGES[5]}),
    ]
    dot = circuit_dot(CIRCUIT, groups=groups)
    colors = {(tail, head): color for tail, head, color in drawn_edges(dot)}
    assert colors == {
        ("tok_embeds", "a0_h1:q"): draw.ONLY[0],
        ("pos_embeds", "a0_h1:k"): draw.SHARED,
        ("tok_embeds", "m0"): draw.SHARED,
        ("a0_h1", "m0"): draw.PARTLY,
        ("m0", "a1_h0:v"): draw.ONLY[1],
        ("a1_h0", "resid_post"): draw.ONLY[2],
    }
    assert "only a&lt;b&gt; (1)" in dot
    assert "edges into" not in dot
    # a box all of whose edges have one colour is outlined in it
    boxes = {line.split()[0]: line for line in dot.splitlines() if "<TABLE" in line}
    assert f'COLOR="{draw.SHARED}"' in boxes["pos_embeds"]
    assert f'COLOR="{draw.OUTLINE}"' in boxes["a1_h0"]
    assert f'COLOR="{draw.ONLY[2]}"' in boxes["resid_post"]


def test_two_circuits_and_many_circuits_have_fewer_groups():
    two = comparison_groups({"a": set(EDGES[:4]), "b": set(EDGES[1:])})
    assert [group.name for group in two] == ["shared", "only a", "only b"]
    many = comparison_groups({str(n): {EDGES[0], EDGES[n % 5 + 1]} for n in range(7)})
    assert [(group.name, len(group.edges)) for group in many] == [
        ("shared", 1), ("in several", 2), ("in one only", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("title", ['<b>"x\\N</b>', "a & b", "</FONT>", "\\", "日本"])
def test_titles_are_text(tmp_path, title):
    path = tmp_path / "c.svg"
    draw_circuit(CIRCUIT, path, title=title)
    import html

    shown = html.unescape(re.sub("<[^>]+>", "", path.read_text())).replace("\xa0", " ")
    assert title in shown


def test_empty_circuit(tmp_path):
    draw_circuit(of([]), tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    assert "no edges" in text
    assert "Output" in text


def test_bad_names_and_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a0\.x' is not the name of a node"):
        circuit_dot(Circuit(GRAPH, frozenset({("a0.x", "m0")})))
    with pytest.raises(ValueError, match=r"suffix must be one of \.pdf"):
        draw_circuit(CIRCUIT, tmp_path / "c.gif")


def test_without_dot_the_source_is_left_and_the_old_picture_stays(tmp_path, monkeypatch):
    picture = tmp_path / "c.pdf"
    picture.write_text("old")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraphvizMissing, match="apt-get install graphviz"):
        draw_circuit(CIRCUIT, picture)
    assert picture.read_text() == "old"
    assert (tmp_path / "c.dot").read_text() == circuit_dot(CIRCUIT)


def test_drawing_imports_no_torch():
    code = (
        "import sys, edgeprune.drawing, edgeprune.drawing.page, edgeprune.drawing.frontier, "
        "edgeprune.drawing.training, matplotlib.figure; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=20) | st.sampled_from(["<b>&", '"]; x [label="', "</B>", "\\N \\G", "]]>"]))
def test_a_title_is_text_whatever_it_holds(title):
    """Through Graphviz into SVG, where it must come out as it was, and add no element."""
    rendered = graphviz.pipe("dot", "svg", circuit_dot(CIRCUIT, title=title).encode(), quiet=True)
    root = ElementTree.fromstring(rendered)
    names = {element.tag.split("}")[-1] for element in root.iter()}
    assert names <= {"svg", "g", "title", "polygon", "path", "text"}
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag[-4:] == "text"]
    for word in "".join(c if c.isprintable() else " " for c in title).split():
        assert any(word in text for text in texts), texts


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(tmp_path):
    graph = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))
    return fake_run(
        tmp_path / "run", Circuit.from_edges_checked(graph, EDGES, "EDGES"),
        task={"name": "custom", "path": "/data/sums.jsonl"},
        model={"name": "custom", "path": "Qwen/Qwen3-0.6B"},
    )  # fmt: skip


def test_picture_and_console_count_alike_and_name_ones_own_data(run, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "draw", run, "formats=[dot]")
    assert code == 0
    dot = (run / "circuit.dot").read_text()
    assert "<B>sums in Qwen3-0.6B</B>" in dot
    assert "drew 6 edges between 5 nodes and the output" in out
    assert "6 edges, 5 nodes and the output" in dot


def test_drawings_of_several_circuits_lie_beside_each_other(run, tmp_path, capsys, monkeypatch):
    def drawn(*arguments) -> set[str]:
        before = set(tmp_path.rglob("*.dot"))
        code, _, err = call(capsys, monkeypatch, "draw", *arguments, "formats=[dot]")
        assert code == 0, err
        return {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*.dot")) - before}

    small = run / "small.json"
    small.write_text('[["m1", "resid_post"]]')
    assert drawn(run) == {"run/circuit.dot"}
    assert drawn(small) == {"run/small.dot"}
    assert drawn(run, f"output={tmp_path}/pictures/") == {"pictures/circuit.dot"}


def test_an_output_with_a_suffix_is_not_given_another(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out/v1.2.png"
    code, out, _ = call(capsys, monkeypatch, "draw", run, f"output={output}", "formats=[png]")
    assert code == 0
    assert [path.name for path in output.parent.iterdir()] == ["v1.2.png"]
    assert str(output) in out
    output = tmp_path / "other/v1.2"
    assert call(capsys, monkeypatch, "draw", run, f"output={output}", "formats=[dot]")[0] == 0
    assert [path.name for path in output.parent.iterdir()] == ["v1.2.dot"]


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("output=.", "output=. has no file's name, expected a path without suffix"),
        ("output=/", "output=/ has no file's name"),
        ("output=", "output= has no file's name"),
        ("output=..", "output=.. has no file's name"),
        ("formats=[]", "formats is empty, expected some of pdf, svg, png, dot"),
    ],
)
def test_nothing_to_write_is_refused(run, argument, wanted, capsys, monkeypatch):
    code, _, err = call(capsys, monkeypatch, "draw", run, argument)
    assert code == 2
    assert wanted in err


@pytest.mark.parametrize("output", [".", "/", ""])
def test_a_folder_is_no_file_to_write(run, output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, monkeypatch, "export", run / "edges.json", f"output={output}")
    assert code == 2
    assert "is a folder; give the path of a file" in err
