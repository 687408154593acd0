"""`edgeprune evaluate`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table
from rich.text import Text

from edgeprune.commands.shared import (
    OUT,
    check_own_data,
    data_file,
    find_circuit,
    first_split,
    load_model,
    load_pairs,
    read_circuit,
    run_settings,
    say,
    show,
)
from edgeprune.config import (
    AblationConfig,
    AblationKind,
    ConfigError,
    EvaluateConfig,
    Split,
    check_evaluate,
    evaluation_batch_size,
    model_title,
    task_title,
    to_dict,
)
from edgeprune.files import file_digest, write_text

NOT_NAMED = ("name", "path", "device", "trust_remote_code", *(split.name for split in Split))
"""Settings of a model or task that do not tell evaluations apart; the others and digests do."""


def evaluate(config: EvaluateConfig, model: Any = None, writes: bool = True) -> None:
    """Measure a circuit beside the full model and the fully corrupted one.

    Args:
        config: what to measure.
        model: if it is loaded already.
        writes: whether the result is written; under several processes one does.
    """
    from edgeprune.ablation import Ablation
    from edgeprune.analysis.evaluate import evaluate as measure
    from edgeprune.training.run import EDGES, read_digests

    check_evaluate(config)
    edges_path, run_dir = find_circuit(config.circuit)
    of_run = run_settings(run_dir)
    task = config.task or of_run.get("task")
    is_own_task = run_dir is not None and task == of_run["task"]
    if (config.model or of_run.get("model")) is None or task is None:
        raise ConfigError(
            f"{edges_path} is of no run, or of several that differ in model or task, so give both: "
            "model=embedded task=ioi, or model.path=... with model=custom, task.path=... with "
            "task=custom"
        )
    own_digests = {} if run_dir is None else read_digests(run_dir)
    model_config = config.model or of_run["model"]
    if model is None:
        model = load_model(model_config)
        if config.model is None and model.fingerprint() != own_digests["model"]:
            say(
                f"{model.name} is not the model of the run in {run_dir}, whose weights, "
                "configuration or tokenizer were others"
            )
    circuit = read_circuit(edges_path, model.graph)
    ablation_config = config.ablation or of_run.get("ablation") or AblationConfig()
    split = config.split.name
    with TemporaryDirectory() as scratch:  # for generated prompts that are not the run's
        data_path = data_file(task, model.tokenizer, run_dir if is_own_task else Path(scratch))
        pairs = load_pairs(data_path, task, model, split)
        data_digest = file_digest(data_path)
        if is_own_task and config.task is None:
            check_own_data(run_dir, data_digest, data_path)
        is_own_file = data_digest == own_digests.get("data")
        if is_own_file and not pairs.has_splits:
            say(
                f"{data_path} has lines without a split, so those measured are training prompts, "
                'not held out; lines of which each says "split": "train", "validation" or "test" '
                "are apart"
            )
        reference_set = pairs
        if ablation_config.kind is AblationKind.mean:
            reference_split = first_split(data_path, Split.train)
            reference_set = load_pairs(data_path, task, model, reference_split.name)
    batch_size = config.batch_size or evaluation_batch_size(of_run.get("trainer"))
    with OUT.status(f"evaluating on {len(pairs):,} pairs"):
        result = measure(
            model,
            circuit,
            pairs,
            ablation=Ablation(model, ablation_config, reference_set, batch_size),
            batch_size=batch_size,
            random_circuits=config.random_circuits,
        )
    _print_evaluation(result, f"{model.name}, {pairs.name}, {ablation_config.kind.name} ablation")
    show(_in_words(result, circuit))
    if not writes:
        return
    words = [] if edges_path.name == EDGES else [edges_path.name.replace(".", "-")]
    model_digest = model.fingerprint()
    is_own_model = model_digest == own_digests.get("model")
    words += _if_foreign(of_run.get("model"), model_config, is_own_model, model_title, model_digest)
    words += _if_foreign(of_run.get("task"), task, is_own_file, task_title, data_digest)
    ablation_name = _ablation_name(ablation_config)
    if not of_run or ablation_name != _ablation_name(of_run["ablation"]):
        words.append(ablation_name)
    name = "-".join(["evaluation", *words, split])
    output = Path(config.output) if config.output else edges_path.with_name(f"{name}.json")
    settings = {
        "circuit_file": str(edges_path),
        "edges_sha256": circuit.digest(),
        "model": model.name,
        "model_sha256": model_digest,
        "data": str(data_path) if is_own_file or task.path is not None else pairs.name,
        "data_sha256": data_digest,
        "split": split,
        "training_prompts": is_own_file and (split == "train" or not pairs.has_splits),
        "ablation": to_dict(ablation_config),
    }
    _write(output, {**settings, **result.to_dict()})
    show(f"-> {output}")


def _if_foreign(
    own: Any, config: Any, has_own_digest: bool, title: Callable[..., str], digest: str
) -> list[str]:
    """Words for the file's name where a model or prompts are not the run's, wherever they lie.

    Args:
        own, config: ModelConfig or TaskConfig, the run's (None: there is none) and this one.
        has_own_digest: whether weights or prompts are the run's.
        title, digest: what they are called.
    """
    usual = own or type(config)()
    names = [f.name for f in fields(config) if f.name not in NOT_NAMED]
    changed = [
        f"{n}-{getattr(config, n)}" for n in names if getattr(config, n) != getattr(usual, n)
    ]
    if own is not None and not changed and has_own_digest:
        return []
    return [title(config.name, config.path), *changed, digest[:8]]


def _ablation_name(ablation: AblationConfig) -> str:
    is_over_positions = ablation.kind is AblationKind.mean and not ablation.per_position
    return "mean-over-positions" if is_over_positions else ablation.kind.name


def _write(output: Path, content: dict[str, Any]) -> None:
    try:
        write_text(output, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        hint = "`edgeprune evaluate` writes elsewhere with output=FILE"
        raise OSError(error.errno, f"{error.strerror}; {hint}", str(output)) from None


def _print_evaluation(result: Any, title: str) -> None:
    from edgeprune.analysis.evaluate import OF_DISTRACTORS, Scores

    columns = {
        f"circuit, {result.num_edges:,} edges": result.circuit,
        "full model": result.full,
        "every edge closed": result.corrupted,
    }
    if result.random is not None:
        columns["random circuits"] = result.random
    table = Table(title=Text(f"{title}, {result.num_examples:,} prompts"), title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for field in fields(Scores):
        values = [getattr(scores, field.name) for scores in columns.values()]
        if all(value != value for value in values):  # NaN: the data has no distractors
            continue
        label = field.name.replace("_", " ")
        if field.name in OF_DISTRACTORS and result.num_with_distractors < result.num_examples:
            label += f" ({result.num_with_distractors:,} prompts)"
        table.add_row(label, *(f"{value:.3f}" for value in values))
    OUT.print(table)
    worst = result.worst
    off = f"error {worst.error:.2g}" if worst.kl != worst.kl else f"KL {worst.kl:.2f}"
    show(
        f"least faithful: {off} on {worst.text!r}: full model "
        f"{worst.full_prediction!r}, circuit {worst.circuit_prediction!r}"
    )


def _in_words(result: Any, circuit: Any) -> str:
    """What a circuit is made of and how well it does, in a few sentences."""
    graph, connected = circuit.graph, circuit.without_dangling()
    text = (
        f"in words: {len(circuit):,} of {graph.num_edges:,} edges give the full model's answer on "
        f"{result.circuit.exact_match:.1%} of the prompts"
    )
    if not len(connected):
        return f"{text}; none of them lies on a path from the input to the output"
    edges_at = Counter(writer for writer, _ in connected.edges)
    for _, reader in connected.edges:
        edges_at.update(connected.nodes_fed_by(reader))
    heads = [node for node in connected.nodes if node.startswith("a")]
    mlps = [node for node in connected.nodes if node.startswith("m")]
    busiest = ", ".join(f"{node} ({count})" for node, count in edges_at.most_common(4))
    last = [writer for writer, reader in connected.edges if reader == "resid_post"]
    shown = ", ".join(last[:8]) + (f" and {len(last) - 8} more" if len(last) > 8 else "")
    return (
        f"{text}. {len(connected):,} of them join the input to the output, through "
        f"{len(heads)} of {graph.num_layers * graph.num_heads} heads and {len(mlps)} of "
        f"{graph.num_layers} MLPs. The output reads from {shown}; most edges meet at {busiest}."
    )
