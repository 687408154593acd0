"""Ablating nodes that settings name: by kind of head, by name, or as those of a circuit."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.heads import marks_of, prompts_file
from edgeprune.api.shared import check_output, load_model_of
from edgeprune.config import AblateConfig
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.ablate import NodeAblation, ablate
from edgeprune.evaluation.heads import HeadScores, Score, score_heads
from edgeprune.files import write_json
from edgeprune.prompts import Pair, read_records
from edgeprune.prompts.schema import read_options, split_prompt
from edgeprune.runs import layout
from edgeprune.runs.data import first_split, load_pairs
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
    source = find(config.run) if config.run else None
    model_config = config.model if source is None else source.model(config.model)
    task = config.task if source is None else source.task(config.task)
    if config.output:
        check_output(Path(config.output), [model_config.path, task.path])
    model = load_model_of(model_config)
    score = None
    with prompts_file(source, config.task, model) as path:
        pairs = load_pairs(path, task, model, config.split)[: config.prompts]
        train = load_pairs(path, task, model, first_split(path, "train"))
        answers = _answers(path)
        if config.heads is not None:
            kind = config.heads.partition(":")[0]
            marks = marks_of(path, task, model, train[:SCORING_PROMPTS])
            score = _score(model, source, kind, train[:SCORING_PROMPTS], marks)
    nodes = _nodes(model, config, score)
    ablation = config.ablation
    with progress(len(pairs), "ablating: prompt") as show:
        result = ablate(
            model, nodes, pairs, kind=ablation.kind, per_position=ablation.per_position,
            scores=None if score is None else score.by_head(), num_random=config.random_sets,
            generate=config.generate, answers=answers, reference_set=train, seed=config.seed,
            batch_size=config.batch_size, listener=lambda done: show(done, ""),
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


def _score(
    model: CircuitModel, source: Source | None, kind: str, pairs: Sequence[Pair],
    marks: dict[Pair, dict[str, int]],
) -> Score:  # fmt: skip
    """Scores of a kind of head: those that `edgeprune heads` wrote into the run, or new ones."""
    file = source.path.with_name(layout.HEADS) if source is not None else None
    if file is not None and file.exists():
        known = json.loads(file.read_bytes())
        if known["model_sha256"] == model.fingerprint():
            return HeadScores.from_dict(known).score(kind)
    scores = score_heads(model, pairs, marks=marks, num_random=SCORING_PROMPTS)
    return scores.score(kind)


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


def _answers(path: Path) -> dict[str, list[str]]:
    """The right answers as text, by the text of the clean prompt."""
    answers = {}
    for record in read_records(path):
        if "clean" in record and "clean_ids" not in record:
            prompt, prediction = split_prompt(record, "clean")
            others = read_options(record, "answers", prompt, prediction)
            answers[record["clean"]] = [prediction, *others]
    return answers
