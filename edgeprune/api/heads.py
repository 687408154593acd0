"""What the heads of a model attend to, on random tokens and on a task's prompts."""

import csv
import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.api.shared import (
    check_output,
    load_named_model,
    load_prompts,
    named_by,
    read,
)
from edgeprune.circuit import Circuit
from edgeprune.config import HeadsConfig, TaskConfig
from edgeprune.drawing import draw_heads
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.evaluation.heads import HeadScores, score_heads
from edgeprune.files import write_json, write_text
from edgeprune.prompts import Pair, PairDataset, draw_pairs, marked_tokens
from edgeprune.prompts.tasks import MARKS
from edgeprune.runs import layout

log = logging.getLogger("edgeprune")


class FoundHeads(NamedTuple):
    """Scores of heads, a circuit to compare them with if one was named, and the files written."""

    scores: HeadScores
    circuit: Circuit | None
    title: str
    paths: list[Path]


def find_heads(config: HeadsConfig) -> FoundHeads:
    """Score the heads of a model that settings or a run name, and write what was found."""
    source, model_config, task = named_by(config)
    if config.output:
        check_output(Path(config.output), is_file=False)
    model = load_named_model(source, config.model)
    pairs, marks, digest = [], {}, ""
    if task is not None:
        data, _, digest = load_prompts(source, config.task, model, config.split)
        pairs = draw_pairs(data, config.prompts, config.seed)
        marks = find_marks(task, model, data, pairs)
    scores = score_heads(
        model, pairs, task=task.title if task else "", marks=marks, length=config.length,
        num_random=config.random_prompts, batch_size=config.batch_size, seed=config.seed,
    )  # fmt: skip
    circuit = None
    if source is not None and model.fingerprint() == source.digest("model"):
        circuit = read(source, model.graph).circuit
    is_of_run = source is not None and source.run is not None and source.is_of(model, digest)
    folder = Path(config.output or (source.path.parent if is_of_run else "heads"))
    title = model_config.title if task is None else f"{model_config.title}, {task.title}"
    record = {"model": model.name, "model_sha256": model.fingerprint(), **scores.to_dict()}
    return FoundHeads(scores, circuit, title, _write(scores, record, folder, title))


def find_marks(
    task: TaskConfig, model: CircuitModel, data: PairDataset, pairs: Sequence[Pair]
) -> dict[Pair, dict[str, int]]:
    """Where the marked words are in some of a task's prompts, if the task marks any."""
    found = {}
    if task.name not in MARKS:
        return found
    for pair in pairs:
        with suppress(KeyError, ValueError):  # the user's own prompts need not be like the task's
            record = data.records[pair.text]
            ends = MARKS[task.name](record)
            found[pair] = marked_tokens(model.tokenizer, record, pair, ends)
    return found


def _write(scores: HeadScores, record: dict[str, Any], folder: Path, title: str) -> list[Path]:
    """Write JSON, a table and a plot; the JSON last, because other commands look for it."""
    names = (layout.HEADS_TABLE, layout.HEADS_PLOT, layout.HEADS)
    table, plot, file = paths = [folder / name for name in names]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(scores.rows())
    write_text(table, text.getvalue())
    panels = [
        (f"{score.name}, {score.prompts}", score.value.tolist(), [*score.heads()])
        for score in scores.scores
    ]
    draw_heads(panels, plot, title=title)
    write_json(file, record)
    return paths
