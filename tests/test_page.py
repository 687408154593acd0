"""The page of circuits: what is measured for it, and the file itself in a real browser."""

import base64
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import call, random_gpt2, random_pairs, run_here

import edgeprune
from edgeprune.api.choose import Pruned
from edgeprune.api.page import page as make_page
from edgeprune.circuit import Circuit
from edgeprune.drawing.page import data_of_page, render
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.compare import overlap
from edgeprune.evaluation.curve import measure_curve
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.evaluation.explain import explain
from edgeprune.evaluation.page_data import explained_data, measured_data
from edgeprune.evaluation.token_tables import tokens_data
from edgeprune.evaluation.tokens import attribute_tokens
from edgeprune.graph import CircuitGraph
from edgeprune.models.load import load_model, wrap_model
from edgeprune.prompts.encode import encode_pair, encode_records
from edgeprune.prompts.tasks import generate_records
from edgeprune.scores import EdgeScores

GRAPH = CircuitGraph(3, 4, 4, ("tok_embeds", "pos_embeds"))
GROUPED = CircuitGraph(3, 4, 2, ("embeds",))


def random_scores(graph: CircuitGraph, seed: int = 0) -> EdgeScores:
    noise = torch.Generator().manual_seed(seed)
    return EdgeScores(graph, torch.randn(graph.num_edges, generator=noise))


@pytest.fixture(scope="module")
def small():
    """A small model, prompts, and what pruning would give: scores, a circuit and a curve."""
    model, pairs = wrap_model(random_gpt2()), random_pairs(12, predicted=2)
    scores = random_scores(model.graph)
    ablation = Ablation(model, "interchange", pairs)
    curve = measure_curve(model, scores, pairs, sizes=[20, 60, 100])
    circuit = scores.circuit(num_edges=60)
    origin = {"chosen_by": "num_edges=60"}
    result = Pruned(circuit, scores, curve, [], ablation, origin)
    return SimpleNamespace(model=model, pairs=pairs, result=result, **vars(result))


@pytest.fixture(scope="module")
def measured(small):
    """The data of a page with everything in it."""
    page = make_page(small.result, model=small.model, pairs=small.pairs, prompts=6)
    return data_of_page(page.html)


# ------------------------------------------------------------------------------- what is measured


def test_cuts_are_those_of_a_circuit_without_the_edges(small, measured):
    run = measured["runs"][0]["measured"]
    node = next(iter(run["cuts"]["nodes"]))
    edge = next(iter(run["cuts"]["edges"]))
    for kind, name, cut in [
        ("nodes", node, [e for e in small.circuit.edges if e[0] == node]),
        ("edges", edge, [tuple(edge.split())]),
    ]:
        left = small.circuit - Circuit.from_edges(small.model.graph, cut)
        wanted = evaluate(small.model, left, small.pairs, ablation=small.ablation).circuit.kl
        assert run["cuts"][kind][name][0] == pytest.approx(wanted, rel=2e-3)
    assert set(run["cuts"]["nodes"]) == {w for w, _ in small.circuit.without_dangling().edge_set}
    assert measured_cuts(small, 3) == [3, 0]


def measured_cuts(small, count: int) -> list[int]:
    cuts = measured_data(
        small.model, small.scores, small.circuit, small.pairs, ablation=small.ablation,
        num_cuts=count,
    )["cuts"]  # fmt: skip
    return [len(cuts[kind]) for kind in ("nodes", "edges")]


def test_answers_go_from_the_empty_circuit_to_the_full_model(small):
    calls = []
    found = measured_data(
        small.model, small.scores, small.circuit, small.pairs, ablation=small.ablation, num_cuts=1,
        listener=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    total = small.model.graph.num_edges
    assert found["sizes"][-1] == total
    assert [prompt["kind"] for prompt in found["prompts"]] == ["typical"] * 5 + ["worst"] * 5
    for prompt in found["prompts"]:
        answers = prompt["answers"]
        whole = answers["circuits"][-1]
        assert whole["distance"] == pytest.approx(0, abs=1e-5)
        assert [row[0][0] for row in whole["top"]] == [row[0][0] for row in answers["full"]]
        assert len(answers["full"]) == len(prompt["predicted"]) == 2
        assert all(sum(share for _, share in row) <= 1.002 for row in answers["full"])
    for prompt in found["prompts"]:  # the full model's answer is in every row
        rows = [
            prompt["answers"]["empty"]["top"],
            *(c["top"] for c in prompt["answers"]["circuits"]),
        ]
        for row in rows:
            for answers, full in zip(row, prompt["answers"]["full"], strict=True):
                assert full[0][0] in [text for text, _ in answers]
                assert 5 <= len(answers) <= 6
                shares = [share for _, share in answers[:5]]
                assert shares == sorted(shares, reverse=True)
    at_chosen = found["sizes"].index(60)
    distances = [p["answers"]["circuits"][at_chosen]["distance"] for p in found["prompts"]]
    assert min(distances[5:]) >= max(distances[:5])
    assert distances[5] == max(distances)


def test_attention_is_the_full_models():
    model = load_model("embedded", device="cpu")
    clean = "When Mary and John got to the park, John gave a ring to"
    corrupted = "When Mary and John got to the park, Mary gave a ring to"
    record = {"clean": f"{clean}<predict> Mary</predict>",
              "corrupted": f"{corrupted}<predict> John</predict>"}  # fmt: skip
    pair = encode_pair(model.tokenizer, record)
    scores = random_scores(model.graph)
    circuit = scores.circuit(num_edges=50)
    implementation = model.architecture.body.config._attn_implementation
    found = measured_data(
        model, scores, circuit, [pair, pair], ablation=Ablation(model, "interchange", [pair]),
        num_prompts=2, num_cuts=0,
    )  # fmt: skip
    assert model.architecture.body.config._attn_implementation == implementation
    eager = load_model("embedded", device="cpu", attention="eager")
    length = len(pair.clean_ids)
    prompt = found["prompts"][0]
    assert "".join(prompt["clean"]).strip() == clean
    for side, ids in (("clean", pair.clean_ids), ("corrupted", pair.corrupted_ids)):
        weights = eager.architecture.body(torch.tensor([ids]), output_attentions=True).attentions
        data = base64.b64decode(prompt["attention"][side])
        per_head = length * (length + 1) // 2
        assert len(data) == per_head * len(found["attention_heads"])
        for place in (0, 7):
            layer, head = map(int, found["attention_heads"][place][1:].split(".h"))
            rows = torch.tril_indices(length, length)
            wanted = 255 * weights[layer][0, head][rows[0], rows[1]]
            got = torch.tensor(list(data[place * per_head : (place + 1) * per_head]))
            torch.testing.assert_close(got.float(), wanted, atol=0.6, rtol=0)


@pytest.mark.parametrize(("name", "kind"), [("reverse", "one_hot"), ("xproportion", "number")])
def test_models_that_output_values(name, kind):
    """Their answers are values, their distance is an error, and they have no attention to show."""
    model = load_model(f"tracr/{name}", device="cpu")
    records = generate_records("tracr", model.tokenizer, {"train": 12}, 0)
    pairs = encode_records(records, model.tokenizer)
    scores = random_scores(model.graph)
    found = measured_data(
        model, scores, scores.circuit(num_edges=10), pairs,
        ablation=Ablation(model, "interchange", pairs), num_prompts=4,
    )  # fmt: skip
    assert (found["output"], found["distance"], found["attention_heads"]) == (kind, "error", [])
    for prompt in found["prompts"]:
        assert prompt["clean"][0] == "BOS"
        assert prompt["answers"]["circuits"][-1]["distance"] == pytest.approx(0, abs=1e-4)


def test_data_has_no_more_than_asked_for(small):
    data = data_of_page(make_page(small.scores, edges=25).html)["runs"][0]
    ranking = small.scores.ranking()[:25].tolist()
    names = [(small.model.graph.writers[w], small.model.graph.readers[r]) for w, r in
             zip(*data["edges"], strict=True)]  # fmt: skip
    assert names == [small.model.graph.edges[index] for index in ranking]
    assert data["scores"] == pytest.approx(small.scores.values[ranking].tolist(), rel=1e-3)


def test_edges_of_a_graph_without_embedding_writers():
    graph = CircuitGraph(2, 2, 2, ())
    circuit = Circuit.from_edges(graph, graph.edges)
    data = data_of_page(make_page(circuit).html)["runs"][0]
    pairs = zip(*data["edges"], strict=True)
    assert [(graph.writers[w], graph.readers[r]) for w, r in pairs] == list(graph.edges)


def test_a_graph_of_millions_of_edges_gets_a_small_page():
    graph = CircuitGraph(40, 40, 40, ("embeds",))
    assert graph.num_edges > 3_800_000
    values = torch.arange(graph.num_edges, dtype=torch.float64)
    html = make_page(EdgeScores(graph, values)).html
    assert len(html) < 600_000
    assert len(data_of_page(html)["runs"][0]["scores"]) == 5000


def test_what_cannot_be_shown_is_refused(small):
    with pytest.raises(ValueError, match="different graphs"):
        make_page(small.scores, random_scores(GROUPED))
    with pytest.raises(ValueError, match="nothing to show"):
        make_page()
    with pytest.raises(TypeError, match="int"):
        make_page(3)


def test_notebooks_show_results_in_a_frame(small):
    for shown in (small.circuit, small.scores, edgeprune.page(small.result)):
        frame = shown._repr_html_()
        assert frame.startswith("<iframe srcdoc=")
        assert "<script" not in frame  # escaped: it runs in the frame only
        assert 'sandbox="allow-scripts allow-downloads"' in frame


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs of the embedded model."""
    folder = tmp_path_factory.mktemp("runs")
    run_here(
        "prune", "--multirun", "experiment=ioi", "seed=0,1", "trainer.steps=3", "task.train=32",
        "task.validation=8", "task.test=8", "num_edges=40", f"run_dir={folder}/r${{seed}}",
    )  # fmt: skip
    return folder


def test_prune_writes_the_page_and_page_uses_what_it_measured(runs, capsys, monkeypatch):
    path = runs / "r0/page.html"
    data = data_of_page(path.read_text())
    assert data["runs"][0]["measured"]["split"] == "test"
    assert data["runs"][0]["chosen"] == {"size": 40, "by": "num_edges=40", "edges": None}
    before = path.read_text()
    monkeypatch.setattr("edgeprune.api.page.Measuring", None)  # would be needed to measure again
    code, out, _ = call(capsys, monkeypatch, "page", runs / "r0")
    assert code == 0
    assert "page.html" in out
    assert path.read_text() == before
    code, *_ = call(capsys, monkeypatch, "page", runs / "r0", runs / "r1",
                    f"output={runs}/two.html")  # fmt: skip
    assert code == 0
    two = data_of_page((runs / "two.html").read_text())
    assert [run["name"] for run in two["runs"]] == ["r0", "r1"]
    assert two["runs"][0]["measured"] == data["runs"][0]["measured"]


def test_other_options_are_measured_again(runs, capsys, monkeypatch):
    output = f"output={runs}/other.html"
    code, *_ = call(capsys, monkeypatch, "page", runs / "r1", "prompts=2", "cuts=1", output)
    assert code == 0
    measured = data_of_page((runs / "other.html").read_text())["runs"][0]["measured"]
    assert len(measured["prompts"]) == 2
    assert len(measured["cuts"]["nodes"]) == 1


def test_tokens_of_the_run_s_circuit_come_onto_its_page(runs, tmp_path, capsys, monkeypatch):
    def tokens():
        path = tmp_path / "page.html"
        code, *_ = call(capsys, monkeypatch, "page", runs / "r1", "prompts=0", f"output={path}")
        assert code == 0
        return data_of_page(path.read_text())["runs"][0]["tokens"]

    assert tokens() is None
    code, out, _ = call(capsys, monkeypatch, "tokens", runs / "r1", "prompts=2", "steps=2")
    assert code == 0 and str(runs / "r1/tokens.html") in out
    models = [list(answer["through"]) for answer in tokens()["answers"]]
    assert models == [["full model", "circuit"]] * 2
    file = runs / "r1/tokens.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "edges_sha256": "of another circuit"}))
    assert tokens() is None
    file.unlink()


def test_a_report_links_to_a_page_of_its_runs(runs, tmp_path, capsys, monkeypatch):
    code, *_ = call(capsys, monkeypatch, "report", runs, f"output={tmp_path}/report")
    assert code == 0
    name = "page-ioi-embedded-interchange.html"
    assert f'href="{name}"' in (tmp_path / "report/report.html").read_text()
    data = data_of_page((tmp_path / "report" / name).read_text())
    assert [run["name"] for run in data["runs"]] == ["r0", "r1"]


def test_the_command_refuses_what_it_cannot_use(runs, tmp_path, capsys, monkeypatch):
    for arguments, wanted in (
        ((tmp_path,), "not a run directory"),
        ((runs / "r0", f"output={runs}/r0/x.html"), "run directory"),
    ):
        code, _, err = call(capsys, monkeypatch, "page", *arguments)
        assert (code, wanted in err) == (2, True)


# ------------------------------------------------------------------------------- in a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page's HTML from a file; at the end nothing may have been requested or gone wrong."""
    problems, contexts = [], []

    def open_page(html: str, address: str = "", width: int = 1200, height: int = 800, **options):
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else
                problems.append(r.url))  # fmt: skip
        page.goto(f"{path.as_uri()}#{address}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def settle(page) -> None:
    """Wait until a change is drawn, also in the panel and the address."""
    # The page's own clock, on which earlier timers end first, however busy the machine is.
    page.evaluate("new Promise(end => requestAnimationFrame(() => setTimeout(end, 350)))")


def address(page) -> dict[str, str]:
    settle(page)
    text = page.evaluate("decodeURIComponent(location.hash.slice(1))")
    return dict(part.split("=", 1) for part in text.split("&") if part)


def save(page, name: str) -> bytes:
    page.locator(".menu summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    return Path(download.value.path()).read_bytes()


def drawn(page) -> ElementTree.Element:
    return ElementTree.fromstring(save(page, "Picture (SVG)"))


def drawn_edges(page) -> list[tuple[str, str]]:
    """(writer, reader) of every edge in the picture."""
    space = "{http://www.w3.org/2000/svg}"
    return [tuple(path.find(f"{space}title").text.split(" → ")) for path in
            drawn(page).iter(f"{space}path")]  # fmt: skip


def set_size(page, size: int) -> None:
    page.locator("#number").fill(str(size))
    page.locator("#number").press("Enter")
    settle(page)


def test_opens_from_a_file_without_requests(show, measured):
    page = show(render(measured))
    assert page.locator("h1").inner_text() == "edgeprune"
    assert "of 305" in page.locator("#summary").inner_text().replace(str(GRAPH.num_edges), "305")
    assert "num_edges=60" in page.locator("#rules").inner_text()
    assert page.locator("#panel table").count() >= 2
    policy = page.locator('meta[http-equiv="Content-Security-Policy"]').get_attribute("content")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize("graph", [GRAPH, GROUPED], ids=["heads", "grouped"])
def test_circuits_of_every_size_are_those_of_the_scores(show, graph):
    scores = random_scores(graph)
    page = show(make_page(scores).html)
    for size in (graph.num_edges, 60, 25):
        set_size(page, size)
        circuit = scores.circuit(num_edges=size)
        assert json.loads(save(page, "edges.json")) == [list(edge) for edge in circuit.edges]
        dangling = len(circuit) - len(circuit.without_dangling())
        note = page.locator("#summary").inner_text()
        assert (f"{dangling} dangling" in note) if dangling else ("dangling" not in note)
    page.get_by_label("dangling edges").uncheck()
    settle(page)
    assert sorted(drawn_edges(page)) == sorted(circuit.without_dangling().edge_set)


def test_slider_and_keys_change_the_size(show, measured):
    page = show(render(measured))
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    assert address(page)["size"] == "61"
    page.locator("#slider").evaluate(
        "s => { s.value = 1000; s.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    assert address(page)["size"] == str(GRAPH.num_edges)
    assert page.locator("#number").input_value() == str(GRAPH.num_edges)
    page.wait_for_timeout(800)  # changes in quick succession are undone together
    page.locator("#canvas").focus()
    page.keyboard.press("[")
    assert int(address(page)["size"]) < GRAPH.num_edges
    page.keyboard.press("Control+z")
    assert address(page)["size"] == str(GRAPH.num_edges)
    page.get_by_role("button", name="chosen by the run").click()
    assert "size" not in address(page)


def test_a_clean_up_is_shown_edge_by_edge(show, small):
    cleaned = Circuit(GRAPH, frozenset(small.circuit.edges[::2]))
    page = show(make_page(replace(small.result, circuit=cleaned)).html)
    assert "cleaned up" in page.locator("#summary").inner_text()
    assert json.loads(save(page, "edges.json")) == [list(edge) for edge in cleaned.edges]


@pytest.mark.parametrize(
    ("text", "node"), [("a1.h2", "a1.h2"), ("mlp 2", "m2"), ("head 2.1", "a2.h1"), ("2.3", "a2.h3")]
)
def test_search_selects_a_node(show, measured, text, node):
    page = show(render(measured))
    page.keyboard.press("/")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    assert address(page)["select"] == node
    assert page.locator("#panel code").first.inner_text() == node


@pytest.mark.parametrize("form", ["{} -> {}", "{} {}", "{}>{}"])
def test_search_finds_an_edge(show, measured, small, form):
    edge = next(e for e in small.circuit.edges if e[1].endswith(".v"))
    page = show(render(measured))
    page.locator("#search").fill(form.format(*edge))
    page.keyboard.press("Enter")
    assert address(page)["select"] == ">".join(edge)


def test_an_edge_shows_when_it_rose_and_what_was_found_about_it(show, measured, small):
    data = json.loads(json.dumps(measured))
    (run,) = data["runs"]
    strongest = small.scores.ranking()[:2].tolist()
    edges = [small.model.graph.edges[edge] for edge in strongest]
    explained = explain(small.model, small.circuit, small.pairs, scores=small.scores)
    run["explained"] = explained_data({**explained.to_dict(), "split": "test"})
    run["rose"] = {"steps": [0, 5, 20], "ranks": [[90, 61, 1], [30, 2, 2]]}
    page = show(render(data), f"select={'>'.join(edges[0])}")
    panel = page.locator("#panel").inner_text()
    assert "Among the 60 strongest edges for good since step 20" in panel
    for edge in explained.of_kind("edge"):
        if edge.in_circuit.changes:
            page = show(render(data), f"select={edge.name.replace(' ', '>')}")
            panel = page.locator("#panel").inner_text()
            assert edge.in_circuit.changes[0].text in panel
            assert edge.in_circuit.prompts[0].prompt in panel
            break


def test_search_finds_a_prompt_by_its_words(show, measured):
    words = measured["runs"][0]["measured"]["prompts"][2]["clean"]
    page = show(render(measured))
    page.locator("#search").fill(" ".join(words))
    page.keyboard.press("Enter")
    assert {**address(page)} == {"tab": "prompts", "prompt": "2"}


def paths(page) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(".paths li").all_inner_texts()]


def test_an_edges_paths_begin_with_it(show, measured, small):
    graph, scores = small.model.graph, small.scores
    out = next(e for e in small.circuit.edges if e[1] == "resid_post" and ".h" in e[0])
    value = f"{scores.values[graph.edge_index(out)]:.2f}".lstrip("0")
    page = show(render(measured), f"select={'>'.join(out)}")
    layer, head = out[0][1:].split(".h")
    (path,) = paths(page)
    assert path.startswith(f"Head {layer}.{head} → Output")
    assert value in path
    assert "Infinity" not in page.locator("#panel").inner_text()
    kept = small.circuit.without_dangling().edge_set
    into = next(e for e in kept if e[1].endswith(".q") and ".h" in e[0])
    page = show(render(measured), f"select={'>'.join(into)}")
    (first, second) = (part.split(".h") for part in (into[0], into[1].removesuffix(".q")))
    start = f"Head {first[0][1:]}.{first[1]} → Head {second[0][1:]}.{second[1]} → "
    assert paths(page)
    assert all(path.startswith(start) for path in paths(page))
    title = f"Head {first[0][1:]}.{first[1]} → Head {second[0][1:]}.{second[1]}, query"
    assert page.locator("#panel h2").inner_text() == title


def test_the_size_box_holds_what_is_shown(show, measured):
    page = show(render(measured))
    for text, shown in (("9999", GRAPH.num_edges), ("-4", 0), ("", 0), ("12.4", 12)):
        page.locator("#number").fill(text)
        page.locator("#number").press("Enter")
        settle(page)
        assert page.locator("#number").input_value() == str(shown)
        assert page.locator("#panel .fact b").first.inner_text() == str(shown)


def focused(page) -> str:
    settle(page)
    return page.evaluate("document.activeElement.textContent || document.activeElement.tagName")


def test_controls_keep_the_focus(show, measured, small):
    html = make_page(small.result, random_scores(GRAPH, seed=1), edges=GRAPH.num_edges).html
    page = show(html)
    chip = page.locator("#rules button:enabled").last
    controls = [
        chip, page.get_by_role("button", name="compare"), page.get_by_role("tab", name="Edges"),
        page.get_by_role("button", name="scores", exact=True),
        page.get_by_role("button", name="key", exact=True),
    ]  # fmt: skip
    for control in controls:
        text = control.inner_text()
        control.focus()
        page.keyboard.press("Enter")
        assert focused(page) == text
    page.locator("#number").fill("30")  # the chip may have chosen no edges
    page.locator("#number").press("Enter")
    settle(page)
    page.locator("#panel .link").first.focus()
    page.keyboard.press("Enter")
    settle(page)
    assert page.evaluate("document.activeElement.closest('#panel') !== null")


def test_panels_tell_what_was_measured(show, measured, small):
    node = next(name for name in measured["runs"][0]["measured"]["cuts"]["nodes"] if ".h" in name)
    page = show(render(measured), f"select={node}")
    text = page.locator("#panel").inner_text()
    after, flips = measured["runs"][0]["measured"]["cuts"]["nodes"][node]
    assert f"{flips} of 12" in text
    writes = [edge for edge in small.circuit.edges if edge[0] == node]
    assert f"Writes to ({len(writes)})" in text
    assert "Attention of the full model" in text
    assert "Strongest paths to the output" in text
    assert math.isfinite(after)
    page.get_by_role("tab", name="Prompts").click()
    settle(page)
    assert page.locator("ul.prompts button").count() == 6
    page.locator("ul.prompts button").nth(3).click()
    assert address(page)["prompt"] == "3"
    assert page.locator("#panel .answers").count() == 2  # one per predicted token
    edge = next(iter(measured["runs"][0]["measured"]["cuts"]["edges"])).replace(" ", ">")
    page = show(render(measured), f"select={edge}")
    assert "predictions flipped" in page.locator("#panel").inner_text()


def test_pins_groups_undo_and_the_address(show, measured):
    html = render(measured)
    page = show(html, "pin=a0.h1,a1.h2,m1&tab=groups&size=200")
    page.get_by_label("Name of the group").fill("Früh: a, b+c & <i>")
    page.get_by_role("button", name="Group the pinned nodes").click()
    settle(page)
    with_group = page.evaluate("location.hash.slice(1)")
    picture = save(page, "Picture (SVG)")
    assert "3 nodes" in picture.decode()
    inside = {"a0.h1", "a1.h2", "m1"}
    hidden = [e for e in drawn_edges(page) if e[0] in inside and e[1].rsplit(".", 1)[0] in inside]
    assert hidden == []
    again = show(html, with_group)
    settle(again)
    assert again.evaluate("location.hash.slice(1)") == with_group
    assert save(again, "Picture (SVG)") == picture
    assert "Früh: a, b+c & <i>" in again.locator("#panel").inner_text()
    page.get_by_role("button", name="Undo").click()
    assert address(page)["pin"] == "a0.h1,a1.h2,m1"
    page.get_by_role("button", name="Redo").click()
    settle(page)
    assert page.evaluate("location.hash.slice(1)") == with_group


def test_filters_hide_edges_by_kind_and_layer(show, measured, small):
    page = show(render(measured), "hide=q,k&layers=1-2")
    edges = drawn_edges(page)

    def layer(name: str) -> int:
        return int(name[1]) if name[0] in "am" else -1

    wanted = [
        (writer, reader) for writer, reader in small.circuit.edges
        if not reader.endswith((".q", ".k")) and layer(writer) in (-1, 1, 2)
        and (reader == "resid_post" or layer(reader) in (1, 2))
    ]  # fmt: skip
    assert sorted(edges) == sorted(wanted)


def test_pictures_are_saved(show, measured):
    page = show(render(measured), "select=a1.h2")
    assert save(page, "Picture (PNG)").startswith(b"\x89PNG")
    root = drawn(page)
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert {"Output", "0.0", "MLP 2", "Token embedding"} <= set(texts)


def test_tables_are_copied(show, measured, small):
    page = show(render(measured), "tab=edges", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="copy all 60 edges").click()
    settle(page)
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].split("\t") == ["from", "to", "score", "rank"]
    best = small.model.graph.edges[int(small.scores.ranking()[0])]
    assert lines[1].split("\t")[:2] == list(best)
    assert len(lines) == 61


def test_runs_are_compared(show, small):
    other = random_scores(GRAPH, seed=1)
    page = show(make_page(small.scores, other).html, "select=a1.h2")
    set_size(page, 50)
    page.get_by_role("button", name="compare").click()
    settle(page)
    a, b = (scores.circuit(num_edges=50) for scores in (small.scores, other))
    text = page.locator("#panel").inner_text()
    assert "Head 2." in text
    assert "Token embedding → " in text
    assert ".h" not in text  # one name for a thing
    facts = page.locator("#panel .fact").all_inner_texts()
    assert facts[0].startswith(str(len(a & b)))
    assert facts[1].startswith(str(len(a | b)))
    assert facts[2].startswith(f"{overlap(a, b)['edge_iou']:.2f}")
    assert sorted(drawn_edges(page)) == sorted((a | b).edge_set)
    page.get_by_role("button", name="scores 2", exact=True).click()
    found = address(page)
    assert (found["run"], found["select"]) == ("1", "a1.h2")
    assert sorted(drawn_edges(page)) == sorted(b.edge_set)


HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\u202eabc\u202c",
    "w" * 10_000, "\u2028", "]]>", "%%script%%", "'\"`${alert(3)}",
]  # fmt: skip


def test_text_never_becomes_markup(show, measured):
    data = json.loads(json.dumps(measured))
    data["title"] = "".join(HOSTILE[:3])
    run = data["runs"][0]
    run |= {"name": HOSTILE[0], "title": HOSTILE[1], "about": HOSTILE[2]}
    run["labels"] = {"a1.h2": HOSTILE[0], "a0.h0": HOSTILE[3]}
    for prompt in run["measured"]["prompts"]:
        prompt["clean"] = HOSTILE
        prompt["answers"]["full"][0][0][0] = HOSTILE[0]
        prompt["answers"]["empty"]["top"][0][0][0] = HOSTILE[3]
    for width in (1200, 360):
        page = show(render(data), "tab=prompts", width=width)
        assert page.locator("h1").inner_text().startswith("</script><script>")
        assert HOSTILE[0] in page.locator("#panel .line").first.inner_text() or "…" in (
            page.locator("#panel .line").first.inner_text()
        )
        assert page.locator("#panel img, #panel script").count() == 0
        assert page.evaluate("document.scripts.length") == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("tab", name="Details").click()
        page.locator("#search").fill("a1.h2")
        page.keyboard.press("Enter")
        settle(page)
        assert HOSTILE[0] in page.locator("#panel .label").inner_text()
    assert b"<script>alert" not in save(page, "Picture (SVG)")


def test_tokens_are_shown_as_shaded_text(show, small):
    found = attribute_tokens(small.model, small.pairs[:2], small.circuit, steps=2)
    data = data_of_page(make_page(small.result).html)
    data["runs"][0]["tokens"] = tokens_data({"split": "test", **found.to_dict()})
    page = show(render(data), "tab=tokens")
    lines = page.locator("#panel .shaded")
    assert lines.count() == 4  # through two models
    answer = found.answers[1].through["circuit"]
    texts = lines.nth(3).locator("small").all_inner_texts()
    values = [float(text.replace("−", "-")) for text in texts]
    assert values == pytest.approx([x for x in answer.tokens.tolist() if x], rel=0.01, abs=1e-3)
    node = max(range(2, len(found.nodes)), key=lambda i: answer.nodes[i].abs().max())
    page = show(render(data), f"select={found.nodes[node]}")
    assert "pass through it" in page.locator("#panel").inner_text()
    assert page.locator("#panel .shaded").count() >= 1


def test_everything_works_by_keyboard(show, measured):
    page = show(render(measured))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the tables"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"search", "canvas", "number", "metric", "slider", "tab-details"} <= seen
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowUp")
    first = address(page)["select"]
    page.keyboard.press("ArrowUp")
    second = address(page)["select"]
    assert first != second
    assert second in page.locator("#status").text_content()
    page.keyboard.press("Enter")
    assert address(page)["pin"] == second
    page.keyboard.press("Escape")
    assert not {"pin", "select"} & address(page).keys()
    page.locator("#tab-details").focus()
    page.keyboard.press("ArrowRight")
    assert address(page)["tab"] == "prompts"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_a_click_selects_what_is_drawn_there(show, measured):
    page = show(render(measured))
    text = next(e for e in drawn(page).iter() if e.tag.endswith("text") and e.text == "1.2")
    place = {"x": float(text.get("x")), "y": float(text.get("y"))}
    page.locator("#canvas").click(position=place)
    assert address(page)["select"] == "a1.h2"
    page.locator("#canvas").click(position=place, modifiers=["Shift"])
    assert address(page)["pin"] == "a1.h2"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything(show, measured, scheme):
    page = show(render(measured), width=360, height=740, color_scheme=scheme)
    for tab in ("Details", "Prompts", "Edges", "Groups"):
        page.get_by_role("tab", name=tab).click()
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("#search", "#canvas", "#slider", "#number", "#panel"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.dataset.theme") == scheme


def test_a_notebooks_frame_works(show, measured, small):
    page = show(f"<!DOCTYPE html><body>{edgeprune.page(small.result)._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    frame.locator("#number").fill("33")
    frame.locator("#number").press("Enter")
    settle(page)
    assert frame.locator("#summary").inner_text().startswith(f"of {GRAPH.num_edges}")
    assert "33" in frame.locator("#panel .fact").first.inner_text()
