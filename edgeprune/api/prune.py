"""Pruning: from a model and prompts to scores and a circuit, and with a run directory to a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from edgeprune.api.make_run import Finished, Pruned, Scored, find_circuit, make_run
from edgeprune.api.shared import optional
from edgeprune.config import PruneConfig, TrainerConfig, from_dict, to_dict
from edgeprune.drawing import Ranks, draw_training
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.methods import METHODS
from edgeprune.paths import CONF
from edgeprune.prompts import Pair
from edgeprune.runs import layout
from edgeprune.runs.run import Run
from edgeprune.scale.memory import MemoryPlan, plan_memory
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import open_tracker
from edgeprune.training.progress import progress as progress_bar
from edgeprune.training.snapshots import is_due
from edgeprune.training.trainer import StepMetrics, Trainer, train

NUM_RANKED = 50
"""Number of edges whose ranks over the steps are plotted."""


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
    start: EdgeScores | None = None,
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
        start: scores, such as `attribute(...).scores`, from whose ranking learning starts; for
            `trainer="every_size"` and settings that begin with it.
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
    config = from_dict(PruneConfig, {
        "sparsity": sparsity, "num_edges": num_edges, "max_kl": max_kl,
        "min_exact_match": min_exact_match, "cleanup": cleanup, "seed": seed,
        "trainer": to_dict(trainer_config(trainer, settings)),
        "model": {"path": model.name}, "run_dir": "none",
    })  # fmt: skip
    score = partial(learn, start=start)
    return find_circuit(model, pairs, validation, config, ablation, score, progress=progress)


def trainer_config(name: str, changes: Mapping[str, Any]) -> TrainerConfig:
    """The settings of conf/trainer/NAME.yaml with changes."""
    known = {path.stem: path for path in (CONF / "trainer").glob("*.yaml")}
    if name not in known:
        raise ConfigError(f"unknown trainer {name!r}; choose {', '.join(sorted(known))}")
    settings = OmegaConf.to_container(OmegaConf.load(known[name]))
    method = settings.pop("defaults")[0].removesuffix("_schema")
    return from_dict(TrainerConfig, {"method": method, **settings, **changes})


def learn(
    model: CircuitModel,
    pairs: Sequence[Pair],
    config: PruneConfig,
    ablation: Ablation,
    *,
    start: EdgeScores | None = None,
    run: Run | None = None,
    world: World | None = None,
    progress: bool = True,
) -> Scored:
    """Train; checkpoints and metrics go into the run."""
    settings, world, asked = config.trainer, world or World(), config.sparsity
    if config.num_edges is not None:
        asked = 1 - model.graph.resolve_size(config.num_edges) / model.graph.num_edges
    options = settings.method_settings(asked)
    if config.start is not None:
        start = Run.open(config.start).scores()
    if start is not None:
        if start.graph != model.graph:
            raise ConfigError(f"start= has scores of {start.graph}, expected {model.graph}")
        settings.check_start()
        options["ranking"] = start.ranking()
    method = METHODS[settings.method](model.graph, seed=config.seed, device=model.device, **options)
    trainer = Trainer(model, pairs, method, settings, config.seed, ablation, world)
    history: list[StepMetrics] = []
    with ExitStack() as stack:
        show = stack.enter_context(progress_bar(settings.steps, "step", enabled=progress))
        listeners = [history.append, lambda metrics: show(metrics.step, metrics)]
        if run is not None:
            run.begin(model, world)
            if world.is_rank_zero:
                stack.callback(_plot, run)
                listeners.append(_recorder(run, trainer))
                if config.tracker.kind == "wandb":
                    tracker = open_tracker(config.tracker.project, run.path, to_dict(config))
                    listeners.append(stack.enter_context(tracker))
        train(trainer, store=run, listeners=listeners)
    learned = Scored(trainer.scores(), method.state_dict(), history)
    del trainer  # releases what it has cached
    model.release()
    return learned


def _recorder(run: Run, trainer: Trainer) -> Callable[[StepMetrics], None]:
    """Take the first snapshot, unless it is there; returns a listener that takes the others."""
    snapshots = run.snapshots()

    def save(step: int) -> None:
        nonlocal snapshots
        snapshots = snapshots.with_snapshot(step, trainer.scores().values)
        run.save_snapshots(snapshots)

    if not len(snapshots.steps):
        save(0)

    def record(metrics: StepMetrics) -> None:
        if is_due(metrics.step, trainer.steps):
            save(metrics.step)

    return record


def _plot(run: Run) -> None:
    path = run.path / layout.PLOT
    with optional(path):
        if metrics := run.metrics():
            draw_training(metrics, path, title=run.config.label, ranks=_ranks(run))


def _ranks(run: Run) -> Ranks | None:
    """The strongest edges' ranks over the run; None before the second snapshot."""
    snapshots = run.snapshots()
    if len(snapshots.steps) < 2:
        return None
    best = EdgeScores(run.graph, snapshots.scores[-1]).ranking()[:NUM_RANKED].tolist()
    names = [" → ".join(run.graph.edges[edge]) for edge in best]
    ranks = snapshots.ranks(best).T.tolist()
    return Ranks(snapshots.steps.tolist(), ranks, names, run.graph.num_edges)


def prune_run(config: PruneConfig) -> Finished | None:
    """Prune as a run, see `make_run`."""
    return make_run(config, learn, partial(_plan, config))


def _plan(
    config: PruneConfig, meta: CircuitModel, pairs: Sequence[Pair], world: World
) -> MemoryPlan:
    """The memory of a training step."""
    trainer, shard = config.trainer, config.launcher.shard
    batch_size = min(trainer.batch_size, len(pairs))
    per_process = math.ceil(batch_size / world.count)
    at_a_time = min(per_process, trainer.micro_batch_size or per_process)
    if shard and trainer.micro_batch_size and batch_size % (world.count * at_a_time):
        raise ConfigError(
            f"with launcher.shard=true {batch_size} pairs must divide evenly into parts of "
            f"{at_a_time} on {world.count} processes; change trainer.batch_size or its parts"
        )
    return plan_memory(
        meta, pairs, at_a_time, recompute=trainer.recompute, shares=world.count if shard else 1,
        offload=config.launcher.offload, bits=config.model.bits,
        corrupted_kept=config.ablation.kind == "interchange", repeated=trainer.repeats(len(pairs)),
    )  # fmt: skip
