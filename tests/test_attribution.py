"""`edgeprune attribute`: agreement with recorded results, known circuits, and runs.

The recorded results are in ../shared/attribution (where it is there) and in the folders named in
the environment variable EDGEPRUNE_ATTRIBUTION_CASES, joined by `:`.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, random_gpt2, random_pairs, run_cli
from safetensors.torch import load_file
from test_distributed import finish, start
from test_llama import FAMILIES, random_llama
from test_micro_model import CIRCUIT, induction_pairs, micro_model
from test_tracr import ABLATIONS, load_edges, read_pairs, true_edges
from transformers import AutoModelForCausalLM

from edgeprune import attribute, load_model, prune
from edgeprune.api.attribute import score_edges
from edgeprune.circuit import Circuit
from edgeprune.config import ATTRIBUTIONS as NAMES
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.engine.open_pass import OpenPass, Point
from edgeprune.errors import ConfigError
from edgeprune.formats import read_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.methods import ATTRIBUTIONS, exact
from edgeprune.metrics import mean_kl, negative_logit_difference
from edgeprune.models.load import wrap_model
from edgeprune.paths import TRACR_MODELS
from edgeprune.prompts import Pair, collate
from edgeprune.runs.run import Run
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.attributor import Attributor

BESIDE = Path(__file__).parents[2] / "shared/attribution"
NAMED = [Path(n) for n in os.environ.get("EDGEPRUNE_ATTRIBUTION_CASES", "").split(":") if n]
FOLDERS = [*(BESIDE / name for name in ("gpt2_embedded_ioi", "stories260k_ioi")), *NAMED]
OUR_METHOD = {
    "EAP": "eap", "EAP-IG-inputs": "eap_ig", "EAP-IG-activations": "eap_ig_activations",
    "clean-corrupted": "clean_corrupted",
}  # fmt: skip
OUR_METRIC = {"logit_diff": "logit_difference", "kl": "kl"}
SMALL = ("experiment=ioi", "task.train=20", "task.validation=10", "task.test=10", "batch_size=8")


# ---------------------------------------------------------------------------- recorded results


def their_name(edge: tuple[str, str]) -> str:
    """('embeds', 'a0.h1.q') -> 'input->a0.h1<q>'."""
    writer, reader = edge
    writer = "input" if writer.endswith("embeds") else writer
    if reader.count(".") == 2:
        head, _, kind = reader.rpartition(".")
        reader = f"{head}<{kind}>"
    return f"{writer}->{reader}".replace("resid_post", "logits")


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def recorded(request):
    """A folder with its model in float64, whose graph is theirs, and its prompts."""
    folder = request.param
    if not folder.is_dir() and folder not in NAMED:
        pytest.skip("../shared/attribution is not here")
    place = folder / json.loads((folder / "meta.json").read_text())["model"]
    hf_model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64)
    model = wrap_model(hf_model, embedding_writers="tokens", split_kv_readers=True)
    pairs = []
    for line in (folder / "prompts.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = [tuple(record[f"{kind}_ids"]) for kind in ("clean", "corrupted", "target")]
        pairs.append(Pair(*ids, ids[2], tuple(record["distractor_ids"])))
    return folder, model, pairs


@pytest.mark.parametrize("metric", OUR_METRIC)
@pytest.mark.parametrize("method", OUR_METHOD)
def test_scores_are_those_of_the_original_code(recorded, method, metric):
    folder, model, pairs = recorded
    path = folder / f"{method}_{metric}.npz"
    if not path.exists() or (method, metric) == ("EAP", "kl"):  # the latter is rounding alone
        pytest.skip(f"no {path.name} to compare with")
    content = np.load(path)
    values = dict(zip(content["names"], content["scores_mean_over_examples"], strict=True))
    names = [their_name(edge) for edge in model.graph.edges]
    assert set(names) == set(values)
    ours = score_edges(model, pairs, OUR_METHOD[method], metric=OUR_METRIC[metric], batch_size=8)
    theirs = torch.tensor([values[name] for name in names])
    difference = (ours.values - theirs).abs()
    if method == "EAP-IG-activations" and model.graph.embedding_writers == ("embeds",):
        # Their code leaves the input's steps out of these edges' scores.
        left_out = [name.startswith("input->a0.") for name in names]
        difference[torch.tensor(left_out)] = 0
    assert difference.max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("size", [110, 300])
@pytest.mark.parametrize("kind", ["greedy", "topn"])
def test_circuits_are_those_that_the_original_code_cuts(recorded, kind, size):
    folder, model, _ = recorded
    path = folder / f"interop/eap_gpt2_embedded_{kind}_{size}.json"
    if not path.exists():
        pytest.skip("no circuits to compare with")
    file = read_circuit(path, model.graph)
    scores = file.scores.greedy() if kind == "greedy" else file.scores
    ours = scores.circuit(num_edges=size)
    assert ours.without_dangling() == file.circuit.without_dangling()


# ------------------------------------------------------------------------------------ gradients

MODELS = {
    "gpt2": lambda: wrap_model(random_gpt2()),
    "tokens": lambda: wrap_model(random_gpt2(), embedding_writers="tokens"),
    "none": lambda: wrap_model(random_gpt2(), embedding_writers="none"),
    "llama": lambda: wrap_model(random_llama(FAMILIES["llama"])),
    "qwen3": lambda: wrap_model(random_llama(FAMILIES["qwen3"])),
    "gemma2": lambda: wrap_model(random_llama(FAMILIES["gemma2"], "eager")),
    "split": lambda: wrap_model(random_llama(FAMILIES["llama"]), split_kv_readers=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["interchange", "zero", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_the_open_pass_has_the_gradient_of_open_gates(name, kind):
    model = MODELS[name]()
    pairs = random_pairs(4) + random_pairs(3, length=5, seed=1, predicted=2)
    batch, ablation = collate(pairs), Ablation(model, kind, pairs)
    reference, corrupted = model.run_pair(batch)
    values = ablation.values(batch, corrupted)
    gates = torch.ones(model.graph.num_edges, requires_grad=True)
    for objective in (negative_logit_difference, mean_kl):
        inputs = StepInputs(batch, reference + torch.randn_like(reference), values, gates)
        moved = lambda batch, _, out, inputs=inputs, f=objective: f(batch, inputs.reference, out)  # noqa: E731
        expected = differentiate(model, inputs, objective=moved)
        found = OpenPass(model, batch, values).differentiate(moved, [Point()])
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_integrating_over_embeddings_moves_the_model_to_the_corrupted_prompt(model):
    batch = collate(random_pairs(5))
    _, corrupted = model.run_pair(batch)
    seen = []

    def objective(batch, reference, outputs):
        seen.append(outputs.detach())
        return outputs.sum()

    points = [Point(), Point(0, 0.0), Point(0, 1.0)]
    OpenPass(model, batch, corrupted).differentiate(objective, points)
    exchanged = collate([Pair(p.corrupted_ids, p.clean_ids, p.target_ids) for p in batch.pairs])
    expected = [model.run_pair(b, corrupted=False)[0] for b in (batch, exchanged, batch)]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ("exact", "acdc")])
def test_scores_do_not_depend_on_the_batches(model, method):
    pairs = random_pairs(7) + random_pairs(4, length=5, seed=1)
    whole, split = (
        score_edges(model, pairs, method, metric="logit_difference", batch_size=size, steps=2)
        for size in (11, 3)
    )
    torch.testing.assert_close(whole.values, split.values, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------- cutting edges


def losses(model, pairs, circuits) -> list[float]:
    batch = collate(pairs)
    reference, corrupted = model.run_pair(batch)
    gates = (torch.tensor(circuit.mask(), dtype=torch.float32) for circuit in circuits)
    with torch.no_grad():
        outputs = (model.run_circuit(batch, g, corrupted) for g in gates)
        return [mean_kl(batch, reference, x).item() for x in outputs]


def test_exact_scores_are_what_cutting_each_edge_does():
    model, pairs = micro_model(), induction_pairs(20, seed=1)
    graph = model.graph
    whole = Circuit(graph, frozenset(graph.edges))
    for circuit in (whole, Circuit.from_edges(graph, [*CIRCUIT, ("m0", "resid_post")])):
        found = attribute(
            model, pairs, method="exact", circuit=circuit, batch_size=8, num_edges=5, progress=False
        )
        before, *after = losses(
            model, pairs, [circuit, *(Circuit(graph, circuit.edge_set - {e}) for e in circuit)]
        )
        rises = {edge: x - before for edge, x in zip(circuit, after, strict=True)}
        scores = dict(zip(graph.edges, found.scores.values.tolist(), strict=True))
        assert all(scores[edge] == pytest.approx(rises[edge], abs=1e-5) for edge in circuit)
        outside = [scores[edge] for edge in graph.edges if edge not in circuit]
        assert max(outside, default=-1.0) < min(scores[edge] for edge in circuit)
        assert found.circuit.edge_set == CIRCUIT
    with pytest.raises(ConfigError, match="circuit="):  # these score all edges
        attribute(model, pairs, method="eap_ig", circuit=whole, progress=False)


def test_cutting_each_edge_takes_at_most_the_expected_time(monkeypatch):
    model, pairs = wrap_model(random_gpt2(n_layer=1)), random_pairs(4, 3) + random_pairs(8, 30)
    num_tokens, run_circuit = 0, model.run_circuit  # tokens run so far take the place of time

    def run(batch, *arguments, **settings):
        nonlocal num_tokens
        num_tokens += batch.clean_ids.numel()
        return run_circuit(batch, *arguments, **settings)

    monkeypatch.setattr(model, "run_circuit", run)
    monkeypatch.setattr(exact, "time", SimpleNamespace(perf_counter=lambda: num_tokens))
    attribution = exact.Exact(
        model=model, pairs=pairs, ablation=Ablation(model, "interchange", pairs),
        objective=mean_kl, world=World(), method="exact", batch_size=4, integration_steps=1,
        threshold=0.01, circuit=Circuit(model.graph, frozenset(model.graph.edges)),
    )  # fmt: skip
    expected = attribution.expected_seconds()
    num_tokens, scores = 0, torch.zeros(model.graph.num_edges, dtype=torch.float64)
    for index in range(attribution.num_steps):
        attribution.step(index, scores)
    assert num_tokens <= expected <= 2 * num_tokens


def acdc_by_hand(model, pairs, threshold: float) -> set:
    """As the paper says: from the last edge to the first, one at a time, nothing skipped."""
    kept = set(model.graph.edges)
    for edge in reversed(model.graph.edges):
        both = (
            Circuit(model.graph, frozenset(kept)),
            Circuit(model.graph, frozenset(kept - {edge})),
        )
        before, after = losses(model, pairs, both)
        kept -= {edge} if after - before < threshold else set()
    return kept


def test_acdc_decides_as_one_edge_at_a_time(model, monkeypatch):
    pairs = random_pairs(6)
    wanted = acdc_by_hand(model, pairs, 0.002)
    assert 0 < len(wanted) < model.graph.num_edges
    for chunk in (1, 3, 8):
        monkeypatch.setattr(exact, "CHUNK", chunk)
        found = attribute(
            model, pairs, method="acdc", threshold=0.002, batch_size=4, progress=False
        )
        assert found.circuit.edge_set == wanted
        assert found.origin["edge_threshold"] == 0.002


@pytest.mark.parametrize("seed", range(3))
def test_acdc_and_half_open_gates_find_the_micro_models_circuit(seed):
    model, pairs = micro_model(), induction_pairs(100, seed)
    found = attribute(model, pairs, method="acdc", threshold=0.02, progress=False)
    assert found.circuit.edge_set == CIRCUIT
    found = attribute(model, pairs, method="gates", num_edges=len(CIRCUIT), progress=False)
    assert found.circuit.edge_set == CIRCUIT


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("folder", sorted(TRACR_MODELS.iterdir()), ids=lambda path: path.name)
def test_acdc_finds_the_true_edges_of_compiled_programs(folder, ablation):
    choice, wanted = true_edges(folder, ablation)
    model = load_model(folder)
    pairs = read_pairs(model, **choice)
    found = attribute(model, pairs, method="acdc", ablation=ablation, progress=False)
    assert found.circuit.edge_set in wanted


# ---------------------------------------------------------------------------------------- greedy


def test_a_greedy_circuit_grows_from_the_output():
    graph = CircuitGraph(1, 2, 2, ("embeds",))
    values = dict.fromkeys(graph.edges, 0.0) | {
        ("embeds", "a0.h0.q"): 9.0, ("embeds", "a0.h1.v"): 8.0, ("embeds", "m0"): 2.0,
        ("a0.h1", "m0"): -7.0, ("m0", "resid_post"): 1.0, ("embeds", "resid_post"): 0.5,
    }  # fmt: skip
    scores = EdgeScores(graph, torch.tensor(list(values.values())), by_magnitude=True)
    added = [
        ("m0", "resid_post"), ("a0.h1", "m0"), ("embeds", "a0.h1.v"), ("embeds", "m0"),
        ("embeds", "resid_post"),
    ]  # fmt: skip
    for size in range(len(added) + 1):
        assert scores.greedy().circuit(num_edges=size).edge_set == {*added[:size]}
    best = scores.circuit(num_edges=2).edge_set
    assert best == {("embeds", "a0.h0.q"), ("embeds", "a0.h1.v")}
    assert len(scores.greedy().circuit(num_edges=graph.num_edges)) == graph.num_edges


def test_under_grouped_queries_a_shared_reader_is_added_once():
    graph = CircuitGraph(2, 4, 2, ("embeds",))
    scores = EdgeScores(graph, torch.rand(graph.num_edges), by_magnitude=True).greedy()
    assert sorted(scores.values.tolist()) == list(range(1, graph.num_edges + 1))


# ------------------------------------------------------------------------------------ warm start


def test_learning_may_start_from_the_ranking_of_other_scores(model):
    graph, pairs = model.graph, random_pairs(8)
    values = torch.randperm(graph.num_edges) - graph.num_edges / 2
    start = EdgeScores(graph, values, by_magnitude=True)
    settings = {"steps": 1, "learning_rate": 1e-6, "num_edges": 9, "progress": False}
    found = prune(model, pairs, start=start, **settings)
    assert found.circuit == start.circuit(num_edges=9)
    assert found.scores.values.abs().max() < 0.5 * math.log(2 * graph.num_edges) + 0.1
    with pytest.raises(ConfigError, match="every_size"):
        prune(model, pairs, start=start, trainer="paper", sparsity=0.9, progress=False)
    other = CircuitGraph(1, 1, 1, ("embeds",))
    with pytest.raises(ConfigError, match="num_layers=1"):
        prune(model, pairs, start=EdgeScores(other, torch.zeros(other.num_edges)), **settings)


# ------------------------------------------------------------------------------------------ runs


def test_a_run_is_used_like_one_of_prune(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("edgeprune.api.make_run.write_run_page", lambda *_: None)
    run_dir = tmp_path / "runs/eap_ig"
    code, out, err = call(capsys, monkeypatch, "attribute", *SMALL, f"run_dir={run_dir}")
    assert code == 0, err
    assert "eap_ig" in err and f"-> {run_dir}" in out
    names = {path.name for path in run_dir.iterdir()}
    wanted = {"scores.safetensors", "config.yaml", "run.json", "metrics.jsonl", "curve.json",
              "curve.png", "circuit.json", "edges.json", "evaluation-validation.json"}  # fmt: skip
    assert wanted <= names
    other = tmp_path / "runs/pruned"
    assert (
        call(capsys, monkeypatch, "prune", *SMALL[:4], "trainer.steps=2", f"run_dir={other}")[0]
        == 0
    )
    greedy = tmp_path / "greedy.json"
    for command in (
        ("export", run_dir, "num_edges=120"),
        ("export", run_dir, "num_edges=60", "choose=greedy", f"output={greedy}"),
        ("export", run_dir, "max_kl=1.0", "choose=greedy", f"output={tmp_path / 'kl.json'}"),
        ("export", run_dir, "format=eap_json"),
        ("evaluate", run_dir),
        ("draw", run_dir, "formats=[dot]"),
        ("compare", run_dir, other, "formats=[dot]", f"output={tmp_path / 'comparison'}"),
        ("report", tmp_path / "runs"),
    ):
        code, _, err = call(capsys, monkeypatch, *command)
        assert code == 0, (command, err)
    run = Run.open(run_dir)
    assert len(run.circuit().circuit) == 120
    grown = Circuit.from_edges(run.graph, load_edges(greedy))
    assert (
        grown == run.scores().greedy().circuit(num_edges=60) != run.scores().circuit(num_edges=60)
    )


@pytest.mark.parametrize("method", ["eap_ig", pytest.param("acdc", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("without_pictures")
def test_a_stopped_run_goes_on_and_gives_the_same_scores(tmp_path, capsys, monkeypatch, method):
    few = ("model.path=tracr/reverse", "task=tracr", "ablation=zero") if method == "acdc" else SMALL

    def run(name: str, *more: str) -> tuple[int, str]:
        place = f"run_dir={tmp_path / name}"
        arguments = ("attribute", *few, "batch_size=4", f"method={method}", place, *more)
        return call(capsys, monkeypatch, *arguments)[::2]

    assert run("whole")[0] == 0
    step = Attributor.train_step

    def failing(attributor):
        if attributor.step == 3:
            raise KeyboardInterrupt
        return step(attributor)

    with monkeypatch.context() as patch:
        patch.setattr(Attributor, "train_step", failing)
        assert run("stopped")[0] == 130
    code, _, err = call(capsys, monkeypatch, "export", tmp_path / "stopped", "num_edges=9")
    assert code == 2 and "resume=auto" in err
    code, err = run("stopped", "resume=auto")
    assert code == 0 and "resuming from step 3" in err
    files = [load_file(tmp_path / name / "scores.safetensors") for name in ("whole", "stopped")]
    assert torch.equal(files[0]["scores"], files[1]["scores"])
    code, err = run("stopped", "resume=auto", "threshold=0.5")
    assert code == 2 and "threshold" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("eap_ig", ()),
        ("eap_ig", ("launcher.shard=true", "launcher.offload=true")),
        ("exact", ("launcher.shard=true",)),
    ],
)
def test_processes_share_the_batches_and_the_model(tmp_path, method, settings):
    small = [
        *SMALL, f"method={method}", "batch_size=7", "num_edges=9", "model.device=cpu",
        "launcher.timeout=1",
    ]  # fmt: skip
    if method == "exact":
        edges = [["tok_embeds", "a1.h0.v"], ["tok_embeds", "m0"], ["m0", "resid_post"]]
        (tmp_path / "edges.json").write_text(json.dumps(edges))
        small.append(f"circuit={tmp_path / 'edges.json'}")
    alone = run_cli("attribute", *small, f"run_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    command = ("-m", "edgeprune", "attribute", *small, *settings, f"run_dir={tmp_path / 'two'}")
    assert [code for code, *_ in finish(start(2, *command))] == [0, 0]
    one, two = (Run.open(tmp_path / name).scores().values for name in ("one", "two"))
    assert (one - two).abs().max() < 1e-5 * one.abs().max()


def test_what_does_not_apply_is_refused(model, tmp_path, capsys, monkeypatch):
    assert set(ATTRIBUTIONS) == set(NAMES)
    pairs = random_pairs(2)
    for wrong, word in (
        ({"method": "eap", "metric": "kl"}, "no gradient"),
        ({"method": "eapig"}, "eap_ig_activations"),
        ({"method": "acdc", "threshold": 0.0}, "threshold"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ConfigError, match=word):
            attribute(model, pairs, **wrong)
    without = [Pair(p.clean_ids, p.corrupted_ids, p.target_ids) for p in pairs]
    with pytest.raises(ConfigError, match="metric=logit_difference needs"):
        attribute(model, without, method="eap")  # whose metric this is
    run = f"run_dir={tmp_path / 'run'}"
    code, _, err = call(capsys, monkeypatch, "attribute", *SMALL, "trainer.steps=3", run)
    assert (code, "trainer.steps" in err) == (2, True)
