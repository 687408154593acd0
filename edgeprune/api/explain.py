"""Explaining a circuit that is named by its run directory or file."""

import hashlib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.evaluate import (
    Case,
    case_record,
    checked_output,
    load_case,
    scores_of,
)
from edgeprune.api.learn_again import check_learned, learn_again, pairs_of_run
from edgeprune.api.shared import ablation_of
from edgeprune.config import ExplainConfig, PruneConfig
from edgeprune.errors import ConfigError
from edgeprune.evaluation.explain import Explanation, explain, num_circuits
from edgeprune.evaluation.pushes import Pushes, Retrained, Verification, measure_pushes
from edgeprune.files import write_json
from edgeprune.metrics import Output
from edgeprune.prompts import Pair, draw_pairs
from edgeprune.runs import layout
from edgeprune.runs.run import Run
from edgeprune.runs.source import find
from edgeprune.training.progress import counting, duration
from edgeprune.training.snapshots import Snapshots
from edgeprune.training.trainer import objective_of

log = logging.getLogger("edgeprune")


class ExplainedCircuit(NamedTuple):
    """An explanation, a title, and the file it was written to, if any."""

    explanation: Explanation
    title: str
    output: Path | None


def explain_circuit(config: ExplainConfig) -> ExplainedCircuit:
    """Explain a circuit that is named by its run directory or file."""
    source = find(config.circuit)
    output = checked_output(config, source)
    if config.verify:
        check_learned(source.run, "verify=", source.path)
    case = load_case(source, config)
    pairs = draw_pairs(case.pairs, config.prompts, config.seed)
    is_own = case.model.fingerprint() == source.digest("model")
    run = source.run if is_own else None
    snapshots = run.snapshots() if run else None
    unable = _why_no_pushes(run, case, snapshots)
    if config.verify and unable:
        raise ConfigError(f"verify= leaves out pairs by their pushes, but {unable}")
    count = num_circuits(case.file.circuit, config.edges)
    with counting(count, "cutting: circuit") as listen:
        explanation = explain(
            case.model, case.file.circuit, pairs, scores=scores_of(source, case.file),
            snapshots=snapshots, ablation=case.make_ablation(), max_edges=config.edges,
            batch_size=case.batch_size, seed=config.seed, listener=listen,
        )  # fmt: skip
    if unable and run and config.pairs:
        log.info(f"no pushes of training pairs are measured: {unable}")
    elif run and config.pairs:
        train = pairs_of_run(run, case.model)
        pushes = _pushes(run, case, train, explanation, snapshots, config)
        explanation = replace(explanation, pushes=pushes)
        if config.verify:
            found = _verify(run, case, train, explanation, config)
            explanation = replace(explanation, verification=found)
    if output is None and case.is_own:
        output = source.path.with_name(layout.EXPLANATION)
    if output is not None:
        record = case_record(source, case, pairs, config)
        write_json(output, record | explanation.to_dict())
    title = f"{case.title}: {len(case.file.circuit):,} edges, {len(pairs):,} {config.split} prompts"
    return ExplainedCircuit(explanation, title, output)


def _why_no_pushes(run: Run | None, case: Case, snapshots: Snapshots | None) -> str | None:
    """Why the pushes of training pairs cannot be measured; None if they can."""
    if run is None:
        return "the circuit is not that of a run, or the model is not the run's"
    if not isinstance(run.config, PruneConfig) or run.config.trainer.method != "every_size":
        method = run.config.method_name
        return f"{run.path} was made with {method}, and only trainer=every_size or short has them"
    if len(snapshots.steps) < 2:
        return f"{run.path} has no {layout.SNAPSHOTS}; train again with this version of edgeprune"
    if case.model.output is not Output.logits:
        return f"{case.model.name} outputs values, whose error is one of a whole batch"
    return None


def _pushes(
    run: Run, case: Case, train: Sequence[Pair], explanation: Explanation, snapshots: Snapshots,
    config: ExplainConfig,
) -> Pushes:  # fmt: skip
    """The pushes on all edges that were cut, and on those outside."""
    settings = run.config
    pairs = draw_pairs(train, len(train) if config.verify else config.pairs, config.seed)
    edges = [part.index for part in explanation.of_kind("edge")] + [*explanation.control_edges]
    _, objective = objective_of(settings.trainer.objective, case.model.output, train)
    ablation = ablation_of(case.model, settings.ablation, train, settings.evaluation_batch_size)
    num_snapshots = min(config.snapshots, max(1, len(snapshots.steps) - 1))
    with counting(len(pairs) * num_snapshots, "differentiating: pass") as listen:
        return measure_pushes(
            case.model, pairs, edges, snapshots, num_snapshots=num_snapshots,
            method={"seed": settings.seed, "device": case.model.device,
                    **settings.trainer.method_settings(None)},
            objective=objective, ablation=ablation, listener=listen,
        )  # fmt: skip


def _verify(
    run: Run, case: Case, train: Sequence[Pair], explanation: Explanation, config: ExplainConfig
) -> Verification:
    """Train again without the pairs that pushed an edge most, and without as many random ones."""
    pushes, edges = explanation.pushes, explanation.of_kind("edge")[: config.verify_edges]
    count = max(1, round(config.verify_share * len(train)))
    pushing: list[set[int]] = []  # per edge, the pairs to leave out
    places = {pair: place for place, pair in enumerate(train)}
    for edge in edges:
        most = pushes.on(edge.index).argsort(descending=True)[:count].tolist()
        pushing.append({places[pushes.pairs[i]] for i in most})
    total = config.verify * (2 + len(pushing))
    started, done, ranks = time.perf_counter(), 0, []
    for seed in range(run.config.seed, run.config.seed + config.verify):
        orders = []
        others = set(random.Random(f"{config.seed}/{seed}").sample(range(len(train)), count))
        for without in [set(), others, *pushing]:
            kept = [pair for place, pair in enumerate(train) if place not in without]
            digest = hashlib.sha256(repr(sorted(without)).encode()).hexdigest()[:12]
            scores = learn_again(run, case.model, f"without-{digest}-seed-{seed}", kept, seed)
            orders.append(scores.ranking().argsort().tolist())  # [edge], ranks from 0
            done += 1
            remaining = (time.perf_counter() - started) / done * (total - done)
            log.info(f"training {done}/{total}, about {duration(remaining)} left")
        for edge, order in zip(edges, orders[2:], strict=True):
            found = (1 + each[edge.index] for each in (orders[0], order, orders[1]))
            ranks.append(Retrained(edge.title, seed, *found))
    return Verification(len(train), count, tuple(ranks))
