"""Explaining circuits: what a cut edge carried, when edges rose, and which pairs pushed them."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import call, random_gpt2, random_pairs, run_cli, run_here, skip_pictures
from safetensors.torch import load_file
from test_tracr import read_pairs, true_edges

from edgeprune.circuit import Circuit
from edgeprune.config import TrainerConfig
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import CheckpointError, CircuitError
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.evaluation.explain import explain
from edgeprune.evaluation.explain_tables import in_words
from edgeprune.evaluation.finding import brief
from edgeprune.evaluation.pushes import (
    FALSE_ALARMS,
    Retrained,
    Verification,
    measure_pushes,
    outliers,
)
from edgeprune.methods.every_size import EverySize, grad_scores
from edgeprune.methods.method import learning_rate_factor
from edgeprune.metrics import mean_kl
from edgeprune.models.load import load_model, wrap_model
from edgeprune.paths import TRACR_MODELS
from edgeprune.runs.run import Run
from edgeprune.scores import EdgeScores
from edgeprune.training.snapshots import NUM_SNAPSHOTS, Snapshots, is_due
from edgeprune.training.trainer import Trainer

# ------------------------------------------------------------------- what the edges of programs do

Tokens = Sequence[str]


def reverse(tokens: Tokens) -> list[str]:
    return list(tokens)[::-1]


def share_of_x(tokens: Tokens) -> list[str]:
    return [f"{tokens[:i].count('x') / i:.3g}" for i in range(1, len(tokens) + 1)]


def same_around(before: Tokens, after: Tokens) -> list[str]:
    """Whether the token before, of the one input, is the token after, of the other."""
    last = len(before) - 1
    return ["yes" if 0 < i < last and before[i - 1] == after[i + 1] else "no"
            for i in range(last + 1)]  # fmt: skip


def counts(tokens: Tokens, bracket: str) -> list[int]:
    return [list(tokens[:i]).count(bracket) for i in range(1, len(tokens) + 1)]


def verdicts(opened: Sequence[int], closed: Sequence[int], ever: Sequence[bool]) -> list[str]:
    return ["fail" if e else "open" if o > c else "ok"
            for o, c, e in zip(opened, closed, ever, strict=True)]  # fmt: skip


def ever_failed(opened: Sequence[int], closed: Sequence[int]) -> list[bool]:
    is_lower = [o < c for o, c in zip(opened, closed, strict=True)]
    return [any(is_lower[: i + 1]) for i in range(len(is_lower))]


def brackets(opening: Tokens, closing: Tokens) -> list[str]:
    """The verdict if opening brackets are counted in one input and closing ones in another."""
    opened, closed = counts(opening, "("), counts(closing, ")")
    return verdicts(opened, closed, ever_failed(opened, closed))


def mixed_verdicts(counted: Tokens, failed: Tokens) -> list[str]:
    """The verdict if the counts are those of one input, and whether it ever failed another's."""
    ever = ever_failed(counts(failed, "("), counts(failed, ")"))
    return verdicts(counts(counted, "("), counts(counted, ")"), ever)


CARRIED: dict[str, dict[str, Callable[[Tokens, Tokens], list[str]]]] = {
    "reverse": dict.fromkeys(
        ("tok_embeds a2.h0.v", "a2.h0 resid_post"), lambda clean, other: reverse(other)
    ),
    "xproportion": dict.fromkeys(
        ("tok_embeds m0", "m0 a1.h0.v", "a1.h0 resid_post"),
        lambda clean, other: share_of_x(other),
    ),
    "neighbours": {
        "tok_embeds a0.h0.v": lambda clean, other: same_around(other, clean),
        "a0.h0 m0": lambda clean, other: same_around(other, clean),
        "tok_embeds a0.h1.v": lambda clean, other: same_around(clean, other),
        "a0.h1 m0": lambda clean, other: same_around(clean, other),
        "m0 resid_post": lambda clean, other: same_around(other, other),
    },
    "brackets": {
        "tok_embeds a0.h0.v": lambda clean, other: brackets(other, clean),
        "a0.h0 m0": lambda clean, other: brackets(other, clean),
        "tok_embeds a0.h1.v": lambda clean, other: brackets(clean, other),
        "a0.h1 m0": lambda clean, other: brackets(clean, other),
        "m0 a1.h0.v": lambda clean, other: mixed_verdicts(clean, other),
        "a1.h0 m1": lambda clean, other: mixed_verdicts(clean, other),
        "m1 m2": lambda clean, other: mixed_verdicts(clean, other),
        "m0 m2": lambda clean, other: mixed_verdicts(other, clean),
        "m2 resid_post": lambda clean, other: brackets(other, other),
    },
}
"""Of each program, its true edges under interchange ablation, and what it outputs, position by
position, if one of them carries the value of another input."""


def check_carried(name: str, ablation: str, carried: dict, edges: Sequence) -> None:
    """Each cut flips exactly the outputs that the program says, in the circuit and in full."""
    model = load_model(f"tracr/{name}", device="cpu")
    choice, _ = true_edges(TRACR_MODELS / name, ablation)
    pairs = read_pairs(model, **choice)
    pairs = random.Random(0).sample(pairs, min(len(pairs), 100))
    circuit = Circuit.from_edges(model.graph, edges)
    found = {part.name: part for part in
             explain(model, circuit, pairs, ablation=ablation).parts}  # fmt: skip
    decode = model.tokenizer.decode_inputs
    for edge, computed in carried.items():
        changes, flipped = Counter(), 0
        for pair in pairs:
            clean, other = (decode(ids[1:]).split() for ids in (pair.clean_ids, pair.corrupted_ids))
            whole = CORRECT[name](clean)
            changed = [(a, b) for a, b in zip(whole, computed(clean, other), strict=True) if a != b]
            changes.update(f"{a} → {b}" for a, b in changed)
            flipped += bool(changed)
        assert flipped, edge
        for effect in (found[edge].in_circuit, found[edge].in_full):
            assert effect.num_flips == flipped, edge
            assert effect.num_tokens == changes.total(), edge
            if name != "xproportion":  # whose outputs are many numbers
                assert {each.text: each.count for each in effect.changes} == changes, edge
                assert sum(each.share for each in effect.changes) == pytest.approx(1)


CORRECT = {
    "reverse": reverse, "xproportion": share_of_x,
    "neighbours": lambda tokens: same_around(tokens, tokens),
    "brackets": lambda tokens: brackets(tokens, tokens),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
def test_each_true_edge_carries_what_the_program_says(name):
    _, sets = true_edges(TRACR_MODELS / name, "interchange")
    assert {tuple(edge.split()) for edge in CARRIED[name]} == sets[0]
    check_carried(name, "interchange", CARRIED[name], [*sets[0]])


def test_each_true_edge_carries_what_the_program_says_where_nothing_takes_its_place():
    """Zero ablation: without the opening brackets, every closing one fails, and so on."""
    nothing = ["x"] * 5
    _, sets = true_edges(TRACR_MODELS / "brackets", "zero")
    carried = {
        "a0.h0 m0": lambda clean, other: brackets(nothing, clean),
        "a0.h1 m0": lambda clean, other: brackets(clean, nothing),
        "a1.h0 m1": lambda clean, other: mixed_verdicts(clean, nothing),
        "m0 m2": lambda clean, other: mixed_verdicts(nothing, clean),
    }
    check_carried("brackets", "zero", carried, [*sets[0]])


# ---------------------------------------------------------------------------------------- effects


@pytest.fixture(scope="module")
def small():
    """A small model, prompts, and scores of its edges at three steps."""
    model = wrap_model(random_gpt2())
    noise = torch.Generator().manual_seed(0)
    values = torch.randn(3, model.graph.num_edges, generator=noise)
    scores = EdgeScores(model.graph, values[-1])
    return model, random_pairs(12, predicted=2), scores, Snapshots(torch.tensor([0, 3, 9]), values)


def test_effects_are_those_of_a_circuit_and_a_model_without_the_edges(small):
    model, pairs, scores, snapshots = small
    circuit = scores.circuit(num_edges=60)
    found = explain(model, circuit, pairs, scores=scores, snapshots=snapshots, max_edges=4)
    edges, nodes = found.of_kind("edge"), found.of_kind("node")
    assert len(edges) == 4
    whole = Circuit(model.graph, frozenset(model.graph.edges))
    own = evaluate(model, circuit, pairs).circuit.kl
    for part in (edges[0], nodes[0]):
        for of, base, effect in ((circuit, own, part.in_circuit), (whole, 0.0, part.in_full)):
            gone = [edge for edge in of.edges if " ".join(edge) == part.name
                    or (edge[0] == part.name and part.kind == "node")]  # fmt: skip
            left = of - Circuit.from_edges(model.graph, gone)
            kl = evaluate(model, left, pairs).circuit.kl
            assert effect.rise.mean == pytest.approx(kl - base, abs=1e-5)
            assert effect.rise.low <= effect.rise.mean <= effect.rise.high
            assert sum(effect.kinds.values()) == pytest.approx(1 if effect.num_tokens else 0)
    order = (-snapshots.scores).argsort(-1).argsort(-1) + 1
    for edge in edges:
        assert list(edge.ranks) == order[:, edge.index].tolist()
        assert edge.ranks[-1] == edge.rank <= 60
        late = [step for step, rank in zip(found.steps, edge.ranks, strict=True) if rank > 60]
        assert edge.since == min(step for step in found.steps if step > max(late, default=-1))
    rises = [part.in_circuit.rise.mean for part in found.parts]
    assert rises == sorted(rises, reverse=True)
    outside = [model.graph.edges[edge] for edge in found.control_edges]
    assert len(found.controls) == 20 and not circuit.edge_set & {*outside}
    assert json.loads(json.dumps(found.to_dict()))["edges"].keys() == {e.name for e in edges}


# -------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("steps", [1, 7, 100, 3000])
def test_about_fifty_snapshots_and_one_at_the_end(steps):
    due = [step for step in range(1, steps + 1) if is_due(step, steps)]
    assert due[-1] == steps
    assert min(steps, NUM_SNAPSHOTS) * 0.8 <= len(due) <= NUM_SNAPSHOTS
    assert due[(len(due) - 1) // 2] <= 0.35 * steps + 2  # most are early


def test_a_snapshot_replaces_those_of_later_steps(tmp_path):
    found = Snapshots.load(tmp_path / "none", 4)
    for step in (0, 2, 5, 9, 5):
        found = found.with_snapshot(step, torch.arange(4) * step)
    found.save(tmp_path / "file")
    read = Snapshots.load(tmp_path / "file", 4)
    assert read.steps.tolist() == [0, 2, 5]
    assert read.ranks(range(4)).tolist() == [[1, 2, 3, 4], [4, 3, 2, 1], [4, 3, 2, 1]]
    with pytest.raises(CheckpointError, match="delete it"):
        Snapshots.load(tmp_path / "file", 5)


# ----------------------------------------------------------------------------------------- pushes


def test_pushes_are_the_gradients_of_single_pairs(small):
    """Their mean is the gradient of the batch; and each is that of a batch of one."""
    model, pairs, _, snapshots = small
    settings = {"steps": 9, "learning_rate": 0.1, "temperature": 0.5, "smallest": 0.05}
    method = {"seed": 1, "device": "cpu", **settings}
    ablation = Ablation(model, "interchange", pairs)
    edges = [3, 50, 200]
    found = measure_pushes(
        model, pairs, edges, snapshots, num_snapshots=2, objective=mean_kl, method=method,
        ablation=ablation,
    )  # fmt: skip
    assert found.steps == (0, 3)
    learner = EverySize(model.graph, **method)
    trainer = Trainer(model, pairs, learner, TrainerConfig(steps=9), 0, ablation)
    for row, step in enumerate(found.steps):
        gates = learner.gates_of(snapshots.scores[row], step)
        whole = grad_scores(trainer.differentiate(pairs, gates)[1], gates)
        weight = learning_rate_factor(step, 9, 0) / max(whole.abs().mean(), 0.1 / len(whole))
        wanted = -weight * whole[edges]
        torch.testing.assert_close(found.values[row].mean(0), wanted, rtol=1e-3, atol=1e-5)
        alone = grad_scores(trainer.differentiate(pairs[4:5], gates)[1], gates)
        wanted = -weight * alone[edges]
        torch.testing.assert_close(found.values[row, 4], wanted, rtol=1e-3, atol=1e-5)
    of_edge = found.of_edge(50)
    assert of_edge.most[0][1] == pytest.approx(
        (found.on(50).max() / found.on(50).abs().mean()).item()
    )


def test_outliers_are_rare_where_pairs_do_not_differ():
    noise = torch.Generator().manual_seed(0)
    for count in (200, 1600):
        found = [outliers(torch.randn(count, generator=noise)).sum() for _ in range(400)]
        assert FALSE_ALARMS / 3 <= sum(found) / 400 <= 3 * FALSE_ALARMS
    special = torch.randn(200, generator=noise)
    special[7] = 8.0
    assert outliers(special).nonzero().flatten().tolist() == [7]


def test_the_verification_says_whether_its_claim_holds():
    def verified(*ranks: tuple[int, int, int], num_seeds: int = 9) -> Verification:
        found = (Retrained("a", i % num_seeds, *r) for i, r in enumerate(ranks))
        return Verification(100, 10, tuple(found))

    fell = verified(*[(10, 40, 10)] * 6)
    assert fell.holds and fell.falls == pytest.approx((4.0, 1.0))
    assert fell.p == pytest.approx(2 / 2**6)
    assert f"{fell.p:.3f}" in fell.in_words()
    same = verified(*[(10, 40, 20), (10, 20, 40)] * 3, (10, 20, 20))
    assert not same.holds and same.wins == (3, 6) and same.p == 1
    assert not verified(*[(10, 10, 40)] * 6).holds  # the other way round
    # Edges of one seed share trainings, so 8 edges and 2 seeds are two observations.
    assert verified(*[(10, 40, 10)] * 16, num_seeds=2).wins == (2, 2)
    assert verified((1, 8, 1), (1, 1, 4), num_seeds=1).wins == (1, 1)  # ratios of 8 and 1/4
    assert verified((1, 49, 1), (1, 1, 49), num_seeds=1).wins == (0, 0)  # also in floating point


# ---------------------------------------------------------------------------------------- command

SMALL = (
    "experiment=ioi", "task.train=16", "task.validation=8", "task.test=8", "trainer.batch_size=4",
    "trainer.steps=8", "num_edges=25", "model.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        skip_pictures(patch)
        run_here("prune", *SMALL, f"run_dir={path}")
    return path


def test_a_run_is_explained_and_its_page_shows_it(run_dir, capsys, monkeypatch):
    few = ("prompts=4", "edges=3", "snapshots=2", "verify=1", "verify_edges=1")
    done = run_cli("explain", run_dir, *few)
    assert done.returncode == 0, done.stderr
    found = json.loads((run_dir / "explain.json").read_text())
    assert (found["num_prompts"], len(found["edges"]), len(found["controls"])) == (4, 3, 20)
    run = Run.open(run_dir)
    assert found["steps"] == run.snapshots().steps.tolist() == [0, *range(1, 9)]
    final = load_file(run_dir / "scores.safetensors")["scores"]
    assert torch.equal(run.snapshots().scores[-1].double(), final)
    name, record = next(iter(found["edges"].items()))
    assert record["ranks"][-1] == record["rank"]
    assert record["pushed"]["most"][0][1] >= record["pushed"]["least"][0][1]
    assert found["pushes"]["num_pairs"] == 16  # all, for the verification
    (verified,) = found["verification"]["ranks"]
    assert verified["edge"] == name.replace(" ", " → ")
    assert found["verification"]["num_removed"] == 4
    assert len(list((run_dir / "repeats").glob("*.safetensors"))) == 3
    assert call(capsys, monkeypatch, "page", run_dir, "cuts=0", "prompts=1")[0] == 0
    page = (run_dir / "page.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])["runs"][0]
    assert data["explained"]["edges"].keys() == found["edges"].keys()
    assert data["rose"]["ranks"][0][-1] == 1


def test_what_cannot_be_explained_is_refused(run_dir, tmp_path, capsys, monkeypatch):
    edges = tmp_path / "edges.json"
    edges.write_text((run_dir / "edges.json").read_text())
    for arguments, wanted in [
        ((run_dir, "verify=1", "pairs=0"), "pairs=0"),
        ((run_dir, f"output={run_dir / 'x.json'}"), "run directory"),
        ((edges, "model=embedded", "task=ioi", "verify=1"), "in no run"),
        ((tmp_path / "none",), "no such file"),
    ]:
        code, out, error = call(capsys, monkeypatch, "explain", *arguments)
        assert (code, out) == (2, "")
        assert wanted in error and len(error.strip().splitlines()) == 1


def test_a_circuit_that_connects_nothing_is_refused(small):
    model, pairs, *_ = small
    with pytest.raises(CircuitError, match="larger circuit"):
        explain(model, Circuit(model.graph, frozenset()), pairs)


def test_words_tell_the_controls(small):
    model, pairs, scores, _ = small
    found = explain(model, scores.circuit(num_edges=40), pairs, max_edges=2)
    assert brief(max(rise for rise, _ in found.controls)) in in_words(found)
