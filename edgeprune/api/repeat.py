"""Learning again as a run did, from other prompts or with another seed, to see how stable it is."""

import json
import logging
import random
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.evaluate import Case
from edgeprune.api.prune import prune
from edgeprune.api.shared import ablation_of, own_data
from edgeprune.config import PruneConfig, to_dict
from edgeprune.errors import ConfigError
from edgeprune.prompts import Pair, read_records
from edgeprune.runs import layout
from edgeprune.runs.data import load_pairs
from edgeprune.runs.run import Run
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores

log = logging.getLogger("edgeprune")

TRAINERS = {"every_size": "every_size", "lagrangian": "paper", "priced": "tracr"}
"""Of each method, the settings that its runs start from."""


class Repeated(NamedTuple):
    """Scores that were learned again.

    Attributes:
        what: what differed, such as "bootstrap samples".
        unseen: of each, those of the prompts to be measured whose templates it did not learn from;
            None if it learned from all templates.
    """

    scores: list[EdgeScores]
    what: str
    unseen: list[Set[Pair]] | None


def repeat(
    run: Run, case: Case, kind: str, number: int, pairs: Sequence[Pair], world: World
) -> Repeated:
    """Learn again as the run did; what was learned earlier is read from the run.

    The processes share the repetitions; rank 0 waits for the others, and it alone has all scores.

    Args:
        kind: what differs: "bootstrap", "seeds" or "templates".
        pairs: the prompts to be measured.

    Raises ConfigError for a run that did not learn, or that has prompts without templates.
    """
    if not isinstance(run.config, PruneConfig):
        raise ConfigError(f"repeat= learns again, so it needs a run of prune, not {run.path}")
    path = own_data(run.data_path, run.digests["data"])
    train = list(load_pairs(path, run.config.task, case.model, "train"))
    paths = [run.path / layout.REPEATS / f"{kind}-{index}.safetensors" for index in range(number)]
    seeds, samples, unseen = [run.config.seed] * number, [train] * number, None
    if kind == "seeds":
        seeds = [run.config.seed + index + 1 for index in range(number)]
    elif kind == "bootstrap":
        drawn = (random.Random(f"bootstrap/{index}") for index in range(number))
        samples = [rng.choices(train, k=len(train)) for rng in drawn]
    else:
        known, measured = _templates(path, train), _templates(path, pairs)
        halves = _halves(sorted({*known}), number)
        samples = [[p for p, t in zip(train, known, strict=True) if t in half] for half in halves]
        unseen = [{p for p, t in zip(pairs, measured, strict=True) if t not in half}
                  for half in halves]  # fmt: skip
    mine = [index for index in range(world.rank, number, world.count) if not paths[index].exists()]
    for count, index in enumerate(mine, 1):
        start = time.perf_counter()
        _learn(run.config, case, samples[index], seeds[index], world).save(paths[index])
        seconds = (time.perf_counter() - start) * (len(mine) - count)
        log.info(f"{kind} {index + 1}/{number}: {paths[index]}; about {seconds:.0f} s left")
    world.any(False)  # waits for the others
    if run.config.start:
        log.warning("all repetitions begin with the scores of start=, which makes them more alike")
    what = {"bootstrap": "bootstrap samples", "templates": "halves of the templates"}
    found = [EdgeScores.load(path) for path in paths] if world.is_rank_zero else []
    return Repeated(found, what.get(kind, kind), unseen)


def _templates(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """The template of each pair of a file, as text."""
    known = {record.get("clean"): record.get("template") for record in read_records(path)}
    found = [known.get(pair.text) for pair in pairs]
    if None in found or len({*map(json.dumps, found)}) < 2:
        raise ConfigError(
            f"repeat=templates:N needs prompts of two or more templates, but {path} has none or "
            'one; give each line a field such as "template": 3'
        )
    return [json.dumps(template) for template in found]


def _halves(templates: Sequence[str], number: int) -> list[Set[str]]:
    """Random halves; two in a row are the two halves of one division."""
    found = []
    for index in range(number):
        order = random.Random(f"templates/{index // 2}").sample(templates, len(templates))
        middle = len(order) // 2
        found.append({*(order[middle:] if index % 2 else order[:middle])})
    return found


def _learn(
    settings: PruneConfig, case: Case, pairs: Sequence[Pair], seed: int, world: World
) -> EdgeScores:
    """Scores learned with a run's settings from other prompts or with another seed.

    The circuits that `prune` measures meanwhile are not used, so they are measured on few prompts.
    """
    num_edges = settings.num_edges
    if (settings.sparsity, num_edges) == (None, None):
        num_edges = len(case.file.circuit)
    pruned = prune(
        case.model, pairs, pairs[:2], sparsity=settings.sparsity, num_edges=num_edges, seed=seed,
        ablation=ablation_of(case.model, settings.ablation, pairs, settings.evaluation_batch_size),
        start=Run.open(settings.start).scores() if settings.start else None,
        trainer=TRAINERS[settings.trainer.method], progress=world.is_rank_zero,
        **to_dict(settings.trainer),
    )  # fmt: skip
    return pruned.scores
