"""Ablating nodes that settings name: by kind of head, by name, or as those of a circuit."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.heads import find_marks
from edgeprune.api.shared import (
    check_output,
    load_named_model,
    load_prompts,
    named_by,
)
from edgeprune.config import AblateConfig, TaskConfig
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.ablate import NodeAblation, ablate
from edgeprune.evaluation.heads import HeadScores, Score, score_heads
from edgeprune.files import write_json
from edgeprune.prompts import PairDataset, draw_pairs
from edgeprune.prompts.schema import read_options, split_prompt
from edgeprune.runs import layout
from edgeprune.runs.source import Source, find
from edgeprune.training.progress import progress

log = logging.getLogger("edgeprune")

SCORING_PROMPTS = 50
"""Number of random prompts, and of the task's, on which heads are scored."""


class AblatedNodes(NamedTuple):
    """The effect of ablating nodes, and a title."""

    result: NodeAblation
    title: str


def ablate_nodes(config: AblateConfig) -> AblatedNodes:
    """Ablate the nodes that settings name, and write what was measured."""
    source, model_config, task = named_by(config)
    if config.output:
        reads = [source and source.path, model_config.path, task.path]
        check_output(Path(config.output), [*reads, config.scores, config.circuit])
    model = load_named_model(source, config.model)
    data, train, _ = load_prompts(source, config.task, model, config.split, with_training=True)
    pairs = draw_pairs(data, config.prompts, config.seed)
    score = None
    if config.heads is not None:
        scores = _known_scores(model, source, config.scores) or _score(model, task, train, config)
        score = scores.score(config.heads.partition(":")[0])
    nodes = _nodes(model, config, score)
    ablation = config.ablation
    with progress(len(pairs), "ablating: prompt") as show:
        result = ablate(
            model, nodes, pairs, kind=ablation.kind, per_position=ablation.per_position,
            scores=None if score is None else score.by_head(), num_random=config.random_sets,
            generate=config.generate, answers=_answers(data), reference_set=train,
            seed=config.seed, batch_size=config.batch_size, listener=show,
        )  # fmt: skip
    if config.output:
        record = {
            "model": model.name, "model_sha256": model.fingerprint(),
            "data": task.title, "split": config.split,
            "heads": config.heads, "circuit": config.circuit, "complement": config.complement,
            "per_position": ablation.per_position, **result.to_dict(),
        }  # fmt: skip
        write_json(Path(config.output), record)
    title = f"{model_config.title}, {task.title}, {len(pairs):,} prompts, {ablation.kind} ablation"
    return AblatedNodes(result, title)


def _known_scores(
    model: CircuitModel, source: Source | None, given: str | None
) -> HeadScores | None:
    """The scores in the given file, or those of the run; None if the run has none of this model.

    Raises ConfigError if the given file is damaged, or is of another model.
    """
    own = source.path.with_name(layout.HEADS) if source is not None else None
    file = Path(given) if given else own
    if file is None or not (given or file.exists()):
        return None
    try:
        known = json.loads(file.read_bytes())
        is_of_model = known["model_sha256"] == model.fingerprint()
        scores = HeadScores.from_dict(known)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read as a heads.json ({type(error).__name__}: {error}); write it "
            "again with edgeprune heads"
        ) from None
    if given and not is_of_model:
        raise ConfigError(f"{file} has the heads of another model than {model.name}")
    return scores if is_of_model else None


def _score(
    model: CircuitModel, task: TaskConfig, train: PairDataset, config: AblateConfig
) -> HeadScores:
    """Score the heads on random tokens and on some training prompts."""
    few = draw_pairs(train, SCORING_PROMPTS, config.seed)
    marks = find_marks(task, model, train, few)
    return score_heads(model, few, marks=marks, num_random=SCORING_PROMPTS, seed=config.seed)


def _nodes(model: CircuitModel, config: AblateConfig, score: Score | None) -> list[str]:
    """The nodes to ablate, in the order in which they write."""
    every = [node for node in model.graph.writers if node[0] in "am"]
    if score is not None:
        count = int(config.heads.partition(":")[2])
        if count > len(score.ranked()):
            raise ConfigError(f"heads={config.heads}: the model has {len(score.ranked())} heads")
        named = score.ranked()[:count]
        missed = [head for head in named if head not in score.heads()]
        if missed:
            log.warning(
                f"{len(missed)} of the {count} heads are not above the threshold of "
                f"{score.name} heads, the first of them {missed[0]}"
            )
    elif config.circuit is not None:
        circuit = find(config.circuit).read(model.graph).circuit.without_dangling()
        named = [node for node in circuit.nodes if node in every]
    else:
        named = config.nodes
        unknown = [node for node in named if node not in every]
        if unknown:
            raise ConfigError(
                f"{model.name} has no node {unknown[0]!r}; expected heads and MLPs, such as "
                f"{every[0]} and m0"
            )
    return [node for node in every if (node in named) != config.complement]


def _answers(data: PairDataset) -> dict[str, list[str]]:
    """The right answers as text, by the text of the clean prompt."""
    answers = {}
    for text, record in data.records.items():
        if "clean_ids" not in record:
            prompt, prediction = split_prompt(record, "clean")
            answers[text] = [prediction, *read_options(record, "answers", prompt, prediction)]
    return answers
