"""Pruning from Python, without files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.config import (
    PruneConfig,
    TrainerConfig,
    asked_sparsity,
    check_prune,
    evaluation_batch_size,
    from_keywords,
    target_sparsity,
)
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.cleanup import clean_up
from edgeprune.evaluation.export import export_circuit
from edgeprune.methods.masks import CircuitMasks
from edgeprune.methods.objective import unfinished
from edgeprune.models import CircuitModel
from edgeprune.prompts import Pair
from edgeprune.training.progress import training_progress
from edgeprune.training.trainer import StepMetrics, Trainer


@dataclass(frozen=True)
class Pruned:
    """What pruning found.

    Attributes:
        circuit: of the size asked for, cleaned up if that was asked for.
        masks: the learned log alphas; `export_circuit` makes circuits of other sizes of them.
        history: one entry a step.
        ablation: what closed edges carried, for `evaluate` and `clean_up`.
    """

    circuit: Circuit
    masks: CircuitMasks = field(repr=False)
    history: list[StepMetrics] = field(repr=False)
    ablation: Ablation = field(repr=False)


def prune(
    model: CircuitModel,
    pairs: Sequence[Pair],
    *,
    sparsity: float | None = None,
    num_edges: int | None = None,
    cleanup: float | None = None,
    seed: int = 0,
    ablation: Ablation | str = "interchange",
    progress: bool = True,
    **settings: Any,
) -> Pruned:
    """Find the circuit with which a model does a task.

    Args:
        model: from `load_model`.
        pairs: training prompts, from `load_dataset`.
        sparsity: the circuit keeps exactly this fraction less of the edges.
        num_edges: or exactly so many.
        cleanup: then remove what the circuit can do without, see `clean_up`; its tolerance.
        seed: of the start, the noise and the order of the data.
        ablation: what closed edges carry: `interchange`, `zero`, `mean` (over `pairs`, one a
            position), or an `Ablation`.
        progress: whether to show a progress bar.
        settings: fields of `TrainerConfig`, such as `steps` and `batch_size`.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
        ValueError: there are no prompts, or one is too long for the model.
        TrainingError: the loss became NaN.
    """
    config = from_keywords(TrainerConfig, settings)
    given = {"sparsity": sparsity, "num_edges": num_edges, "cleanup": cleanup, "seed": seed}
    whole = from_keywords(PruneConfig, {"trainer": config, **given})
    check_prune(whole)
    CircuitModel.check(model)
    model.check_prompts(pairs)
    batch_size = evaluation_batch_size(config)  # of passes without gradients
    closed = Ablation.of(model, ablation, pairs, batch_size)
    trainer = Trainer(
        model,
        pairs,
        config,
        target_sparsity=target_sparsity(whole, model.graph.num_edges),
        seed=whole.seed,
        ablation=closed,
    )
    history = []
    with training_progress(config.steps, enabled=progress) as show:
        for _ in range(config.steps):
            history.append(trainer.train_step())
            show(history[-1])
    masks = trainer.masks
    del trainer  # and what it keeps
    model.release()
    export = export_circuit(masks, sparsity=whole.sparsity, num_edges=whole.num_edges)
    circuit = export.circuit
    asked = asked_sparsity(whole, model.graph.num_edges)
    message = None if asked is None else unfinished(history[-1].sparsity, asked)
    if message:
        warnings.warn(message, stacklevel=2)
    if whole.cleanup is not None:
        circuit = clean_up(
            model,
            circuit,
            pairs,
            tolerance=whole.cleanup,
            ranking=export.ranking,
            ablation=closed,
            batch_size=batch_size,
        ).circuit
    return Pruned(circuit, masks, history, closed)
