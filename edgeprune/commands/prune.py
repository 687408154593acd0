"""`edgeprune prune`."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from edgeprune.commands.evaluate import evaluate
from edgeprune.commands.export import export
from edgeprune.commands.shared import (
    be_quiet,
    data_file,
    first_split,
    load_model,
    load_pairs,
    make_data,
    run_title,
    say,
    show,
)
from edgeprune.config import (
    LESS_MEMORY,
    AblationKind,
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    Split,
    TrackerConfig,
    asked_sparsity,
    check_run,
    evaluation_batch_size,
    target_sparsity,
    to_dict,
)
from edgeprune.errors import ConfigError
from edgeprune.files import file_digest
from edgeprune.scale.launch import check_launched, in_processes, launch_processes

if TYPE_CHECKING:
    from edgeprune.models import CircuitModel
    from edgeprune.prompts import PairDataset
    from edgeprune.scale.world import World
    from edgeprune.training.trainer import StepMetrics


def prune(config: PruneConfig) -> None:
    """Learn the gates of a model's edges on a task; leaves a run directory."""
    check_run(config)
    if in_processes():
        check_launched(config.launcher.processes)
    elif config.launcher.processes != 1:
        launch_processes(config.launcher.processes, HydraConfig.get().overrides.task)
        return
    from edgeprune.scale.world import World
    from edgeprune.training import run

    run_dir = Path(config.run_dir)
    with World.join(config.model.device, config.launcher.timeout) as processes:
        if not processes.is_rank_zero:
            be_quiet()
        processes.check_same("the settings", str(config))
        with ExitStack() as held:

            def claim() -> None:
                held.enter_context(run.locked(run_dir))
                held.callback(shutil.rmtree, run_dir / run.NEW, ignore_errors=True)
                run.claim(run_dir, config)

            processes.on_rank_zero(claim)
            model, pairs, data_path = _load(config, run_dir, processes)
            _train(config, run_dir, processes, model, pairs, data_path)
            if not config.launcher.shard:  # only a sharded model needs all of them to the end
                processes.close()
            if config.launcher.shard or processes.is_rank_zero:
                _finish(config, run_dir, processes, model)


def _load(
    config: PruneConfig, run_dir: Path, processes: World
) -> tuple[CircuitModel, PairDataset, Path]:
    """The model, the training prompts and the file they are in, the same on each process."""
    from edgeprune.models import load_meta_model
    from edgeprune.runs.run import first_files

    make_shape = partial(
        load_meta_model,
        config.model.path,
        dtype=config.model.dtype,
        bits=config.model.bits,
        embedding_writers=config.model.embedding_writers,
        trust_remote_code=config.model.trust_remote_code,
    )
    shape = make_shape()  # not every attention can be planned with
    folder = first_files(run_dir, processes)
    processes.on_rank_zero(lambda: make_data(config.task, shape.tokenizer, folder))
    data_path = data_file(config.task, folder)
    pairs = load_pairs(data_path, config.task, shape, "train")
    _check_validation(config, shape, pairs, data_path)
    _plan_memory(config, shape, pairs, processes)
    processes.check_same("the data", file_digest(data_path))
    if config.launcher.shard:
        on_cpu = replace(config.model, device="cpu")
        shape = make_shape(attention=config.model.attention)
        model = processes.shard(lambda: load_model(on_cpu), shape, offload=config.launcher.offload)
    else:
        model = load_model(replace(config.model, device=processes.device))
        processes.check_same("the models", model.fingerprint())
    return model, pairs, data_path


def _check_validation(
    config: PruneConfig, shape: CircuitModel, pairs: PairDataset, data_path: Path
) -> None:
    """Find now, and not after training, that validation or test prompts cannot be measured.

    Test prompts that all do not fit are said, since the run needs none.

    Raises:
        DataError: a line is malformed, or none of the validation prompts can be used.
        ConfigError: the mean over the training prompts does not reach as far.
    """
    from edgeprune.errors import NoneUsableError

    split = first_split(data_path, Split.validation).name
    validation = load_pairs(data_path, config.task, shape, split)
    if split != Split.train.name and pairs.has_splits:
        held_out = Counter((pair.clean_ids, pair.corrupted_ids) for pair in validation)
        seen = sum(held_out.pop((pair.clean_ids, pair.corrupted_ids), 0) for pair in pairs)
        if seen:
            say(f"{seen:,} of {len(validation):,} {split} prompts are training prompts, too")
    if split != Split.test.name and first_split(data_path, Split.test) is Split.test:
        try:
            load_pairs(data_path, config.task, shape, Split.test.name)
        except NoneUsableError as error:
            say(f"the run cannot be measured on its test prompts: {error}")
    ablation = config.ablation
    if ablation.kind is AblationKind.mean and ablation.per_position:
        known, needed = (max(len(p.clean_ids) for p in of) for of in (pairs, validation))
        if needed > known:
            raise ConfigError(
                f"a {split} prompt has {needed} tokens, but each position's mean is taken over "
                f"training prompts of {known} at most; leave longer ones out "
                f"(task.max_length={known}), or set ablation.per_position=false"
            )


def _train(
    config: PruneConfig,
    run_dir: Path,
    processes: World,
    model: CircuitModel,
    pairs: PairDataset,
    data_path: Path,
) -> None:
    from edgeprune.engine.ablation import Ablation
    from edgeprune.methods.objective import unfinished
    from edgeprune.training import run
    from edgeprune.training.progress import training_progress
    from edgeprune.training.tracker import Tracker
    from edgeprune.training.trainer import Trainer

    trainer = Trainer(
        model,
        pairs,
        config.trainer,
        target_sparsity=target_sparsity(config, model.graph.num_edges),
        seed=config.seed,
        ablation=Ablation(model, config.ablation, pairs, evaluation_batch_size(config.trainer)),
        processes=processes,
    )
    processes.on_rank_zero(lambda: run.begin(run_dir, config, model, data_path))
    number = f", {processes.count} processes" if processes.count > 1 else ""
    left_out = f" ({len(pairs.skipped):,} left out)" if pairs.skipped else ""
    say(
        f"pruning {model.name} ({model.graph.num_edges:,} edges) on {config.task.name}: "
        f"{len(pairs):,} pairs{left_out}, {config.trainer.steps:,} steps{number}, in {run_dir}"
    )
    tracker = config.tracker if processes.is_rank_zero else TrackerConfig()
    last: StepMetrics | None = None

    def after_step(metrics: StepMetrics) -> None:
        nonlocal last
        last = metrics
        progress(metrics)
        track(metrics)

    try:
        with (
            Tracker(tracker, run_dir, to_dict(config)) as track,
            training_progress(config.trainer.steps, enabled=processes.is_rank_zero) as progress,
        ):
            run.train(trainer, run_dir, after_step, say)
    finally:  # also of a run that was stopped
        if processes.is_rank_zero:
            _plot(run_dir, config)
    asked = asked_sparsity(config, model.graph.num_edges)
    message = unfinished(last.sparsity, asked) if last and asked is not None else None
    if message:
        say(message)


def _plot(run_dir: Path, config: PruneConfig) -> None:
    """Draw how the run went. What fails there must not hide how it ended, nor cost the circuit."""
    from edgeprune.drawing.training import draw_training
    from edgeprune.runs.run import METRICS, PLOT, read_metrics

    path = run_dir / PLOT
    try:
        metrics = read_metrics(run_dir / METRICS)
        if metrics:
            draw_training(metrics, path, title=f"{run_title(run_dir)}, seed {config.seed}")
            show(f"-> {path}")
    except Exception as error:
        say(f"{path} is not drawn: {error}")


def _finish(config: PruneConfig, run_dir: Path, processes: World, model: CircuitModel) -> None:
    """Export the circuit, and measure it on the validation prompts."""
    model.release()
    size = ExportConfig(
        run=str(run_dir),
        sparsity=config.sparsity,
        num_edges=config.num_edges,
        cleanup=config.cleanup,
    )
    if config.launcher.shard:
        processes.on_rank_zero(lambda: export(size, model=model))
    else:
        export(size, model=model)
    evaluate(
        EvaluateConfig(
            circuit=str(run_dir),
            split=first_split(data_file(config.task, run_dir), Split.validation),
            batch_size=evaluation_batch_size(config.trainer),
        ),
        model=model,
        writes=processes.is_rank_zero,
    )


def _plan_memory(
    config: PruneConfig, shape: CircuitModel, pairs: PairDataset, processes: World
) -> None:
    """Say how much memory a process will need, before the weights are loaded.

    Raises:
        ConfigError: there is less.
    """
    from edgeprune.scale.memory import in_gb, plan_memory

    sharded, trainer = config.launcher.shard, config.trainer
    batch_size = min(trainer.batch_size, len(pairs))
    of_process = math.ceil(batch_size / processes.count)
    at_a_time = min(of_process, trainer.micro_batch_size or of_process)
    if sharded and trainer.micro_batch_size and batch_size % (processes.count * at_a_time):
        raise ConfigError(
            f"the {batch_size} pairs of a step cannot be run by {processes.count} processes in "
            f"equally many parts of {at_a_time}, which launcher.shard=true needs, since all gather "
            "the weights together; choose trainer.batch_size and .micro_batch_size that divide"
        )
    plan = plan_memory(
        shape,
        pairs,
        at_a_time,
        recompute=trainer.recompute,
        shares=processes.count if sharded else 1,
        offload=config.launcher.offload,
        bits=config.model.bits,
        corrupted_kept=config.ablation.kind is AblationKind.interchange,
    )
    free = processes.free_memory()
    say(f"memory for each process: about {plan}; {in_gb(free)} are free")
    if processes.any(plan.total > free):
        raise ConfigError(
            f"{config.model.name} needs about {plan}, but less are free for a process "
            f"({in_gb(free)} for this one). {LESS_MEMORY}"
        )
