"""Attributing answers to tokens, of a model, a task and a circuit that settings name."""

from pathlib import Path
from typing import NamedTuple

from edgeprune.api.heads import find_marks
from edgeprune.api.shared import (
    ablation_of,
    check_output,
    load_in,
    load_prompts,
    named_by,
    read,
    warn_if_changed,
)
from edgeprune.config import AblationConfig, TokensConfig
from edgeprune.drawing.tokens import render_tokens
from edgeprune.evaluation.token_tables import in_words
from edgeprune.evaluation.tokens import TokenAttributions, attribute_tokens
from edgeprune.files import write_json, write_text
from edgeprune.formats.inseq import inseq_json
from edgeprune.prompts import draw_pairs
from edgeprune.runs import layout
from edgeprune.scale.world import World
from edgeprune.training.progress import progress


class AttributedTokens(NamedTuple):
    """Attributions, a title, and the files written."""

    result: TokenAttributions
    title: str
    paths: list[Path]


def find_tokens(config: TokensConfig) -> AttributedTokens | None:
    """Attribute answers to tokens, and write what was found.

    Under several processes all call this, with a sharded model; rank 0 writes and gets the result.
    """
    source, model_config, task = named_by(config)
    ablation = config.ablation or AblationConfig()
    if source is not None:
        ablation = source.ablation(config.ablation)
    config.launcher.check_shard(model_config)
    if config.output:
        check_output(Path(config.output), is_file=False)
    with World.join(model_config.device, config.launcher.timeout) as world:
        world.check_same("the settings", str(config))
        model = load_in(world, model_config, config.launcher)
        if world.is_rank_zero and config.model is None:  # shards have no fingerprint
            warn_if_changed(model, source.digest("model"))
        circuit = None if source is None else read(source, model.graph, ablation).circuit
        data, reference, digest = load_prompts(
            source, config.task, model, config.split, with_training=ablation.kind == "mean"
        )
        pairs = draw_pairs(data, config.prompts, config.seed)
        with progress(100, "attributing: percent", enabled=world.is_rank_zero) as show:
            result = attribute_tokens(
                model, pairs, circuit, target=config.target, steps=config.steps,
                marks=find_marks(task, model, data, pairs),
                ablation=ablation_of(model, ablation, reference, config.batch_size),
                batch_size=config.batch_size,
                listener=lambda done, total: show(100 * done // total),
            )  # fmt: skip
        if not world.is_rank_zero:
            return None
        is_own = (
            source is not None and source.run is not None and source.is_chosen
            and source.is_of(model, digest, ablation)
        )  # fmt: skip
        folder = Path(config.output or (source.path.parent if is_own else "tokens"))
        title = f"{model_config.title}, {task.title}, {len(pairs):,} {config.split} prompts"
        record = {
            "model": model.name, "model_sha256": model.fingerprint(), "data": task.title,
            "split": config.split, "edges_sha256": None if circuit is None else circuit.digest(),
            **result.to_dict(),
        }  # fmt: skip
        return AttributedTokens(result, title, _write(result, record, folder, title))


def _write(result: TokenAttributions, record: dict, folder: Path, title: str) -> list[Path]:
    """Write JSON, Inseq's JSON and HTML."""
    names = (layout.TOKENS, layout.TOKENS_INSEQ, layout.TOKENS_HTML)
    file, inseq, page = paths = [folder / name for name in names]
    write_text(page, render_tokens(record, title, (in_words(result),)))
    write_json(inseq, inseq_json(record, record["model"]))
    write_json(file, record)
    return paths
