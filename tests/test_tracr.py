"""Compiled transformers: they compute what their programs say, and pruning finds their true edges.

The folders are those that come with the project, those of ../shared/tracr (where it is there), and
those named in the environment variable EDGEPRUNE_TRACR_CASES, joined by `:`. All are pruned with
the settings of the experiment `tracr/reverse`.
"""

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tracr_builder import (
    Head,
    Layer,
    Program,
    Unit,
    make_weights,
    structural_edges,
    write_folder,
)

from edgeprune import evaluate, load_model, prune
from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import ConfigError, DataError, ModelError
from edgeprune.metrics import Output, measure, unexplained_variance
from edgeprune.models.load import load_meta_model, load_tokenizer
from edgeprune.paths import CONF, TRACR_MODELS
from edgeprune.prompts import collate, encode_pair, encode_records
from edgeprune.prompts.tasks import generate_records
from edgeprune.prompts.tasks.tracr import make_records

ROOT = Path(__file__).parents[1]
BESIDE = ROOT.parent / "shared/tracr"
NAMED = [Path(name) for name in os.environ.get("EDGEPRUNE_TRACR_CASES", "").split(":") if name]
FOLDERS = {
    **{path.name: path for path in sorted(TRACR_MODELS.iterdir())},
    **{f"shared-{name}": BESIDE / name for name in ("hist", "reverse", "sort", "xproportion")},
    **{f"case-{number}-{path.name}": path for number, path in enumerate(NAMED)},
}
ABLATIONS = ("zero", "interchange")
SAME = 1e-3
"""Outputs that differ by no more are the same."""


@pytest.fixture(params=FOLDERS)
def folder(request) -> Path:
    path = FOLDERS[request.param]
    if not path.is_dir() and request.param.startswith("shared-"):
        pytest.skip("../shared/tracr is not here")
    assert path.is_dir(), f"EDGEPRUNE_TRACR_CASES names {path}, which is no folder"
    return path


@pytest.fixture(scope="module")
def script():
    """run_scripts/make_tracr_models.py"""
    path = ROOT / "run_scripts/make_tracr_models.py"
    spec = importlib.util.spec_from_file_location("make_tracr_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def experiment(name: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose("prune", [f"experiment=tracr/{name}"]))


def load_edges(path: Path) -> list[tuple[str, str]]:
    return [(writer, reader) for writer, reader in json.loads(path.read_text())]


def read_pairs(model, **choice):
    records = make_records(model.tokenizer.folder, model.tokenizer.config, **choice)
    return encode_records(records, model.tokenizer)


# ------------------------------------------------------------------------------------ recovery


def true_edges(folder: Path, ablation: str) -> tuple[dict, list[set]]:
    """What the folder says: which inputs and outputs count, and the set of true edges.

    Where several sets are equally small, the folder lists the others, and each is right.
    """
    truth = json.loads((folder / "ground_truth_edges.json").read_text())
    if ablation == "zero":
        key = "edges"
        lengths = truth.get("primary_lengths")
        scored_from = truth.get("primary_scored_from_position")
        searches = [
            search
            for search in truth.get("zero_ablation", {}).values()
            if search["lengths"] == lengths and search["scored_from_position"] == scored_from
        ]
    else:
        key, search = "edges_patching", truth["counterfactual_patching"]
        lengths, scored_from = search["lengths"], search["scored_from_position"]
        searches = [search]
    others = [edges for search in searches for edges in search.get("other_minimal_sets", [])]
    sets = [{tuple(edge) for edge in edges} for edges in (truth[key], *others)]
    return {"lengths": lengths, "scored_from": scored_from}, sets


def check_recovery(folder: Path, ablation: str, seed: int) -> None:
    """Prune with the experiment's settings: the circuit is true, and computes the program."""
    choice, wanted = true_edges(folder, ablation)
    config = experiment("reverse")
    model = load_model(folder)
    pairs = read_pairs(model, **choice)
    found = prune(
        model,
        pairs,
        ablation=ablation,
        cleanup=config.cleanup,
        seed=seed,
        progress=False,
        trainer="tracr",
    ).circuit.without_dangling()
    closed = Ablation(model, ablation, pairs)
    scores = evaluate(model, found, pairs, ablation=closed)
    assert scores.circuit.exact_match == 1
    assert scores.worst.error <= SAME
    missing, extra = wanted[0] - found.edge_set, found.edge_set - wanted[0]
    assert found.edge_set in wanted, f"missing {sorted(missing)}, too many {sorted(extra)}"


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_true_edges_are_found(folder, ablation):
    check_recovery(folder, ablation, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_true_edges_are_found_by_every_seed(folder, ablation, seed):
    check_recovery(folder, ablation, seed)


def check_ranking(name: str, ablation: str) -> None:
    """The true edges have the highest scores, in any order."""
    choice, wanted = true_edges(TRACR_MODELS / name, ablation)
    model = load_model(TRACR_MODELS / name)
    found = prune(
        model, read_pairs(model, **choice), num_edges=len(wanted[0]), ablation=ablation,
        progress=False, trainer="every_size", steps=400, learning_rate=0.1, batch_size=16,
    )  # fmt: skip
    assert found.circuit.edge_set in wanted


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_scores_for_every_size_rank_the_true_edges_above_all_others(ablation):
    check_ranking("neighbours", ablation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ablation"),
    [(path.name, ablation) for path in sorted(TRACR_MODELS.iterdir()) for ablation in ABLATIONS
     if path.name != "neighbours" and (path.name, ablation) != ("reverse", "zero")],
)  # fmt: skip
def test_scores_for_every_size_rank_the_true_edges_of_every_program(name, ablation):
    """But for `reverse` under zero ablation: its output edge does harm in too small circuits."""
    check_ranking(name, ablation)


def test_programs_differ_in_name_alone():
    configs = {path.name: experiment(path.name) for path in TRACR_MODELS.iterdir()}
    for name, config in configs.items():
        assert (config.model.name, config.model.path) == (name, f"tracr/{name}")
        same = replace(config, model=configs["reverse"].model, run_dir="x")
        assert same == replace(configs["reverse"], run_dir="x")


# ------------------------------------------------------------------------------- the forward pass


def test_outputs_are_right_on_every_input(folder):
    model = load_model(folder)
    opened = torch.ones(model.graph.num_edges)
    for length in range(1, model.tokenizer.config["max_seq_len"] + 1):
        batch = collate(read_pairs(model, lengths=[length], scored_from=1))
        reference, corrupted = model.run_pair(batch)
        for outputs in (
            reference,
            model.run_circuit(batch, opened, None),
            model.run_circuit(batch, opened, corrupted),
        ):
            assert measure(batch, reference, outputs, model.output).correct.all()
            assert (outputs - reference).abs().max() < SAME


@pytest.mark.parametrize("interchange", [False, True])
def test_circuits_agree_with_a_pass_written_from_the_definition(folder, script, interchange):
    if folder in NAMED:
        pytest.skip("what a broken circuit gives depends on rounding in some programs")
    model = load_model(folder)
    weights = load_file(folder / "weights.safetensors")
    batch = collate(read_pairs(model)[:40])
    _, corrupted = model.run_pair(batch)
    config, edges = model.tokenizer.config, model.graph.num_edges
    noise = torch.Generator().manual_seed(0)
    masks = (torch.rand(6, edges, generator=noise) < 0.8).double()
    whole = torch.ones(1, edges, dtype=torch.double)
    ablated = None
    if interchange:
        ablated = [x[0] for x in script.run_masks(config, weights, batch.corrupted_ids, whole)[1]]
    wanted, _ = script.run_masks(config, weights, batch.clean_ids, masks, ablated)
    for mask, outputs in zip(masks, wanted, strict=True):
        got = model.run_circuit(batch, mask.float(), corrupted if interchange else None)
        torch.testing.assert_close(
            got.double(), outputs[batch.rows, batch.cols], atol=1e-3, rtol=1e-3
        )


def test_padding_is_refused_where_it_would_be_attended_to():
    for name in ("reverse", "brackets"):
        model = load_model(f"tracr/{name}")
        pairs = read_pairs(model, lengths=[2])[:1] + read_pairs(model, lengths=[3])[:1]
        if name == "brackets":  # causal
            short = model.run_pair(collate(pairs))[0][:2]
            assert torch.equal(short, model.run_pair(collate(pairs[:1]))[0])
        else:
            with pytest.raises(ValueError, match="3 to 4 tokens"):
                model.run_pair(collate(pairs))


def test_masks_by_mean_ablation_and_without_embedding_writers():
    model = load_model("tracr/xproportion", embedding_writers="none")
    assert model.graph.num_edges < load_model("tracr/xproportion").graph.num_edges
    pairs = read_pairs(model)
    mean = Ablation(model, "mean", pairs, per_position=True)
    whole = Circuit.from_mask(model.graph, [True] * model.graph.num_edges)
    assert evaluate(model, whole, pairs, ablation=mean).worst.error < 1e-5


# ---------------------------------------------------------------------------------------- prompts


def test_bos_counts_where_the_config_says_so_and_nothing_is_known_to_be_right_there():
    model = load_model("tracr/xproportion")
    assert len(read_pairs(model)[0].target_values) == 5
    assert len(read_pairs(model, scored_from=1)[0].target_values) == 4
    batch = collate(read_pairs(model)[:1])
    reference, _ = model.run_pair(batch)
    off = reference.clone()
    off[0] += 1
    result = measure(batch, reference, off, Output.number)
    assert (result.correct.item(), result.exact_match.item()) == (True, False)
    record = {"clean_ids": [0, 1], "corrupted_ids": [0, 2], "target_ids": [-1, 1]}
    batch = collate([encode_pair(load_tokenizer("tracr/reverse"), record)])
    outputs = torch.eye(2)
    assert measure(batch, outputs, outputs, Output.one_hot).correct.item()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"corrupted_ids": [0]}, "2 and 1 tokens"),
        ({"clean_ids": "0 1"}, "clean_ids"),
        ({"clean_ids": [0, 5]}, "clean_ids"),
        ({"corrupted_ids": [-1, 0]}, "corrupted_ids"),
        ({"clean_ids": [True, 1]}, "clean_ids"),
        ({"target_ids": [1, 1, 1]}, "3 targets"),
        ({"target_ids": []}, "target_ids"),
        ({"target_ids": [3]}, "target_ids"),
        ({"target_ids": [-2]}, "target_ids"),
        ({"target_values": [1]}, "target_values"),
    ],
)
def test_lines_of_ids_are_checked(change, field):
    """The model has five tokens and three output columns."""
    record = {"clean_ids": [0, 1], "corrupted_ids": [0, 2], "target_ids": [1], **change}
    with pytest.raises(DataError, match=field):
        encode_pair(load_tokenizer("tracr/reverse"), record)


@pytest.mark.parametrize(
    ("name", "field", "other"),
    [("reverse", "target_ids", "target_values"), ("xproportion", "target_values", "target_ids")],
)
def test_targets_are_of_the_kind_that_the_model_gives(name, field, other):
    tokenizer = load_tokenizer(f"tracr/{name}")
    record = {"clean_ids": [0, 1], "corrupted_ids": [0, 2]}
    assert encode_records([{**record, field: [1]}], tokenizer)
    with pytest.raises(DataError, match=f"'{other}'.* give '{field}'"):
        encode_records([{**record, other: [1]}], tokenizer)


def test_what_a_program_cannot_do_is_refused(tokenizer):
    for load in (load_model, load_meta_model):
        with pytest.raises(ModelError, match="tracr"):
            load("tracr/reverse", bits=4)
    program = load_tokenizer("tracr/reverse")
    text = {"clean": "a b <predict>c</predict>", "corrupted": "a d <predict>c</predict>"}
    with pytest.raises(DataError, match="token ids"):
        encode_records([text], program)
    with pytest.raises(DataError, match="length 9"):
        make_records(program.folder, program.config, lengths=[9])
    with pytest.raises(ConfigError):  # the task of programs, for another model
        generate_records("tracr", tokenizer, {}, 0)


# ---------------------------------------------------------------------------------------- measures


def test_unexplained_variance_by_hand():
    reference = torch.tensor([[1.0], [3.0]])  # mean 2, variance summed: 2
    assert unexplained_variance(reference, reference) == 0
    assert unexplained_variance(reference, torch.tensor([[2.0], [2.0]])) == 1
    assert unexplained_variance(reference, torch.tensor([[1.0], [4.0]])) == 0.5
    constant = torch.ones(2, 1)
    assert unexplained_variance(constant, torch.zeros(2, 1)) == 1


def test_values_are_scored_by_their_largest_error():
    model = load_model("tracr/neighbours")
    batch = collate(read_pairs(model)[:2])
    reference, _ = model.run_pair(batch)
    outputs = reference.clone()
    outputs[1, 0] += 0.25  # still the same answer
    outputs[4] = 1 - outputs[4]
    result = measure(batch, reference, outputs, model.output)
    assert result.error.tolist() == pytest.approx([0.25, 1], abs=1e-6)
    assert result.exact_match.tolist() == [True, False]
    assert result.kl.isnan().all()


# --------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "gelu"),
        ({"layer_norm": True}, "True"),
        ({"output_type": "mixed"}, "'mixed'"),
        ({"n_heads": None}, "n_heads"),
        ({"d_mlp": 3}, "mlp"),
        ({"n_layers": 2}, "blocks.1"),
        ("weights", "weights"),
        ("config", "config"),
        ("tensor", "extra"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, change, message):
    folder = shutil.copytree(TRACR_MODELS / "neighbours", tmp_path / "model")
    config, weights = folder / "config.json", folder / "weights.safetensors"
    if change == "weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif change == "config":
        config.write_text("{")
    elif change == "tensor":
        save_file({**load_file(weights), "extra": torch.ones(1)}, weights)
    else:
        changed = {**json.loads(config.read_text()), **change}
        config.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    with pytest.raises(ModelError, match=message):
        load_model(folder)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_meta_model])
def test_a_name_or_folder_without_a_model_is_refused(load, tmp_path):
    with pytest.raises(ModelError, match=r"'nope'.* brackets, neighbours"):
        load("tracr/nope")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load(tmp_path)


def test_building_again_gives_the_same_bytes(tmp_path, script):
    for name, make in script.PROGRAMS.items():
        write_folder(make(), tmp_path / name)
        for file in (tmp_path / name).iterdir():
            assert file.read_bytes() == (TRACR_MODELS / name / file.name).read_bytes(), file
    assert set(script.PROGRAMS) == {path.name for path in TRACR_MODELS.iterdir()}


@pytest.mark.slow
def test_searching_again_gives_the_same_true_edges(tmp_path, script):
    for name, make in script.PROGRAMS.items():
        script.write_model(make(), tmp_path / name)
        for file in (tmp_path / name).iterdir():
            assert file.read_bytes() == (TRACR_MODELS / name / file.name).read_bytes(), file


# -------------------------------------------------------------------------------------- the builder


# a -> b, b -> a, by one MLP; a head that no one reads
SWAP = Program(
    name="swap",
    description="",
    tokens=("a", "b"),
    max_length=2,
    reference_length=2,
    layers=(
        Layer(
            (Head((), (("tokens:a", "unread", 1.0),)),),
            (Unit({"tokens:a": 1.0}, {"out:b": 1.0}), Unit({"tokens:b": 1.0}, {"out:a": 1.0})),
        ),
    ),
    output={"out:a": "a", "out:b": "b"},
    compute=lambda x: ["b" if token == "a" else "a" for token in x],
)


def test_builder_by_hand(tmp_path):
    assert structural_edges(SWAP) == [("tok_embeds", "m0"), ("m0", "resid_post")]
    weights = make_weights(SWAP)
    # labels: indices:0, indices:1, one, out:a, out:b, tokens:BOS, tokens:a, tokens:b, ...
    assert weights["tok_embed"][0].nonzero()[:, 0].tolist() == [2, 6]
    assert weights["pos_embed"].nonzero().tolist() == [[1, 0], [2, 1]]
    assert weights["blocks.0.mlp.W_in"].nonzero().tolist() == [[6, 0], [7, 1]]
    assert weights["blocks.0.mlp.W_out"].nonzero().tolist() == [[0, 4], [1, 3]]
    assert weights["unembed"].nonzero().tolist() == [[3, 0], [4, 1]]
    write_folder(SWAP, tmp_path / "swap")
    model = load_model(tmp_path / "swap")
    pairs = read_pairs(model)
    assert [pair.clean_ids for pair in pairs] == [(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)]
    assert [pair.target_ids for pair in pairs] == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert model.run_pair(collate(pairs))[0].argmax(-1).tolist() == [1, 1, 1, 0, 0, 1, 0, 0]


# ------------------------------------------------------------------------------- the command line


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    prune = ("prune", "experiment=tracr/neighbours", "ablation=interchange", "trainer.steps=60",
             "trainer.checkpoint_every=30", f"run_dir={run}")  # fmt: skip
    code, _, err = call(capsys, monkeypatch, *prune)
    assert code == 0, err
    _, (wanted,) = true_edges(TRACR_MODELS / "neighbours", "interchange")
    assert set(load_edges(run / "edges.json")) == wanted
    report = json.loads((run / "circuit.json").read_text())["origin"]["cleanup"]
    assert report["num_edges_after"] == len(wanted) and report["tolerance"] == 0.001
    result = json.loads((run / "evaluation-validation.json").read_text())
    assert result["circuit"]["kl"] is None
    assert result["circuit"]["error"] < 1e-5 < result["empty"]["error"]
    (run / "checkpoints/step-00000060.safetensors").unlink()
    (run / "edges.json").unlink()
    code, _, err = call(capsys, monkeypatch, *prune, "resume=auto")
    assert "resuming from step 30" in err, err
    assert set(load_edges(run / "edges.json")) == wanted
    code, _, err = call(capsys, monkeypatch, "draw", run, "formats=[dot]")
    assert code == 0, err
    assert (run / "circuit.dot").read_text().count("->") >= len(wanted)


def test_a_negative_tolerance_is_refused(tmp_path, capsys, monkeypatch):
    prune = ("prune", "experiment=tracr/reverse", "cleanup=-1", f"run_dir={tmp_path}/run")
    code, _, err = call(capsys, monkeypatch, *prune)
    assert (code, "cleanup=-1" in err) == (2, True)
