"""Scoring edges without learning, and with a run directory as a run."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from edgeprune.api.make_run import Finished, Pruned, Scored, find_circuit, make_run
from edgeprune.api.shared import read
from edgeprune.circuit import Circuit
from edgeprune.config import AttributeConfig, from_dict
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.methods import ATTRIBUTIONS
from edgeprune.methods.attribution import Attribution
from edgeprune.metrics import Output
from edgeprune.prompts import Pair
from edgeprune.runs.run import Run
from edgeprune.runs.source import find
from edgeprune.scale.memory import MemoryPlan, plan_memory
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.attributor import Attributor
from edgeprune.training.progress import duration
from edgeprune.training.progress import progress as progress_bar
from edgeprune.training.trainer import StepMetrics, objective_of, train

log = logging.getLogger("edgeprune")

LONG = 60
"""Seconds from which the expected duration is reported."""


def attribute(
    model: CircuitModel,
    pairs: Sequence[Pair],
    validation: Sequence[Pair] | None = None,
    *,
    method: str = "eap_ig",
    metric: str | None = None,
    steps: int = 5,
    batch_size: int = 16,
    threshold: float = 0.01,
    circuit: Circuit | None = None,
    sparsity: float | None = None,
    num_edges: int | None = None,
    max_kl: float | None = None,
    min_exact_match: float | None = None,
    cleanup: float | None = None,
    ablation: Ablation | str = "interchange",
    progress: bool = True,
) -> Pruned:
    """Score the edges of a model without learning, and choose a circuit.

    Args:
        method: `eap`, `eap_ig`, `eap_ig_activations`, `clean_corrupted`, `relp`, `gim`, `gates`,
            `exact` or `acdc`, see `methods/`.
        metric: what edges are scored by: `kl` from the full model, or `logit_difference`; None:
            `logit_difference` for `eap`, `relp` and `gim`, else `kl`.
        steps: number of points over which a method integrates.
        batch_size: pairs run at a time.
        threshold: for `acdc`, by how much the metric must get worse for an edge to stay.
        circuit: for `exact` and `acdc`: the circuit whose edges alone are cut; None: all edges.
        model, pairs, validation, progress and the others: as for `prune`. Without a size, `acdc`
            gives the circuit of its threshold.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range, or does not apply.
        ValueError: there are no prompts, or one is too long for the model.
        TrainingError: a gradient is not finite.
    """
    config = from_dict(AttributeConfig, {
        "method": method, "metric": metric, "steps": steps, "batch_size": batch_size,
        "threshold": threshold, "sparsity": sparsity, "num_edges": num_edges, "max_kl": max_kl,
        "min_exact_match": min_exact_match, "cleanup": cleanup,
        "model": {"path": model.name}, "run_dir": "none",
    })  # fmt: skip
    if circuit is not None:
        config.check_cuts()
    score = partial(_score, circuit=circuit)
    return find_circuit(model, pairs, validation, config, ablation, score, progress=progress)


def attribute_run(config: AttributeConfig) -> Finished | None:
    """Score edges as a run, see `make_run`."""
    return make_run(config, _score, partial(_plan, config))


def score_edges(
    model: CircuitModel, pairs: Sequence[Pair], method: str, **settings: Any
) -> EdgeScores:
    """The scores alone, under interchange ablation, without a progress bar."""
    config = from_dict(AttributeConfig, {
        "method": method, **settings, "model": {"path": model.name}, "run_dir": "none",
    })  # fmt: skip
    ablation = Ablation(model, "interchange", pairs)
    return _score(model, pairs, config, ablation, progress=False).scores


def _score(
    model: CircuitModel,
    pairs: Sequence[Pair],
    config: AttributeConfig,
    ablation: Ablation,
    *,
    circuit: Circuit | None = None,
    run: Run | None = None,
    world: World | None = None,
    progress: bool = True,
) -> Scored:
    """Score the edges; checkpoints and metrics go into the run."""
    world = world or World()
    attribution, objective = _attribution(model, pairs, config, ablation, circuit, world)
    attributor = Attributor(attribution, objective)
    history: list[StepMetrics] = []
    with ExitStack() as stack:
        if run is not None:
            run.begin(model, world)
        seconds = None
        if progress or world.count > 1:  # all processes, which share a sharded model
            seconds = world.run(model, attribution.expected_seconds)
        if seconds is not None and seconds > LONG:
            log.info(
                f"{config.method} runs the model once per edge and batch: at most about "
                f"{duration(seconds)} in all"
            )
        show = stack.enter_context(progress_bar(attributor.steps, "step", enabled=progress))
        listeners = [history.append, lambda metrics: show(metrics.step, metrics)]
        train(attributor, store=run, listeners=listeners)
    model.release()
    return Scored(attributor.scores(), {}, history)


def _attribution(
    model: CircuitModel,
    pairs: Sequence[Pair],
    config: AttributeConfig,
    ablation: Ablation,
    circuit: Circuit | None,
    world: World,
) -> tuple[Attribution, str]:
    """The method with its settings, and the name of the objective."""
    if config.circuit is not None:
        circuit = read(find(config.circuit), model.graph).circuit
    if circuit is None:
        circuit = Circuit.from_mask(model.graph, [True] * model.graph.num_edges)
    Circuit.check(circuit, model.graph)
    name = {"logit_difference": "max_logit_difference"}.get(config.metric, config.metric)
    name, objective = objective_of(name, model.output, pairs, f"metric={config.metric}")
    batch_size = config.batch_size
    if model.output is not Output.logits:
        batch_size = len(pairs)  # values are compared by the variance of all prompts
    attribution = ATTRIBUTIONS[config.method](
        model=model, pairs=pairs, ablation=ablation, objective=objective, world=world,
        method=config.method, batch_size=batch_size, integration_steps=config.steps,
        threshold=config.threshold, circuit=circuit,
    )  # fmt: skip
    return attribution, config.metric if name != "unexplained" else name


def _plan(
    config: AttributeConfig, meta: CircuitModel, pairs: Sequence[Pair], world: World
) -> MemoryPlan:
    """The memory of a step of a batch: at most that of a training step."""
    if meta.output is not Output.logits and world.count > 1:
        raise ConfigError(
            f"{world.count} processes cannot share the prompts of {meta.name}, whose outputs are "
            "compared by their variance; start one process"
        )
    at_a_time = math.ceil(min(config.batch_size, len(pairs)) / world.count)
    plan = plan_memory(
        meta, pairs, at_a_time, shares=world.count if config.launcher.shard else 1,
        offload=config.launcher.offload, bits=config.model.bits,
        corrupted_kept=config.ablation.kind == "interchange",
        repeated=config.method in ("exact", "acdc"),
    )  # fmt: skip
    return replace(plan, masks=3 * 8 * meta.graph.num_edges)
