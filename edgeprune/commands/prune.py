"""`edgeprune prune`."""

from __future__ import annotations

from pathlib import Path

from edgeprune.commands.evaluate import evaluate
from edgeprune.commands.export import export
from edgeprune.commands.shared import data_file, first_split, load_model, load_pairs, say
from edgeprune.config import (
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    Split,
    check_model,
    check_prune,
    target_sparsity,
    to_dict,
)


def prune(config: PruneConfig) -> None:
    """Learn the gates of a model's edges on a task; leaves a run directory."""
    check_prune(config)
    check_model(config.model)
    from edgeprune.ablation import Ablation
    from edgeprune.training import run
    from edgeprune.training.progress import training_progress
    from edgeprune.training.tracker import Tracker
    from edgeprune.training.trainer import Trainer

    run_dir = Path(config.run_dir)
    run.claim(run_dir, config)
    model = load_model(config.model)
    data_path = data_file(config.task, model.tokenizer, run_dir)
    pairs = load_pairs(data_path, config.task, model, "train")
    run.write_manifest(run_dir, model, data_path)
    trainer = Trainer(
        model,
        pairs,
        config.trainer,
        target_sparsity=target_sparsity(config, model.graph.num_edges),
        seed=config.seed,
        ablation=Ablation(model, config.ablation, pairs),
    )
    say(
        f"pruning {model.name} ({model.graph.num_edges:,} edges) on {config.task.name}: "
        f"{len(pairs):,} pairs, {config.trainer.steps:,} steps, in {run_dir}"
    )
    with (
        Tracker(config.tracker, run_dir, to_dict(config)) as track,
        training_progress(config.trainer.steps) as show,
    ):
        run.train(trainer, run_dir, lambda metrics: (show(metrics), track(metrics)), say)
    export(
        ExportConfig(
            run=str(run_dir),
            sparsity=config.sparsity,
            num_edges=config.num_edges,
            cleanup=config.cleanup,
        ),
        model=model,
    )
    evaluate(
        EvaluateConfig(circuit=str(run_dir), split=first_split(data_path, Split.validation)),
        model=model,
    )
