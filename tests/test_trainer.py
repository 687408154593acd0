"""The trainer, the learned methods, and the loop around them."""

import math
import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import random_gpt2, random_pairs

from edgeprune.config import TrainerConfig
from edgeprune.engine import cache
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from edgeprune.methods.every_size import EverySize
from edgeprune.methods.hard_concrete import probability_open
from edgeprune.methods.method import Method, learning_rate_factor
from edgeprune.methods.paper import Lagrangian, penalty, rising_target
from edgeprune.methods.priced import Priced
from edgeprune.metrics import OBJECTIVES, Output
from edgeprune.models.load import wrap_model
from edgeprune.training.checkpoint import load_latest, save_checkpoint
from edgeprune.training.progress import progress
from edgeprune.training.trainer import Trainer, objective_of, train

STEPS = 12
LEARNED = {"learning_rate": 0.5, "lr_warmup_steps": 2, "init_mean": 1.0, "init_std": 0.01}
TARGET = {
    "start_sparsity": 0.25, "target_sparsity": 0.9, "sparsity_warmup_steps": 8, "warmup": "linear",
}  # fmt: skip
NODES = {"start_node_sparsity": 0.25, "target_node_sparsity": 0.7}
LAGRANGIAN = {
    **LEARNED, **TARGET, **NODES, "node_gates": False, "weight_decay": 0.0, "adam_epsilon": 1e-8,
    "lambda_learning_rate": 3.0,
}  # fmt: skip
METHODS = {
    "every_size": (EverySize, {"learning_rate": 0.5, "smallest": 0.05, "temperature": 1.0}),
    "lagrangian": (Lagrangian, LAGRANGIAN),
    "nodes": (Lagrangian, {**LAGRANGIAN, "node_gates": True}),
    "priced": (Priced, {**LEARNED, "adam_epsilon": 1e-3, "edge_price": 0.01}),
}


def trainer(model, method: str = "lagrangian", seed: int = 0, of_trainer=None, **changes):
    """A trainer of 12 steps; `changes` are settings of the method, `of_trainer` the trainer's."""
    make, settings = METHODS[method]
    pairs = random_pairs(10)
    made = make(model.graph, seed=seed, device=model.device, steps=STEPS, **{**settings, **changes})
    settings = TrainerConfig(steps=STEPS, batch_size=4, **(of_trainer or {}))
    return Trainer(model, pairs, made, settings, seed, Ablation(model, "interchange", pairs))


def log_alpha(run: Trainer) -> torch.Tensor:
    return run.method.state_dict()["edge_log_alpha"].clone()


def scores(run: Trainer) -> torch.Tensor:
    return run.scores().values


def assert_same_state(one: Trainer, other: Trainer) -> None:
    left, right = one.method.state_dict(), other.method.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# -------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        # 1 - t: 0.8 -> 0.0128, each step times (0.016) ** (1 / 4)
        ("logarithmic", [1 - 0.8 * 0.016 ** (k / 4) for k in (0, 1, 2, 3, 4, 4)]),
    ],
)
def test_targets_rise_and_stay(shape, values):
    targets = [rising_target(step, 0.2, values[-1], 4, shape) for step in range(6)]
    assert targets == pytest.approx(values)


def test_limits_of_schedules():
    targets = [rising_target(step, 0.25, 1.0, 2, "logarithmic") for step in range(4)]
    assert targets == [0.25, 1, 1, 1]
    assert rising_target(0, 0.0, 1.1, 0, "linear") == 1.1


def test_learning_rates_rise_and_fall_to_zero():
    factors = [learning_rate_factor(step, steps=6, warmup_steps=2) for step in range(6)]
    assert factors == pytest.approx([1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4])


# ---------------------------------------------------------------------------------------- methods


def test_penalty_by_hand():
    lambdas = [torch.tensor(value, requires_grad=True) for value in (2.0, 3.0)]
    loss = penalty(*lambdas, torch.tensor(0.5), 0.9)
    assert loss.item() == pytest.approx(2 * -0.4 + 3 * 0.16)
    loss.backward()
    assert [x.grad.item() for x in lambdas] == pytest.approx([-0.4, 0.16])


def test_multipliers_are_maximised_and_gates_learn(model):
    run = trainer(model, init_mean=0.0, start_sparsity=0.9)
    assert run.train_step().values["sparsity"] < 0.9
    first = run.train_step().values
    assert first["lambda_1"] < 0  # ascent along s - t < 0
    assert first["lambda_2"] > 0  # ascent along (s - t)^2 > 0
    before = log_alpha(run)
    for _ in range(5):
        last = run.train_step().values
    assert last["lambda_2"] > first["lambda_2"]
    assert (log_alpha(run) != before).float().mean() > 0.9


def test_weight_decay_shrinks_log_alpha_by_its_share_of_the_learning_rate(model):
    """The first of two warm-up steps has half the rate: 0.25 of it times 10."""
    with_decay, without = (trainer(model, init_mean=10.0, weight_decay=w) for w in (0.1, 0.0))
    for run in (with_decay, without):
        run.train_step()
    shrunk = log_alpha(without) - log_alpha(with_decay)
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.25), atol=2e-3, rtol=0)


def test_every_step_has_the_size_that_it_logs_and_a_rate_that_falls_to_zero(model):
    run, rates = trainer(model, "every_size"), []
    for step in range(STEPS):
        size, before = run.method.gates(step).sum().item(), scores(run)
        values = run.train_step().values
        assert values["num_edges"] == pytest.approx(size, rel=1e-4)
        rates.append(values["learning_rate"])
        assert (scores(run) - before).abs().max() > 0
    assert max(rates) == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.25 and rates[-3:] == sorted(rates[-3:], reverse=True)


def test_open_edges_have_a_price(model):
    run = trainer(model, "priced")
    expected = 0.01 * probability_open(log_alpha(run)).sum().item()
    metrics = run.train_step()
    assert metrics.values["loss"] - metrics.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spoil", ["objective", "gradient"])
def test_numbers_that_are_not_finite_change_nothing(model, monkeypatch, method, spoil):
    run, untouched = trainer(model, method), trainer(model, method)
    for one in (run, untouched):
        one.train_step()

    def overflowing(pairs, gates):
        objective, grad_gates = untouched.differentiate(pairs, gates)
        if spoil == "objective":
            return objective * math.nan, grad_gates
        grad_gates[3] = torch.inf
        return objective, grad_gates

    monkeypatch.setattr(run, "differentiate", overflowing)
    with pytest.raises(TrainingError, match="step 2: the loss is"):
        run.train_step()
    assert run.step == 1
    assert_same_state(run, untouched)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(model, tmp_path, method, stop):
    whole, broken, resumed = (trainer(model, method) for _ in range(3))
    history = [whole.train_step() for _ in range(STEPS)]
    for _ in range(stop):
        broken.train_step()
    save_checkpoint(tmp_path, broken.checkpoint())
    resumed.restore(load_latest(tmp_path))
    assert [resumed.train_step() for _ in range(stop, STEPS)] == history[stop:]
    assert_same_state(whole, resumed)
    assert resumed.scores().origin["step"] == STEPS


def test_a_checkpoint_of_another_graph_or_method_is_refused(model):
    other = wrap_model(random_gpt2(n_layer=2))
    with pytest.raises(CheckpointError, match="edge_log_alpha"):
        trainer(model).restore(trainer(other).checkpoint())
    with pytest.raises(CheckpointError, match="node_log_alpha"):
        trainer(model, "nodes").restore(trainer(model).checkpoint())
    for one, another in (("every_size", "lagrangian"), ("lagrangian", "every_size")):
        with pytest.raises(CheckpointError):
            trainer(model, one).restore(trainer(model, another).checkpoint())
    with pytest.raises(CheckpointError):
        trainer(model, "every_size").restore(trainer(other, "every_size").checkpoint())


@dataclass(kw_only=True, eq=False)
class Descent(Method):
    """A method of a few lines: gates without noise follow the gradient."""

    def __post_init__(self):
        self.values = torch.zeros(self.graph.num_edges, requires_grad=True)
        self.parameters = {"values": self.values}
        self.optimizer = torch.optim.Adam([self.values], self.learning_rate)

    def gates(self, step):
        return torch.sigmoid(self.values).detach()

    def update(self, step, objective, grad_gates):
        self.values.grad = grad_gates
        self.apply_gradients(step)
        return {"objective": objective.item(), "mean": 0.25, "none": None}

    @staticmethod
    def scores(graph, state):
        return 2 * state["values"]


def test_a_new_method_needs_a_few_functions(model, monkeypatch):
    monkeypatch.setitem(METHODS, "descent", (Descent, {"learning_rate": 0.5}))
    run, history = trainer(model, "descent"), []
    train(run, listeners=[history.append])
    assert history[-1].value < 0.7 * history[0].value
    assert history[0].to_dict() == {"step": 1, "kl": history[0].value, "mean": 0.25, "none": None}
    assert torch.equal(scores(run), 2 * run.method.values.detach().double())
    assert run.scores().origin["step"] == STEPS


# ------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_lowers_its_objective_and_logs_it_by_name(model, objective, monkeypatch):
    monkeypatch.setitem(METHODS, "descent", (Descent, {"learning_rate": 0.5}))
    run, history = trainer(model, "descent", of_trainer={"objective": objective}), []
    train(run, listeners=[history.append])
    assert [metrics.to_dict()[objective] for metrics in history] == [m.value for m in history]
    at_once = [run.differentiate(run.pairs, gates)[0] for gates in (
        torch.full((model.graph.num_edges,), 0.5), run.method.gates(STEPS))]  # fmt: skip
    assert at_once[1] < at_once[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up(model, objective, size):
    """10 pairs; those with several targets, answers and distractors weigh as much as the others."""
    pairs = random_pairs(5) + [
        replace(pair, answer_ids=(*pair.target_ids[:1], 7, 8), distractor_ids=(9, 10))
        for pair in random_pairs(5, seed=1, predicted=2)
    ]
    gates = torch.rand(model.graph.num_edges, generator=torch.Generator().manual_seed(0))
    results = []
    for micro_batch_size in (None, size):
        of_trainer = {"objective": objective, "micro_batch_size": micro_batch_size}
        run = trainer(model, of_trainer=of_trainer)
        results.append(replace(run, pairs=pairs).differentiate(pairs, gates.clone()))
    for whole, added in zip(*results, strict=True):
        assert whole.abs().max() > 1e-3
        torch.testing.assert_close(added, whole, atol=1e-5, rtol=1e-4)


def test_objectives_that_do_not_apply_are_refused_before_the_first_step(model):
    pairs = random_pairs(4)
    without = [*pairs, replace(pairs[0], answer_ids=(), distractor_ids=())]
    unknown = [*pairs, replace(pairs[0], target_ids=(-1,))]
    assert objective_of("kl", Output.logits, without)[0] == "kl"
    assert objective_of("cross_entropy", Output.logits, without)[0] == "cross_entropy"
    for name in ("logit_difference", "max_logit_difference"):
        assert objective_of(name, Output.logits, unknown)[0] == name
        with pytest.raises(ConfigError, match=name):
            objective_of(name, Output.logits, without)
    with pytest.raises(ConfigError, match="cross_entropy"):
        objective_of("cross_entropy", Output.logits, unknown)
    for output in (Output.one_hot, Output.number):
        assert objective_of("kl", output, without)[0] == "unexplained"
        for name in set(OBJECTIVES) - {"kl"}:
            with pytest.raises(ConfigError, match=name):
                objective_of(name, output, pairs)


# -------------------------------------------------------------------------------- the same results


def assert_similar(one: Trainer, other: Trainer) -> None:
    for _ in range(6):
        left, right = one.train_step(), other.train_step()
        assert right.value == pytest.approx(left.value, rel=1e-4, abs=1e-6)
        size = "sparsity" if "sparsity" in left.values else "num_edges"
        assert right.values[size] == pytest.approx(left.values[size], rel=1e-5)
    torch.testing.assert_close(scores(other), scores(one), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["every_size", "lagrangian"])
def test_a_training_set_too_large_to_keep_gives_the_same_run(model, method, monkeypatch):
    kept, other = trainer(model, method), trainer(model, method)
    kept.differentiate(kept.pairs[:4], torch.ones(model.graph.num_edges))  # fills the cache
    monkeypatch.setattr(cache, "MAX_KEPT", 0)
    assert_similar(kept, other)


@pytest.mark.parametrize("method", ["every_size", "lagrangian"])
@pytest.mark.parametrize("settings", [{"micro_batch_size": 3}, {"recompute": True}], ids=str)
def test_ways_to_save_memory_give_the_same_run(model, method, settings):
    """Micro-batches of 3 and 1 of a batch of 4: objectives are means over examples either way."""
    assert_similar(trainer(model, method), trainer(model, method, of_trainer=settings))


def test_cuda_graphs_need_a_gpu(model):
    if model.device.type != "cuda":
        with pytest.raises(ConfigError, match="cuda_graph"):
            trainer(model, of_trainer={"cuda_graph": True})


# --------------------------------------------------------------------------------------- the loop


class MemoryStore:
    """A store that keeps everything in memory."""

    path = "memory"

    def __init__(self):
        self.saved, self.lines = [], []

    def latest(self):
        return self.saved[-1] if self.saved else None

    def save(self, checkpoint):
        state = {name: value.clone() for name, value in checkpoint.state.items()}
        self.saved.append(replace(checkpoint, state=state))

    def log(self, metrics):
        self.lines.append(metrics)

    def truncate_log(self, step):
        self.lines = [line for line in self.lines if line["step"] <= step]


def test_checkpoints_at_intervals_and_at_the_end_and_a_line_per_step(model):
    store = MemoryStore()
    train(trainer(model, of_trainer={"checkpoint_every": 5}), store=store)
    assert [checkpoint.step for checkpoint in store.saved] == [5, 10, 12]
    assert [line["step"] for line in store.lines] == [*range(1, 13)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize(("last", "method"), [(7, "every_size"), (STEPS, "lagrangian")])
def test_a_signal_saves_a_checkpoint_from_which_the_run_continues(model, number, last, method):
    whole, store, every = MemoryStore(), MemoryStore(), {"checkpoint_every": 5}
    uninterrupted = trainer(model, method, of_trainer=every)
    train(uninterrupted, store=whole)

    def interrupt(metrics):
        if metrics.step == last:
            os.kill(os.getpid(), number)

    inherited = signal.signal(number, signal.default_int_handler)  # nohup ignores SIGHUP
    try:
        with pytest.raises(Interrupted) as caught:
            train(trainer(model, method, of_trainer=every), store=store, listeners=[interrupt])
    finally:
        signal.signal(number, inherited)
    assert caught.value.exit_code == 128 + number
    assert [checkpoint.step for checkpoint in store.saved][-1] == last
    store.saved.pop()  # as if the machine had crashed before
    resumed = trainer(model, method, of_trainer=every)
    train(resumed, store=store)
    assert store.lines == whole.lines
    assert_same_state(resumed, uninterrupted)


def test_a_second_signal_interrupts_and_nohup_is_respected(model):
    def interrupt(metrics):
        os.kill(os.getpid(), signal.SIGHUP)
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(trainer(model), store=MemoryStore(), listeners=[interrupt])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_failure_saves_the_state_before_it(model, monkeypatch):
    run, store = trainer(model), MemoryStore()
    update = run.method.update

    def fail(step, objective, grad_gates):
        return update(step, objective * (math.nan if step == 3 else 1), grad_gates)

    monkeypatch.setattr(run.method, "update", fail)
    with pytest.raises(TrainingError):
        train(run, store=store)
    assert [checkpoint.step for checkpoint in store.saved] == [3]


@pytest.mark.parametrize("total", [1, 3, 1000])
def test_progress_without_a_terminal_is_a_few_lines(total, caplog):
    caplog.set_level("INFO", "edgeprune")
    with progress(total, "step") as show:
        for done in range(1, total + 1):
            show(done, "KL 0.1")
    assert len(caplog.records) <= 5
    assert f"step {total}/{total}  KL 0.1" in caplog.records[-1].message
