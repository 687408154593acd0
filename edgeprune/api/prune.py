"""Pruning: from a model and prompts to scores and a circuit, and with a run directory to a run."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from edgeprune.api.choose import check_choice, choose, cleaned_up, curve_of
from edgeprune.api.evaluate import evaluation_record
from edgeprune.api.page import page, write_run_page
from edgeprune.api.shared import ablation_of, load_model_of
from edgeprune.circuit import Circuit
from edgeprune.config import LESS_MEMORY, PruneConfig, TrainerConfig, from_dict, to_dict
from edgeprune.drawing import draw_frontier, draw_training
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.curve import Curve, curve_panels, default_sizes
from edgeprune.evaluation.evaluate import Evaluation, evaluate
from edgeprune.files import file_digest, write_json
from edgeprune.methods import METHODS
from edgeprune.metrics import Output
from edgeprune.models.load import load_meta_model
from edgeprune.paths import CONF
from edgeprune.prompts import Pair, PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import held_out_pairs, kind_of_prompts, load_pairs, make_data
from edgeprune.runs.run import Run, claim
from edgeprune.scale.memory import free_memory, in_gb, plan_memory
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import open_tracker
from edgeprune.training.progress import progress as progress_bar
from edgeprune.training.trainer import StepMetrics, Trainer, train

log = logging.getLogger("edgeprune")


@dataclass(frozen=True)
class Pruned:
    """What pruning found.

    Attributes:
        circuit: the circuit that was chosen, cleaned up if that was asked for.
        scores: of all edges; `scores.circuit(num_edges=...)` gives circuits of other sizes.
        curve: metrics of circuits of many sizes.
        history: one entry per step.
        ablation: what closed edges carried, for `evaluate` and `clean_up`.
        origin: how the circuit was chosen, as JSON values.
    """

    circuit: Circuit
    scores: EdgeScores = field(repr=False)
    curve: Curve = field(repr=False)
    history: list[StepMetrics] = field(repr=False)
    ablation: Ablation = field(repr=False)
    origin: Mapping[str, Any] = field(repr=False)

    def _repr_html_(self) -> str:
        """In a notebook: the page, in a frame."""
        return page(self)._repr_html_()


def prune(
    model: CircuitModel,
    pairs: Sequence[Pair],
    validation: Sequence[Pair] | None = None,
    *,
    sparsity: float | None = None,
    num_edges: int | None = None,
    max_kl: float | None = None,
    min_exact_match: float | None = None,
    cleanup: float | None = None,
    seed: int = 0,
    ablation: Ablation | str = "interchange",
    trainer: str = "every_size",
    progress: bool = True,
    **settings: Any,
) -> Pruned:
    """Rank the edges of a model by how much a task needs them, and choose a circuit.

    Args:
        model: from `load_model`.
        pairs: training prompts, from `load_dataset`.
        validation: prompts on which circuits are measured to choose one; None: the training
            prompts, on which circuits look better than they are.
        sparsity: fraction of the edges to remove, exactly.
        num_edges: or number of edges to keep, exactly.
        max_kl: or the smallest circuit with at most this KL, in nats.
        min_exact_match: or the smallest circuit that gives the full model's answer on at least this
            fraction of the prompts. Without any of these four: the smallest circuit whose KL is at
            most 5 % of the empty circuit's.
        cleanup: then remove edges that the circuit does not need; the tolerance of `clean_up`.
        seed: of the initial values, the sizes or noise, and the order of the data.
        ablation: what closed edges carry: `interchange`, `zero`, `mean` (over `pairs`, one mean per
            position), or an `Ablation`.
        trainer: settings to start from, as `trainer=` on the command line.
        progress: whether to show progress bars.
        settings: changes to these, such as `steps=300`.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
        ValueError: there are no prompts, or one is too long for the model.
        TrainingError: the loss is not finite.
    """
    held_out = pairs if validation is None else validation
    model.check_prompts(pairs)
    model.check_prompts(held_out)
    config = from_dict(PruneConfig, {
        "sparsity": sparsity, "num_edges": num_edges, "max_kl": max_kl,
        "min_exact_match": min_exact_match, "cleanup": cleanup, "seed": seed,
        "trainer": to_dict(trainer_config(trainer, settings)),
        "model": {"path": model.name}, "run_dir": "none",
    })  # fmt: skip
    check_choice(config.choice, has_kl=model.output is Output.logits)
    ablation = Ablation.of(model, ablation, pairs, config.evaluation_batch_size)
    learned = _learn(model, pairs, config, ablation, progress=progress)
    prompts = "training" if validation is None else "validation"
    return _choose(
        model, pairs, held_out, config, ablation, learned, prompts=prompts, progress=progress
    )


def trainer_config(name: str, changes: Mapping[str, Any]) -> TrainerConfig:
    """The settings of conf/trainer/NAME.yaml with changes."""
    known = {path.stem: path for path in (CONF / "trainer").glob("*.yaml")}
    if name not in known:
        raise ConfigError(f"unknown trainer {name!r}; choose {', '.join(sorted(known))}")
    settings = OmegaConf.to_container(OmegaConf.load(known[name]))
    method = settings.pop("defaults")[0].removesuffix("_schema")
    return from_dict(TrainerConfig, {"method": method, **settings, **changes})


class Learned(NamedTuple):
    """The scores, the state of the method that learned them, and one entry per step."""

    scores: EdgeScores
    state: Mapping[str, Tensor]
    history: list[StepMetrics]


def _learn(
    model: CircuitModel,
    pairs: Sequence[Pair],
    config: PruneConfig,
    ablation: Ablation,
    *,
    run: Run | None = None,
    world: World | None = None,
    progress: bool = True,
) -> Learned:
    """Train; checkpoints and metrics go into the run."""
    settings, world, asked = config.trainer, world or World(), config.sparsity
    if config.num_edges is not None:
        asked = 1 - model.graph.resolve_size(config.num_edges) / model.graph.num_edges
    method = METHODS[settings.method](
        model.graph, seed=config.seed, device=model.device, **settings.method_settings(asked)
    )
    trainer = Trainer(model, pairs, method, settings, config.seed, ablation, world)
    history: list[StepMetrics] = []
    with ExitStack() as stack:
        show = stack.enter_context(progress_bar(settings.steps, "step", enabled=progress))
        listeners = [history.append, lambda metrics: show(metrics.step, metrics)]
        if run is not None:
            run.begin(model, world)
            if world.is_rank_zero:
                stack.callback(_plot, run)
                if config.tracker.kind == "wandb":
                    tracker = open_tracker(config.tracker.project, run.path, to_dict(config))
                    listeners.append(stack.enter_context(tracker))
        train(trainer, store=run, listeners=listeners)
    learned = Learned(trainer.scores(), method.state_dict(), history)
    del trainer  # releases what it has cached
    model.release()
    return learned


def _choose(
    model: CircuitModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    config: PruneConfig,
    ablation: Ablation,
    learned: Learned,
    *,
    prompts: str,
    agree: Callable[[bool], bool] = bool,
    progress: bool = True,
) -> Pruned:
    """Measure circuits of many sizes, choose one and clean it up; `agree` as for `choose`."""
    scores, state, history = learned
    measure = partial(
        curve_of, model, scores, held_out, ablation, config.evaluation_batch_size, progress=progress
    )
    circuit, origin, curve = choose(
        scores, config.choice, state=lambda: state, measure=measure, agree=agree
    )
    curve = curve or measure(default_sizes(scores.graph.num_edges, len(circuit)))
    if config.cleanup is not None:
        circuit, origin = cleaned_up(
            model, circuit, origin, pairs, tolerance=config.cleanup, scores=scores,
            ablation=ablation, batch_size=config.evaluation_batch_size,
        )  # fmt: skip
    origin = {"scores": dict(scores.origin), **origin}
    return Pruned(circuit, scores, replace(curve, prompts=prompts), history, ablation, origin)


def _plot(run: Run) -> None:
    """Plot the training. A failure here must neither hide how it ended nor cost the circuit."""
    try:
        if metrics := run.metrics():
            title = f"{run.config.title}, seed {run.config.seed}"
            draw_training(metrics, run.path / layout.PLOT, title=title)
    except Exception as error:
        log.warning(f"{run.path / layout.PLOT} is not drawn: {error}")


def _plot_curve(run: Run, curve: Curve) -> None:
    """Plot the curve. As with `_plot`, a failure costs nothing else."""
    path = run.path / layout.CURVE_PLOT
    try:
        title = f"{run.config.title}, seed {run.config.seed}, {curve.prompts} prompts"
        draw_frontier(curve_panels({"": [curve]}), path, title=title, all_edges=curve.num_edges)
    except Exception as error:
        log.warning(f"{path} is not drawn: {error}")


@dataclass(frozen=True)
class Finished:
    """A finished run, and how its circuit does on prompts that are held out if there are any."""

    run: Run
    pruned: Pruned
    prompts: str  # "training", "validation" or "test"
    evaluation: Evaluation


def prune_run(config: PruneConfig) -> Finished | None:
    """Prune as a run: load model and prompts, train, choose the circuit and measure it.

    Under several processes all call this; rank 0 writes the files and gets the result.
    """
    with World.join(config.model.device, config.launcher.timeout) as world:
        if not world.is_rank_zero:
            log.setLevel(logging.ERROR)
        world.check_same("the settings", str(config))
        with claim(config, world) as run:
            model, pairs, split, held_out = _load(run, world)
            check_choice(config.choice, has_kl=model.output is Output.logits)
            ablation = ablation_of(model, config.ablation, pairs, config.evaluation_batch_size)
            progress = world.is_rank_zero
            learned = _learn(
                model, pairs, config, ablation, run=run, world=world, progress=progress
            )
            if world.is_rank_zero:
                learned.scores.save(run.path / layout.SCORES)
            if not config.launcher.shard:  # a sharded model needs all processes to the end
                world.close()
                if not world.is_rank_zero:
                    return None
            prompts = kind_of_prompts(split, held_out)
            pruned = _choose(
                model, pairs, held_out, config, ablation, learned, prompts=prompts,
                agree=world.any if config.launcher.shard else bool, progress=progress,
            )  # fmt: skip
            evaluation = evaluate(
                model, pruned.circuit, held_out, ablation=ablation,
                batch_size=config.evaluation_batch_size,
            )  # fmt: skip
            if not world.is_rank_zero:
                return None
            write_json(run.path / layout.CURVE, pruned.curve.to_dict())
            _plot_curve(run, pruned.curve)
            run.write_circuit(pruned.circuit, pruned.origin)
            record = evaluation_record(
                model, pruned.circuit, held_out, split, config.ablation, evaluation,
                data_digest=run.digests["data"], is_own=True,
            )  # fmt: skip
            write_json(run.path / layout.evaluation(split), record)
            write_run_page(run, None if config.launcher.shard else model, pruned.ablation)
            return Finished(run, pruned, prompts, evaluation)


def _load(run: Run, world: World) -> tuple[CircuitModel, PairDataset, str, PairDataset]:
    """The model, the training prompts, and the split and prompts on which the run is measured."""
    config = run.config
    load_meta = partial(
        load_meta_model, config.model.path, dtype=config.model.dtype, bits=config.model.bits,
        embedding_writers=config.model.embedding_writers,
        trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    meta = load_meta()  # with the default attention, since not every one runs without weights
    world.on_rank_zero(lambda: make_data(config.task, meta.tokenizer, run.path))
    path = make_data(config.task, meta.tokenizer, run.path)
    pairs = load_pairs(path, config.task, meta, "train")
    split, held_out = held_out_pairs(path, config.task, config.ablation, meta, pairs)
    _check_memory(config, meta, pairs, world)
    world.check_same("the data", file_digest(path))
    several = f", {world.count} processes" if world.count > 1 else ""
    log.info(
        f"{config.title}: {meta.graph.num_edges:,} edges, {len(pairs):,} training and "
        f"{len(held_out):,} {split} prompts, {config.trainer.steps:,} steps{several}"
    )
    if config.launcher.shard:
        on_cpu = partial(load_model_of, replace(config.model, device="cpu"))
        meta = load_meta(attention=config.model.attention)
        return world.shard(on_cpu, meta, offload=config.launcher.offload), pairs, split, held_out
    model = load_model_of(replace(config.model, device=world.device))
    world.check_same("the models", model.fingerprint())
    return model, pairs, split, held_out


def _check_memory(
    config: PruneConfig, meta: CircuitModel, pairs: PairDataset, world: World
) -> None:
    """Report how much memory a process will need; raises ConfigError if there is less."""
    trainer, shard = config.trainer, config.launcher.shard
    batch_size = min(trainer.batch_size, len(pairs))
    per_process = math.ceil(batch_size / world.count)
    at_a_time = min(per_process, trainer.micro_batch_size or per_process)
    if shard and trainer.micro_batch_size and batch_size % (world.count * at_a_time):
        raise ConfigError(
            f"with launcher.shard=true {batch_size} pairs must divide evenly into parts of "
            f"{at_a_time} on {world.count} processes; change trainer.batch_size or its parts"
        )
    plan = plan_memory(
        meta, pairs, at_a_time, recompute=trainer.recompute, shares=world.count if shard else 1,
        offload=config.launcher.offload, bits=config.model.bits,
        corrupted_kept=config.ablation.kind == "interchange", repeated=trainer.repeats(len(pairs)),
    )  # fmt: skip
    free = free_memory(world.device)
    log.info(f"memory per process: about {in_gb(plan.total)} of {in_gb(free)} that are free")
    if world.any(plan.total > free):
        raise ConfigError(
            f"{config.model.title} needs about {plan} per process, but {in_gb(free)} are free. "
            f"{LESS_MEMORY}"
        )
