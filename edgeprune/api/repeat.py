"""Learning again as a run did, to see how stable what it found is."""

import json
import logging
import random
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.learn_again import learn_again, learned, pairs_of_run
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.prompts import Pair, read_records
from edgeprune.runs.run import Run
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import duration

log = logging.getLogger("edgeprune")


class Repeated(NamedTuple):
    """Scores that were learned again.

    Attributes:
        what: what differed, such as "bootstrap samples".
        halves: the templates from which each learned; None if all learned from all templates.
        templates: the template of each prompt to be measured; None if all learned from all.
    """

    scores: list[EdgeScores]
    what: str
    halves: list[Set[str]] | None
    templates: dict[Pair, str] | None


def repeat(
    run: Run, model: CircuitModel, kind: str, number: int, pairs: Sequence[Pair], world: World
) -> Repeated:
    """Learn again as the run did; what was learned earlier is read from the run.

    The processes share the repetitions; rank 0 waits for the others, and it alone has all scores.

    Args:
        kind: what differs: "bootstrap", "seeds" or "templates".
        pairs: the prompts to be measured.

    Raises ConfigError for prompts without templates, and as `pairs_of_run` does.
    """
    path, train = run.data_path, pairs_of_run(run, model)
    names = [f"{kind}-{index}" for index in range(number)]
    seeds, samples = [run.config.seed] * number, [train] * number
    halves = templates = None
    if kind == "seeds":
        seeds = [run.config.seed + index + 1 for index in range(number)]
    elif kind == "bootstrap":
        drawn = (random.Random(f"bootstrap/{index}") for index in range(number))
        samples = [rng.choices(train, k=len(train)) for rng in drawn]
    else:
        known, templates = _templates(path, train), _templates(path, pairs)
        halves = _halves(sorted({*known.values()}), number)
        samples = [[pair for pair in train if known[pair] in half] for half in halves]
    mine = range(world.rank, number, world.count)
    for count, index in enumerate(mine, 1):
        start = time.perf_counter()
        learn_again(
            run, model, names[index], samples[index], seeds[index], progress=world.is_rank_zero
        )
        seconds = (time.perf_counter() - start) * (len(mine) - count)
        log.info(f"{kind} {index + 1}/{number}: about {duration(seconds)} left")
    world.any(False)  # waits for the others
    if run.config.start:
        log.warning("all repetitions begin with the scores of start=, which makes them more alike")
    what = {"bootstrap": "bootstrap samples", "templates": "halves of the templates"}
    found = [learned(run, name) for name in names] if world.is_rank_zero else []
    return Repeated(found, what.get(kind, kind), halves, templates)


def _templates(path: Path, pairs: Sequence[Pair]) -> dict[Pair, str]:
    """The template of each pair of a file, as text."""
    known = {record.get("clean"): record.get("template") for record in read_records(path)}
    found = {pair: json.dumps(known.get(pair.text)) for pair in pairs}
    if "null" in found.values() or len({*found.values()}) < 2:
        raise ConfigError(
            f"repeat=templates:N needs prompts of two or more templates, but {path} has none or "
            'one; give each line a field such as "template": 3'
        )
    return found


def _halves(templates: Sequence[str], number: int) -> list[Set[str]]:
    """Random halves; two in a row are the two halves of one division."""
    found = []
    for index in range(number):
        order = random.Random(f"templates/{index // 2}").sample(templates, len(templates))
        middle = len(order) // 2
        found.append({*(order[middle:] if index % 2 else order[:middle])})
    return found
