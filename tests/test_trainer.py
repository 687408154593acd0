import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import random_gpt2, random_pairs

from edgeprune.api import prune
from edgeprune.circuit import Circuit
from edgeprune.config import (
    AblationConfig,
    AblationKind,
    Constraint,
    PruneConfig,
    TrainerConfig,
    Warmup,
    target_sparsity,
)
from edgeprune.engine import cache as passes
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import KeptPasses
from edgeprune.errors import ConfigError, DataError, TrainingError
from edgeprune.evaluation.cleanup import clean_up
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.methods.objective import (
    SparsityConstraint,
    learning_rate_factor,
    scheduled_target,
)
from edgeprune.models import wrap_model
from edgeprune.prompts import collate
from edgeprune.training.trainer import Trainer

CONFIG = TrainerConfig(
    steps=12, batch_size=4, learning_rate=0.5, lr_warmup_steps=2, sparsity_warmup_steps=8
)
EXACT = replace(CONFIG, constraint=Constraint.exact, adam_epsilon=10.0)


def trainer(model, config: TrainerConfig = CONFIG, seed: int = 0) -> Trainer:
    pairs = random_pairs(10)
    return Trainer(
        model, pairs, config, target_sparsity=0.9, seed=seed,
        ablation=Ablation(model, AblationConfig(), pairs),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        (Warmup.linear, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        # 1 - t: 0.8 -> 0.0128, each step times (0.016) ** (1 / 4)
        (Warmup.logarithmic, [1 - 0.8 * 0.016 ** (k / 4) for k in (0, 1, 2, 3, 4, 4)]),
    ],
)
def test_targets_rise_and_stay(shape, values):
    end = values[-1]
    got = [scheduled_target(step, 0.2, end, 4, shape) for step in range(6)]
    assert got == pytest.approx(values)


def test_a_logarithmic_rise_to_1_is_at_once():
    got = [scheduled_target(step, 0.25, 1.0, 2, Warmup.logarithmic) for step in range(4)]
    assert got == [0.25, 1, 1, 1]


def test_without_warmup_the_target_is_there_at_once():
    assert scheduled_target(0, 0.0, 1.1, 0, Warmup.linear) == 1.1


def test_learning_rates_rise_and_fall_to_nothing():
    config = TrainerConfig(steps=6, lr_warmup_steps=2)
    got = [learning_rate_factor(step, config) for step in range(6)]
    assert got == pytest.approx([1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4])


def test_warm_ups_follow_the_number_of_steps():
    config = TrainerConfig(steps=1200)
    assert (config.lr_warmup, config.sparsity_warmup) == (20, 800)
    config = TrainerConfig(steps=5, lr_warmup_steps=0, sparsity_warmup_steps=4)
    assert (config.lr_warmup, config.sparsity_warmup) == (0, 4)


def test_constraint_by_hand():
    constraint = SparsityConstraint()
    with torch.no_grad():
        constraint.lambda_1.fill_(2.0)
        constraint.lambda_2.fill_(3.0)
    loss = constraint(torch.tensor(0.5), 0.9)
    assert loss.item() == pytest.approx(2 * -0.4 + 3 * 0.16)
    loss.backward()
    assert constraint.lambda_1.grad.item() == pytest.approx(-0.4)
    assert constraint.lambda_2.grad.item() == pytest.approx(0.16)


def test_multipliers_are_maximised_and_gates_learn(model):
    run = trainer(model, replace(CONFIG, init_mean=0.0, start_sparsity=0.9))
    assert run.train_step().sparsity < 0.9
    first = run.train_step()
    assert first.lambda_1 < 0  # ascent along s - t < 0
    assert first.lambda_2 > 0  # ascent along (s - t)^2 > 0
    before = run.masks.edge_log_alpha.detach().clone()
    for _ in range(5):
        metrics = run.train_step()
    assert metrics.lambda_2 > first.lambda_2
    assert (run.masks.edge_log_alpha != before).float().mean() > 0.9


def test_gates_are_as_sparse_as_the_target_at_every_step(model):
    nodes = {"node_gates": True, "start_node_sparsity": 0.1, "target_node_sparsity": 0.5}
    run = trainer(model, replace(EXACT, **nodes))
    for _ in range(CONFIG.steps):
        metrics = run.train_step()
        assert metrics.lambda_1 is None
        assert metrics.loss == metrics.kl
        assert metrics.sparsity == pytest.approx(metrics.target, abs=1e-5)
        assert metrics.node_sparsity == pytest.approx(metrics.node_target, abs=1e-5)
    assert (metrics.target, metrics.node_target) == (0.9, 0.5)


def test_a_gradient_that_is_no_number_changes_nothing(model, monkeypatch):
    run = trainer(model)
    run.train_step()
    before = run.masks.edge_log_alpha.detach().clone()
    differentiate = run._differentiate

    def overflowing(pairs, gates):
        distance, grad_gates = differentiate(pairs, gates)
        grad_gates[3] = torch.inf
        return distance, grad_gates

    monkeypatch.setattr(run, "_differentiate", overflowing)
    with pytest.raises(TrainingError, match="sum of its gradients by the gates inf"):
        run.train_step()
    assert run.step == 1
    assert torch.equal(run.masks.edge_log_alpha, before)


def test_weight_decay_shrinks_log_alpha_by_its_share_of_the_learning_rate(model):
    """The first of two warm-up steps has half the rate: 0.25 of it times 10."""
    with_decay, without = (
        trainer(model, replace(CONFIG, init_mean=10.0, weight_decay=decay)) for decay in (0.1, 0.0)
    )
    for one in (with_decay, without):
        one.train_step()
    shrunk = without.masks.edge_log_alpha - with_decay.masks.edge_log_alpha
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.25), atol=2e-3, rtol=0)


@pytest.mark.parametrize("node_gates", [False, True])
@pytest.mark.parametrize(("config", "stop"), [(CONFIG, 1), (CONFIG, 7), (EXACT, 7)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(model, config, node_gates, stop):
    config = replace(config, node_gates=node_gates)
    whole = trainer(model, config)
    history = [whole.train_step() for _ in range(CONFIG.steps)]
    broken = trainer(model, config)
    for _ in range(stop):
        broken.train_step()
    resumed = trainer(model, config, seed=0)
    resumed.restore(broken.checkpoint())
    assert [resumed.train_step() for _ in range(stop, CONFIG.steps)] == history[stop:]
    for name, value in whole.masks.state_dict().items():
        assert torch.equal(value, resumed.masks.state_dict()[name])


def test_seeds_differ(model):
    assert trainer(model, seed=0).train_step() != trainer(model, seed=1).train_step()


def test_not_a_number_stops_the_run_and_keeps_the_state():
    hf_model = random_gpt2()
    run = trainer(wrap_model(hf_model))
    run.train_step()
    before = {name: value.clone() for name, value in run.checkpoint().masks.items()}
    with torch.no_grad():
        hf_model.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 2"):
        run.train_step()
    assert run.step == 1
    for name, value in run.checkpoint().masks.items():
        assert torch.equal(value, before[name])


def test_the_library_finds_a_circuit_of_the_size_asked_for():
    model = wrap_model(random_gpt2())
    pairs = random_pairs(8)
    settings = dict(steps=3, lr_warmup_steps=1, sparsity_warmup_steps=2, progress=False)
    pruned = prune(model, pairs, num_edges=17, **settings)
    assert len(pruned.circuit) == 17
    assert [m.step for m in pruned.history] == [1, 2, 3]
    assert pruned.circuit == prune(model, pairs, num_edges=17, **settings).circuit
    for ablation in ("zero", "mean"):
        pruned = prune(model, pairs, num_edges=17, ablation=ablation, **settings)
        assert len(pruned.circuit) == 17
        assert pruned.ablation.kind is AblationKind[ablation]
    with pytest.raises(ConfigError, match="unknown setting 'stepz'; did you mean 'steps'"):
        prune(model, pairs, num_edges=17, stepz=3)
    with pytest.raises(ConfigError, match="nothing says how sparse"):
        prune(model, pairs)
    with pytest.raises(ConfigError, match="unknown ablation 'noise'; choose interchange"):
        prune(model, pairs, num_edges=17, ablation="noise")


def test_a_name_is_no_model(model):
    circuit, pairs = Circuit.random(model.graph, 20, seed=0), random_pairs(2)
    message = "got a str, expected a CircuitModel, from load_model"
    with pytest.raises(TypeError, match=message):
        prune("embedded", pairs, num_edges=17, progress=False)
    with pytest.raises(TypeError, match=message):
        evaluate("embedded", circuit, pairs)
    with pytest.raises(TypeError, match=message):
        clean_up("embedded", circuit, pairs, tolerance=1, ranking=range(model.graph.num_edges))


def test_prompts_that_are_none_or_too_long_are_refused(model):
    circuit = Circuit.random(model.graph, 20, seed=0)
    longest = random_pairs(2, length=32)
    for pairs, message in [
        ([], "got no prompts"),
        ([*random_pairs(1), *random_pairs(1, length=33)], "33 tokens, but model takes at most 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune(model, pairs, num_edges=17, progress=False)
        with pytest.raises(ValueError, match=message):
            evaluate(model, circuit, pairs)
        with pytest.raises(ValueError, match=message):
            clean_up(model, circuit, pairs, tolerance=1, ranking=range(model.graph.num_edges))
    assert evaluate(model, circuit, longest).num_examples == 2


def test_corrupted_prompts_that_are_the_clean_ones_are_refused_where_they_matter(model):
    same = [replace(pair, corrupted_ids=pair.clean_ids) for pair in random_pairs(3)]
    settings = dict(num_edges=17, steps=2, progress=False)
    with pytest.raises(DataError, match="all 3 corrupted prompts are the same as their clean ones"):
        prune(model, same, **settings)
    prune(model, [*same, *random_pairs(1)], **settings)
    prune(model, same, ablation="zero", **settings)


def test_settings_from_python_are_those_of_the_command_line(model):
    pairs = random_pairs(8)
    settings = dict(num_edges=17, steps=6, sparsity_warmup_steps=5, progress=False)
    runs = [
        prune(model, pairs, **{**settings, **change}).history
        for change in (
            {}, {"warmup": "linear", "steps": "6", "num_edges": "17"}, {"warmup": "logarithmic"},
        )
    ]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]
    sizes = {"sparsity": torch.tensor(0.5).numpy()[()], "num_edges": None}
    half = prune(model, pairs, **{**settings, **sizes}).circuit
    assert len(half) == round(model.graph.num_edges / 2)
    held = prune(model, pairs, constraint="exact", **settings).history
    assert held[0].lambda_1 is None
    for wrong, message in [
        ({"warmup": "foo"}, r"warmup='foo' .*\[linear, logarithmic\]"),
        ({"constraint": "soft"}, r"constraint='soft' .*\[exact, lagrangian\]"),
        ({"steps": "many"}, "steps='many' cannot be used"),
        ({"seed": "x"}, "seed='x' cannot be used"),
        ({"seed": -1}, "seed=-1 must lie between 0 and 2147483647"),
        ({"seed": 2**31}, "seed=2147483648 must lie between 0 and 2147483647"),
        ({"num_edges": None, "sparsity": [0.5]}, "sparsity=.0.5. cannot be used"),
        (
            {"constraint": "exact", "edge_price": 0.01},
            r"edge_price=0.01 and trainer\.constraint=exact",
        ),
        (
            {"constraint": "exact", "node_gates": True, "target_node_sparsity": 1.2},
            r"target_node_sparsity=1.2 must lie between 0 and 1",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            prune(model, pairs, **{**settings, **wrong})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 0.97), ({"target_lead": 0.0}, 0.9), ({"target_lead": 0.2}, 1.1),
        ({"target_sparsity": 0.5}, 0.5), ({"edge_price": 0.1}, None),
        ({"constraint": Constraint.exact}, 0.9), ({"warmup": Warmup.logarithmic}, 0.9),
    ],
)  # fmt: skip
def test_the_target_follows_from_what_is_asked_for(settings, wanted):
    config = TrainerConfig(**settings)
    for asked in ({"sparsity": 0.9}, {"num_edges": 3}):
        found = target_sparsity(PruneConfig(trainer=config, **asked), all_edges=30)
        assert found == (wanted if wanted is None else pytest.approx(wanted))


def test_gates_far_from_the_size_asked_for_are_said(model):
    pairs = random_pairs(8)
    settings = dict(steps=3, batch_size=4, progress=False)
    with pytest.warns(
        UserWarning, match=r"gates have only become \d\d\.\d% sparse.*circuit.*98\.0%"
    ):
        prune(model, pairs, sparsity=0.98, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, pairs, sparsity=0.98, constraint="exact", sparsity_warmup_steps=1, **settings)
        prune(model, pairs, target_sparsity=0.9, **settings)  # no size is asked for


def test_what_is_no_circuit_or_prompt_is_refused_in_words(model):
    pairs = random_pairs(3)
    ablation = Ablation(model, "mean", pairs)
    assert ablation.kind is AblationKind.mean
    for wrong in ("edges.json", prune(model, pairs, num_edges=9, steps=1, progress=False)):
        name = type(wrong).__name__
        with pytest.raises(TypeError, match=f"got a {name}, expected a Circuit, such as `pruned"):
            evaluate(model, wrong, pairs)
        with pytest.raises(TypeError, match=f"got a {name}, expected a Circuit"):
            clean_up(model, wrong, pairs, tolerance=0, ranking=[])
    assert repr(wrong) == "Pruned(circuit=Circuit(9 of 302 edges))"
    with pytest.raises(TypeError, match="prompts are of type dict, expected pairs of token ids"):
        prune(model, [{"clean": "x"}], num_edges=9, progress=False)


def test_a_circuit_of_another_graph_is_refused(model):
    """Also where it has as many edges, or only edges that the model has."""
    pairs, ranking = random_pairs(3), range(model.graph.num_edges)
    fewer = wrap_model(random_gpt2(), embedding_writers=False).graph
    renamed = replace(model.graph, embedding_writers=("embeds", "pos_embeds"))
    for graph in (fewer, renamed):
        other = Circuit.random(graph, 20, seed=0)
        with pytest.raises(ValueError, match="another graph than the model's: .* embedding_writ"):
            evaluate(model, other, pairs)
        with pytest.raises(ValueError, match="another graph than the model's: .* embedding_writ"):
            clean_up(model, other, pairs, tolerance=0.1, ranking=ranking)


def test_kept_passes_are_those_of_the_model(model):
    pairs = random_pairs(5) + random_pairs(4, 5, seed=1, predicted=2)
    kept = KeptPasses(model, pairs, batch_size=4, corrupted=True)
    batch = collate([pairs[i] for i in (7, 0, 8, 3)])
    reference, activations = model.run_pair(batch)
    got_reference, got = kept.run_pair(batch)
    torch.testing.assert_close(got_reference, reference, atol=1e-6, rtol=1e-5)
    real = torch.arange(batch.clean_ids.shape[1]) < batch.lengths[:, None]

    def check(wanted, found):
        torch.testing.assert_close(found[..., real, :], wanted[..., real, :], atol=1e-6, rtol=1e-5)
        return found

    activations.map(check, got)
    stored = [kept._reference.nbytes]
    kept._activations.map(lambda x: stored.append(x.nbytes) or x)
    assert KeptPasses.size(model, pairs, corrupted=True) == sum(stored)
    references = KeptPasses(model, pairs, batch_size=4, corrupted=False)
    got_reference, nothing = references.run_pair(batch)
    torch.testing.assert_close(got_reference, reference, atol=1e-6, rtol=1e-5)
    assert nothing is None
    assert KeptPasses.size(model, pairs, corrupted=False) == kept._reference.nbytes


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_corrupted_prompts_are_run_only_where_they_are_needed(model, ablation, monkeypatch):
    run_full, seen = model.run_full, []
    monkeypatch.setattr(
        model, "run_full", lambda ids, keep: seen.append(ids) or run_full(ids, keep)
    )
    pairs = random_pairs(5)
    clean = {pair.clean_ids for pair in pairs}
    assert clean.isdisjoint(pair.corrupted_ids for pair in pairs)
    settings = {"steps": 2, "batch_size": 2, "progress": False, "cleanup": 0.1}
    prune(model, pairs, num_edges=5, ablation=ablation, **settings)
    evaluate(model, Circuit.from_edges(model.graph, []), pairs, ablation=ablation)
    assert {tuple(row) for ids in seen for row in ids.tolist()} == clean


def test_passes_without_gradients_take_twice_the_pairs_of_those_with_them(model, monkeypatch):
    run_full, sizes = model.run_full, []
    monkeypatch.setattr(
        model, "run_full", lambda ids, keep: sizes.append(len(ids)) or run_full(ids, keep)
    )
    settings = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "progress": False}
    prune(model, random_pairs(12), num_edges=5, cleanup=0.1, ablation="mean", **settings)
    assert max(sizes) == 4


def test_a_training_set_too_large_to_keep_gives_the_same_run(model, monkeypatch):
    kept = trainer(model)
    history = [kept.train_step() for _ in range(6)]
    monkeypatch.setattr(passes, "MAX_KEPT", 0)
    other = trainer(model)
    for mine in history:
        theirs = other.train_step()
        assert mine.kl == pytest.approx(theirs.kl, rel=1e-4)
        assert mine.sparsity == pytest.approx(theirs.sparsity, rel=1e-5)


@pytest.mark.parametrize("settings", [{"micro_batch_size": 3}, {"recompute": True}], ids=str)
def test_ways_to_save_memory_give_the_same_run(model, settings):
    """Slices of 3 and 1 of a batch of 4: the KL is a mean over examples whatever the slices."""
    whole, other = trainer(model), trainer(model, replace(CONFIG, **settings))
    for _ in range(6):
        one, two = whole.train_step(), other.train_step()
        assert two.kl == pytest.approx(one.kl, rel=1e-4)
        assert two.sparsity == pytest.approx(one.sparsity, rel=1e-5)
    torch.testing.assert_close(
        other.masks.edge_log_alpha, whole.masks.edge_log_alpha, atol=1e-4, rtol=1e-4
    )
