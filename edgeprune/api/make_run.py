"""What all ways to score edges share: from scores to a circuit, and with a directory to a run.

`api/prune.py` and `api/attribute.py` differ in how the edges are scored.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from edgeprune.api.choose import Pruned, check_choice, choose, cleaned_up, curve_of
from edgeprune.api.evaluate import evaluation_record
from edgeprune.api.page import write_run_page
from edgeprune.api.shared import (
    ablation_of,
    load_in,
    load_meta_model_of,
    optional,
)
from edgeprune.config import LESS_MEMORY, RunConfig
from edgeprune.drawing import draw_frontier
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.curve import Curve, curve_panels, default_sizes
from edgeprune.evaluation.evaluate import Evaluation, evaluate
from edgeprune.files import file_digest, write_json
from edgeprune.metrics import Output
from edgeprune.prompts import Pair, PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import held_out_pairs, kind_of_prompts, load_pairs, make_data
from edgeprune.runs.run import Run, claim
from edgeprune.scale.memory import MemoryPlan, free_memory, in_gb
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.trainer import StepMetrics

log = logging.getLogger("edgeprune")


class Scored(NamedTuple):
    """The scores, the state of the method that made them, and one entry per step."""

    scores: EdgeScores
    state: Mapping[str, Tensor]
    history: list[StepMetrics]


Scorer = Callable[..., Scored]
"""(model, prompts, settings, ablation, and by name: run, world, progress) -> the scores.

Checkpoints and metrics go into the run, if there is one.
"""

Planner = Callable[[CircuitModel, Sequence[Pair], World], MemoryPlan]
"""(model without weights, prompts, processes) -> the memory per process; raises ConfigError if the
processes cannot share the work."""


def find_circuit(
    model: CircuitModel,
    pairs: Sequence[Pair],
    validation: Sequence[Pair] | None,
    config: RunConfig,
    ablation: Ablation | str,
    score: Scorer,
    *,
    progress: bool,
) -> Pruned:
    """Score the edges and choose a circuit, without a run directory.

    Args:
        validation: prompts on which circuits are measured; None: the training prompts.
    """
    held_out = pairs if validation is None else validation
    model.check_prompts(pairs)
    model.check_prompts(held_out)
    check_choice(config.choice, has_kl=model.output is Output.logits)
    ablation = Ablation.of(model, ablation, pairs, config.evaluation_batch_size)
    scored = score(model, pairs, config, ablation, progress=progress)
    prompts = "training" if validation is None else "validation"
    return choose_circuit(
        model, pairs, held_out, config, ablation, scored, prompts=prompts, progress=progress
    )


def choose_circuit(
    model: CircuitModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    config: RunConfig,
    ablation: Ablation,
    scored: Scored,
    *,
    prompts: str,
    agree: Callable[[bool], bool] = bool,
    progress: bool = True,
) -> Pruned:
    """Measure circuits of many sizes, choose one and clean it up; `agree` as for `choose`."""
    scores, state, history = scored
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


@dataclass(frozen=True)
class Finished:
    """A finished run, and how its circuit does on prompts that are held out if there are any."""

    run: Run
    pruned: Pruned
    prompts: str  # "training", "validation" or "test"
    evaluation: Evaluation


def make_run(config: RunConfig, score: Scorer, plan: Planner) -> Finished | None:
    """Make a run: load model and prompts, score the edges, choose the circuit and measure it.

    Under several processes all call this; rank 0 writes the files and gets the result.
    """
    with World.join(config.model.device, config.launcher.timeout) as world:
        world.check_same("the settings", str(config))
        with claim(config, world) as run:
            model, pairs, split, held_out = _load(run, world, plan)
            check_choice(config.choice, has_kl=model.output is Output.logits)
            ablation = ablation_of(model, config.ablation, pairs, config.evaluation_batch_size)
            progress = world.is_rank_zero
            scored = score(model, pairs, config, ablation, run=run, world=world, progress=progress)
            if world.is_rank_zero:
                scored.scores.save(run.path / layout.SCORES)
            if not config.launcher.shard:  # a sharded model needs all processes to the end
                world.close()
                if not world.is_rank_zero:
                    return None
            prompts = kind_of_prompts(split, held_out)
            pruned = world.run(model, partial(
                choose_circuit, model, pairs, held_out, config, ablation, scored, prompts=prompts,
                agree=world.any if config.launcher.shard else bool, progress=progress,
            ))  # fmt: skip
            evaluation = world.run(model, partial(
                evaluate, model, pruned.circuit, held_out, ablation=ablation,
                batch_size=config.evaluation_batch_size,
            ))  # fmt: skip
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


def _load(
    run: Run, world: World, plan: Planner
) -> tuple[CircuitModel, PairDataset, str, PairDataset]:
    """The model, the training prompts, and the split and prompts on which the run is measured."""
    config = run.config
    # With the default attention, since not every one runs without weights.
    meta = load_meta_model_of(replace(config.model, attention="auto"))
    world.on_rank_zero(lambda: make_data(config.task, meta.tokenizer, run.path))
    path = make_data(config.task, meta.tokenizer, run.path)
    pairs = load_pairs(path, config.task, meta, "train")
    split, held_out = held_out_pairs(path, config.task, config.ablation, meta, pairs)
    _check_memory(config, plan(meta, pairs, world), world)
    world.check_same("the data", file_digest(path))
    several = f", {world.count} processes" if world.count > 1 else ""
    is_held_out = kind_of_prompts(split, held_out) != "training"
    others = f" and {len(held_out):,} {split}" if is_held_out else ""
    log.info(
        f"{config.title}: {meta.graph.num_edges:,} edges, {len(pairs):,} training{others} prompts, "
        f"{config.method_name}{several}"
    )
    model = load_in(world, config.model, config.launcher)
    if not config.launcher.shard:  # shards have no fingerprint
        world.check_same("the models", model.fingerprint())
    return model, pairs, split, held_out


def _check_memory(config: RunConfig, plan: MemoryPlan, world: World) -> None:
    """Report how much memory a process will need; raises ConfigError if there is less."""
    free = free_memory(world.device)
    log.info(f"memory per process: about {in_gb(plan.total)} of {in_gb(free)} that are free")
    if world.any(plan.total > free):
        raise ConfigError(
            f"{config.model.title} needs about {plan} per process, but {in_gb(free)} are free. "
            f"{LESS_MEMORY}"
        )


def _plot_curve(run: Run, curve: Curve) -> None:
    path, title = run.path / layout.CURVE_PLOT, f"{run.config.label}, {curve.prompts} prompts"
    with optional(path):
        draw_frontier(curve_panels({"": [curve]}), path, title=title, all_edges=curve.num_edges)
