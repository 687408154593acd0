"""`edgeprune evaluate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from edgeprune.commands.shared import (
    OUT,
    check_output,
    check_own_data,
    find_circuit,
    first_split,
    load_model,
    load_pairs,
    make_data,
    own_data,
    read_circuit,
    read_origin,
    run_settings,
    say,
    show,
)
from edgeprune.config import (
    AblationConfig,
    AblationKind,
    EvaluateConfig,
    ModelConfig,
    Split,
    TaskConfig,
    check_evaluate,
    evaluation_batch_size,
    model_title,
    task_title,
    to_dict,
)
from edgeprune.errors import ConfigError
from edgeprune.files import file_digest, write_json

if TYPE_CHECKING:
    from edgeprune.circuit import Circuit
    from edgeprune.evaluation.evaluate import Evaluation
    from edgeprune.models import CircuitModel
    from edgeprune.prompts import PairDataset

NOT_NAMED = ("name", "path", "device", "trust_remote_code", *(split.name for split in Split))
"""Settings of a model or task that do not tell evaluations apart; the others and digests do."""


@dataclass(frozen=True)
class _Subject:
    """What is measured, and of which run it is.

    Attributes:
        edges_path, run_dir: see `find_circuit`.
        of_run: see `run_settings`.
        own_digests: SHA-256 of the run's `model` and `data`; nothing without a run.
        model, task, ablation: those asked for, or the run's.
    """

    edges_path: Path
    run_dir: Path | None
    of_run: dict[str, Any]
    own_digests: dict[str, str]
    model: ModelConfig
    task: TaskConfig
    ablation: AblationConfig


@dataclass(frozen=True)
class _Prompts:
    """What a circuit is measured on.

    Attributes:
        pairs: of the split.
        reference_set: what means are taken over.
        path, digest: of the file, which may be gone, and its SHA-256.
        are_own: whether they are the run's own.
        is_training: whether it was trained on them.
    """

    pairs: PairDataset
    reference_set: PairDataset
    path: Path
    digest: str
    are_own: bool
    is_training: bool


def evaluate(
    config: EvaluateConfig, model: CircuitModel | None = None, writes: bool = True
) -> None:
    """Measure a circuit beside the full model and the fully corrupted one.

    Args:
        config: what to measure.
        model: if it is loaded already.
        writes: whether the result is written; under several processes one does.
    """
    check_evaluate(config)
    subject = _find(config)
    if config.output:
        reads = [subject.edges_path, subject.model.path, subject.task.path]
        check_output(Path(config.output), reads)
    if model is None:
        model = load_model(subject.model)
        if config.model is None and model.fingerprint() != subject.own_digests["model"]:
            say(
                f"{model.name} is not the model of the run in {subject.run_dir}, whose weights, "
                "configuration or tokenizer were others"
            )
    circuit = read_circuit(subject.edges_path, model.graph)
    prompts = _load_prompts(subject, model, config)
    result = _measure(subject, model, circuit, prompts, config)
    output = None
    try:  # before it is printed, which may fail; and printed though it cannot be written
        if writes:
            output = _write(subject, model, circuit, prompts, config, result)
    finally:
        what = f"{model.name}, {prompts.pairs.name}, {subject.ablation.kind.name} ablation"
        left_out = len(prompts.pairs.skipped)
        _print_evaluation(result, what, f" ({left_out:,} left out)" if left_out else "")
        show(_in_words(result, circuit))
    if output is not None:
        show(f"-> {output}")


def _write(
    subject: _Subject,
    model: CircuitModel,
    circuit: Circuit,
    prompts: _Prompts,
    config: EvaluateConfig,
    result: Evaluation,
) -> Path:
    """Write the result with what it is of, as JSON. Returns the file."""
    digest, split = model.fingerprint(), config.split.name
    name = "-".join(["evaluation", *_words(subject, prompts, digest), split])
    output = Path(config.output or subject.edges_path.with_name(f"{name}.json"))
    is_kept = prompts.are_own or subject.task.path is not None
    settings = {
        "circuit_file": str(subject.edges_path),
        "edges_sha256": circuit.digest(),
        "model": model.name,
        "model_sha256": digest,
        "data": str(prompts.path) if is_kept else prompts.pairs.name,
        "data_sha256": prompts.digest,
        "split": split,
        "training_prompts": prompts.is_training,
        "ablation": to_dict(subject.ablation),
    }
    try:
        write_json(output, {**settings, **result.to_dict()})
    except OSError as error:
        hint = "`edgeprune evaluate` writes elsewhere with output=FILE"
        raise OSError(error.errno, f"{error.strerror}; {hint}", str(output)) from None
    return output


def _find(config: EvaluateConfig) -> _Subject:
    """Raises ConfigError where neither the command nor a run says which model and task it is of."""
    from edgeprune.runs.run import read_digests

    edges_path, run_dir = find_circuit(config.circuit)
    of_run = run_settings(run_dir)
    model, task = config.model or of_run.get("model"), config.task or of_run.get("task")
    if model is None or task is None:
        origin = read_origin(edges_path).get("run")
        why = "is of no run, or of several that differ in model or task"
        if run_dir is None and isinstance(origin, str):
            why = f"is of the run {origin}, seen from its folder, which is no longer there"
        raise ConfigError(
            f"{edges_path} {why}, so give both: "
            "model=embedded task=ioi, or model.path=... with model=custom, task.path=... with "
            "task=custom"
        )
    own_digests = {} if run_dir is None else read_digests(run_dir)
    ablation = config.ablation or of_run.get("ablation") or AblationConfig()
    return _Subject(edges_path, run_dir, of_run, own_digests, model, task, ablation)


def _load_prompts(subject: _Subject, model: CircuitModel, config: EvaluateConfig) -> _Prompts:
    """Read the split, generating a task's prompts where they are not the run's.

    Raises:
        ConfigError: the run's own have changed since, or are gone.
    """
    task, run_dir, split = subject.task, subject.run_dir, config.split.name
    is_own_task = task == subject.of_run.get("task")
    with TemporaryDirectory() as scratch:  # for generated prompts that are not the run's
        if is_own_task:
            path = own_data(task, run_dir)
        else:
            path = make_data(task, model.tokenizer, Path(scratch))
        pairs = load_pairs(path, task, model, split)
        digest = file_digest(path)
        if config.task is None:
            check_own_data(run_dir, digest, path)
        are_own = digest == subject.own_digests.get("data")
        if are_own and not pairs.has_splits:
            say(
                f"{path} has lines without a split, so those measured are training prompts, "
                'not held out; lines of which each says "split": "train", "validation" or "test" '
                "are apart"
            )
        reference_set = pairs
        if subject.ablation.kind is AblationKind.mean:
            reference_split = first_split(path, Split.train)
            reference_set = load_pairs(path, task, model, reference_split.name)
    is_training = are_own and (split == "train" or not pairs.has_splits)
    return _Prompts(pairs, reference_set, path, digest, are_own, is_training)


def _measure(
    subject: _Subject,
    model: CircuitModel,
    circuit: Circuit,
    prompts: _Prompts,
    config: EvaluateConfig,
) -> Evaluation:
    from edgeprune.engine.ablation import Ablation
    from edgeprune.evaluation.evaluate import evaluate

    batch_size = config.batch_size or evaluation_batch_size(subject.of_run.get("trainer"))
    with OUT.status(f"evaluating on {len(prompts.pairs):,} pairs"):
        return evaluate(
            model,
            circuit,
            prompts.pairs,
            ablation=Ablation(model, subject.ablation, prompts.reference_set, batch_size),
            batch_size=batch_size,
            shuffled_circuits=config.shuffled_circuits,
        )


def _words(subject: _Subject, prompts: _Prompts, model_digest: str) -> list[str]:
    """Words for the file's name: what is not the run's own or, where there is no run, everything.

    Args:
        subject, prompts: what was measured.
        model_digest: SHA-256 of the model.
    """
    from edgeprune.runs.run import EDGES

    file, of_run = subject.edges_path.name, subject.of_run
    is_own_model = model_digest == subject.own_digests.get("model")
    ablation = _ablation_name(subject.ablation)
    is_own_ablation = bool(of_run) and ablation == _ablation_name(of_run["ablation"])
    return [
        *([] if file == EDGES else [file.replace(".", "-")]),
        *_if_foreign(of_run.get("model"), subject.model, is_own_model, model_title, model_digest),
        *_if_foreign(of_run.get("task"), subject.task, prompts.are_own, task_title, prompts.digest),
        *([] if is_own_ablation else [ablation]),
    ]


def _if_foreign(
    own: ModelConfig | TaskConfig | None,
    config: ModelConfig | TaskConfig,
    has_own_digest: bool,
    title: Callable[..., str],
    digest: str,
) -> list[str]:
    """Words for the file's name where a model or prompts are not the run's, wherever they lie.

    Args:
        own, config: the run's (None: there is none) and this one.
        has_own_digest: whether model or prompts are the run's.
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


def _print_evaluation(result: Evaluation, title: str, note: str) -> None:
    from edgeprune.evaluation.evaluate import OF_DISTRACTORS, Metrics

    columns = {
        f"circuit,\n{result.num_edges:,} edges": result.circuit,
        "full\nmodel": result.full,
        "every edge\nclosed": result.corrupted,
    }
    if result.shuffled is not None:
        columns["between\nother heads"] = result.shuffled
    table = Table(
        title=Text(f"{title}, {result.num_examples:,} prompts{note}"), title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for field in fields(Metrics):
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


def _in_words(result: Evaluation, circuit: Circuit) -> str:
    """What a circuit is made of and how well it does, in a few sentences."""
    graph, connected = circuit.graph, circuit.without_dangling()
    text = (
        f"in words: {len(circuit):,} of {graph.num_edges:,} edges give the full model's answer on "
        f"{result.circuit.exact_match:.1%} of the prompts, no edge on "
        f"{result.corrupted.exact_match:.1%}; the full model is right on {result.full.accuracy:.1%}"
    )
    if not len(connected):
        return f"{text}; no kept edge lies on a path from the input to the output"
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
