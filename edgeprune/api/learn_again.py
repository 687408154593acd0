"""Learning again as a run did, from other prompts or with another seed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune.api.prune import learn
from edgeprune.api.shared import ablation_of, own_data
from edgeprune.config import PruneConfig
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.prompts import Pair
from edgeprune.runs import layout
from edgeprune.runs.data import load_pairs
from edgeprune.runs.run import Run
from edgeprune.scores import EdgeScores


def check_learned(run: Run | None, asks: str, source: object) -> None:
    """Raise ConfigError unless it is a run of `prune`; `asks` is the setting that learns again."""
    if run is None:
        raise ConfigError(f"{asks} learns again as a run did, but {source} is in no run")
    if not isinstance(run.config, PruneConfig):
        raise ConfigError(f"{asks} learns again, so it needs a run of prune, not {run.path}")


def pairs_of_run(run: Run, model: CircuitModel) -> list[Pair]:
    """The prompts from which the run learned.

    Raises ConfigError if they have changed, or the model is not the run's.
    """
    if model.fingerprint() != run.digests["model"]:
        raise ConfigError(
            f"{run.path} learned with another model than {model.name}, or with other weights; give "
            "the run's own"
        )
    path = own_data(run.data_path, run.digests["data"])
    return list(load_pairs(path, run.config.task, model, "train"))


def learn_again(
    run: Run,
    model: CircuitModel,
    name: str,
    pairs: Sequence[Pair],
    seed: int,
    *,
    progress: bool = True,
) -> EdgeScores:
    """Scores learned with the run's settings, or read if some of this name were learned before."""
    path = _path(run, name)
    if not path.exists():
        config = replace(run.config, seed=seed)
        ablation = ablation_of(model, config.ablation, pairs, config.evaluation_batch_size)
        learn(model, pairs, config, ablation, progress=progress).scores.save(path)
    return learned(run, name)


def learned(run: Run, name: str) -> EdgeScores:
    """Scores that `learn_again` has saved."""
    return EdgeScores.load(_path(run, name))


def _path(run: Run, name: str) -> Path:
    return run.path / layout.REPEATS / f"{name}.safetensors"
