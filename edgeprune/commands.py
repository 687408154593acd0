"""What each command does, given its settings. `__main__` turns the command line into those."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeprune.config import (
    AblationConfig,
    AblationKind,
    ConfigError,
    DrawConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    PrepareConfig,
    PruneConfig,
    Split,
    TaskConfig,
    check_model,
    check_prune,
    check_size,
    target_sparsity,
    to_dict,
)
from edgeprune.files import write_text

OUT = Console()


# ----------------------------------------------------------------------------------------- prune


def prune(config: PruneConfig) -> None:
    """Learn the gates of a model's edges on a task; leaves a run directory."""
    check_prune(config)
    check_model(config.model)
    from edgeprune.ablation import Ablation
    from edgeprune.training import run
    from edgeprune.training.progress import training_progress
    from edgeprune.training.tracker import Tracker
    from edgeprune.training.trainer import Trainer

    run_dir = Path(config.run_dir)
    run.claim(run_dir, config)
    model = _load_model(config.model)
    data_path = _data_file(config.task, model.tokenizer, run_dir)
    pairs = _load_pairs(data_path, config.task, model, "train")
    run.write_manifest(run_dir, model, data_path)
    trainer = Trainer(
        model,
        pairs,
        config.trainer,
        target_sparsity=target_sparsity(config, model.graph.num_edges),
        seed=config.seed,
        ablation=Ablation(model, config.ablation, pairs),
    )
    _say(
        f"pruning {model.name} ({model.graph.num_edges:,} edges) on {config.task.name}: "
        f"{len(pairs):,} pairs, {config.trainer.steps:,} steps, in {run_dir}"
    )
    with (
        Tracker(config.tracker, run_dir, to_dict(config)) as track,
        training_progress(config.trainer.steps) as show,
    ):
        run.train(trainer, run_dir, lambda metrics: (show(metrics), track(metrics)), _say)
    export(ExportConfig(run=str(run_dir), sparsity=config.sparsity, num_edges=config.num_edges))
    evaluate(
        EvaluateConfig(circuit=str(run_dir), split=_first_split(data_path, Split.validation)),
        model=model,
    )


def _first_split(path: Path, wanted: Split) -> Split:
    """The wanted split if the file has it (or no splits at all), else the first it has."""
    from edgeprune.dataset import read_records

    found = {record.get("split", wanted.name) for record in read_records(path)}
    return wanted if wanted.name in found else next(split for split in Split if split.name in found)


def _load_model(config: ModelConfig) -> Any:
    from edgeprune.modeling import load_model

    check_model(config)
    with OUT.status(f"loading {config.path}"):
        return load_model(
            config.path,
            device=config.device,
            dtype=config.dtype,
            attention=config.attention,
            bits=config.bits,
            embedding_writers=config.embedding_writers,
            trust_remote_code=config.trust_remote_code,
        )


def _data_file(task: TaskConfig, tokenizer: Any, run_dir: Path) -> Path:
    """The task's JSONL: the user's, or one generated into the run directory."""
    from edgeprune.training.run import DATA

    if task.path is not None:
        return Path(task.path)
    path = run_dir / DATA
    if not path.exists():
        _write_records(_task_records(task, tokenizer), path)
    return path


def _task_records(task: TaskConfig, tokenizer: Any) -> list[dict]:
    """A task's prompts, generated."""
    from edgeprune.tasks import TASKS, make_records

    if task.name not in TASKS:
        raise ConfigError(
            f"unknown task {task.name!r}; choose {', '.join(TASKS)}, or give a file of your own "
            "with task=custom task.path=FILE"
        )
    sizes = {"train": task.train, "validation": task.validation, "test": task.test}
    records, report = make_records(task.name, tokenizer, sizes, task.seed)
    _say(f"{task.name}: {report}")
    return records


def _write_records(records: list[dict], path: Path) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _load_pairs(path: Path, task: TaskConfig, model: Any, split: str) -> Any:
    from edgeprune.dataset import load_dataset

    limit = model.max_length if task.max_length is None else task.max_length
    pairs = load_dataset(path, model.tokenizer, split, max_length=min(limit, model.max_length))
    if pairs.skipped:
        total = len(pairs) + len(pairs.skipped)
        _say(
            f"{pairs.name}: left out {len(pairs.skipped)} of {total} examples, "
            f"for instance {pairs.skipped[0]}"
        )
    return pairs


# ---------------------------------------------------------------------------------------- export


def export(config: ExportConfig) -> None:
    """Make a circuit of a run's checkpoint and write edges.json."""
    check_size(config.sparsity, config.num_edges)
    from edgeprune.training.run import EDGES, REPORT

    run_dir = Path(config.run)
    chosen, step = _export_from(run_dir, config.checkpoint, config.sparsity, config.num_edges)
    output = Path(config.output) if config.output else run_dir / EDGES
    chosen.circuit.save(output)
    report = {"checkpoint": step, **chosen.to_dict()}
    if not config.output:
        write_text(run_dir / REPORT, json.dumps(report, indent=1) + "\n")
    connected = report["without_dangling"]
    threshold = report["edge_threshold"]
    how = "exactly as asked" if threshold is None else f"at threshold {threshold:.4f}"
    OUT.print(
        f"circuit of step {step}: {report['num_edges']:,} of {report['all_edges']:,} edges "
        f"({report['sparsity']:.2%} sparse), {how}; without dangling edges "
        f"{connected['num_edges']:,} edges, {connected['num_nodes']} nodes -> {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _export_from(
    run_dir: Path, step: int | None, sparsity: float | None, num_edges: int | None
) -> tuple[Any, int]:
    from edgeprune.analysis.export import export_circuit
    from edgeprune.training.run import load_masks

    masks, step = load_masks(run_dir, step)
    if num_edges is not None and num_edges > masks.graph.num_edges:
        raise ConfigError(
            f"num_edges={num_edges} is more than the {masks.graph.num_edges} edges of this model"
        )
    return export_circuit(masks, sparsity=sparsity, num_edges=num_edges), step


# -------------------------------------------------------------------------------------- evaluate


def evaluate(config: EvaluateConfig, model: Any = None) -> None:
    """Measure a circuit beside the full model and the fully corrupted one."""
    from edgeprune.ablation import Ablation
    from edgeprune.analysis.evaluate import evaluate as measure
    from edgeprune.circuit import Circuit

    edges_path, run_dir = _find_circuit(config.circuit)
    of_run = _run_settings(run_dir)
    task = config.task or of_run.get("task")
    if (config.model or of_run.get("model")) is None or task is None:
        raise ConfigError(
            f"{edges_path} lies in no run directory, so give the model and the task: "
            "model=embedded task=ioi, or model.path=... with model=custom, task.path=... with "
            "task=custom"
        )
    if model is None:
        model = _load_model(config.model or of_run["model"])
    circuit = Circuit.load(edges_path, model.graph)
    folder = edges_path.parent
    ablation_config = config.ablation or of_run.get("ablation") or AblationConfig()
    split = config.split.name
    with TemporaryDirectory() as scratch:  # for generated prompts where there is no run directory
        data_path = _data_file(task, model.tokenizer, run_dir or Path(scratch))
        pairs = _load_pairs(data_path, task, model, split)
        reference_set = pairs
        if ablation_config.kind is AblationKind.mean:
            reference_split = _first_split(data_path, Split.train)
            reference_set = _load_pairs(data_path, task, model, reference_split.name)
    with OUT.status(f"evaluating on {len(pairs):,} pairs"):
        result = measure(
            model,
            circuit,
            pairs,
            ablation=Ablation(model, ablation_config, reference_set),
            batch_size=config.batch_size,
            random_circuits=config.random_circuits,
        )
    output = Path(config.output) if config.output else folder / f"evaluation-{split}.json"
    settings = {
        "circuit": str(edges_path),
        "model": model.name,
        "data": pairs.name if run_dir is None and task.path is None else str(data_path),
        "split": split,
        "ablation": to_dict(ablation_config),
    }
    text = json.dumps({**settings, **result.to_dict()}, indent=1)
    write_text(output, text + "\n")
    _print_evaluation(result, f"{model.name}, {pairs.name}, {ablation_config.kind.name} ablation")
    OUT.print(_in_words(result, circuit), markup=False, highlight=False, soft_wrap=True)
    OUT.print(f"-> {output}", markup=False, highlight=False, soft_wrap=True)


def _find_circuit(given: str) -> tuple[Path, Path | None]:
    """(edges.json, its run directory if it lies in one) of a run directory or an edges.json."""
    from edgeprune.training.run import EDGES, has_run

    path = Path(given)
    if not path.exists():
        raise ConfigError(f"no such file or directory: {path}; give a run directory or edges.json")
    if path.is_dir():
        if not (path / EDGES).exists():
            if not has_run(path):
                raise ConfigError(f"{path} is no run directory and holds no {EDGES}")
            raise ConfigError(f"{path} has no {EDGES} yet; make it with `edgeprune export {path}`")
        path = path / EDGES
    return path, path.parent if has_run(path.parent) else None


def _run_settings(run_dir: Path | None) -> dict[str, Any]:
    """Model, task and ablation settings of a run; nothing without a run."""
    if run_dir is None:
        return {}
    from edgeprune.training.run import read_config

    try:
        settings = OmegaConf.merge(OmegaConf.structured(PruneConfig), read_config(run_dir))
        return {key: OmegaConf.to_object(settings[key]) for key in ("model", "task", "ablation")}
    except Exception as error:  # whatever OmegaConf finds wrong with a file edited by hand
        raise ConfigError(f"{run_dir}/config.yaml cannot be used: {error}") from None


def _print_evaluation(result: Any, title: str) -> None:
    from edgeprune.analysis.evaluate import Scores

    columns = {
        f"circuit, {result.num_edges:,} edges": result.circuit,
        "full model": result.full,
        "all corrupted": result.corrupted,
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
        table.add_row(field.name.replace("_", " "), *(f"{value:.3f}" for value in values))
    OUT.print(table)
    worst = result.worst
    OUT.print(
        f"least faithful: KL {worst.kl:.2f} on {worst.text!r}: full model "
        f"{worst.full_prediction!r}, circuit {worst.circuit_prediction!r}",
        markup=False,
        highlight=False,
        soft_wrap=True,
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
        edges_at.update(graph.nodes_fed_by(reader))
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


# ------------------------------------------------------------------------------------------ draw


def draw(config: DrawConfig) -> None:
    """Draw a circuit by Graphviz."""
    check_size(config.sparsity, config.num_edges)
    from edgeprune.circuit import Circuit, infer_graph, load_edges
    from edgeprune.drawing import draw_circuit
    from edgeprune.training.run import EDGES, has_run, read_graph

    path = Path(config.circuit)
    from_masks = (config.checkpoint, config.sparsity, config.num_edges) != (None, None, None)
    if path.is_dir() and has_run(path) and (from_masks or not (path / EDGES).exists()):
        run_dir = path
        chosen, _ = _export_from(run_dir, config.checkpoint, config.sparsity, config.num_edges)
        circuit, folder = chosen.circuit, run_dir
    else:
        edges_path, run_dir = _find_circuit(config.circuit)
        if from_masks:
            raise ConfigError("checkpoint=, sparsity= and num_edges= need a run directory")
        edges = load_edges(edges_path)
        graph = read_graph(run_dir) if run_dir else infer_graph(edges, str(edges_path))
        circuit = Circuit.from_edges_checked(graph, edges, str(edges_path))
        folder = edges_path.parent
    shown = circuit if config.dangling else circuit.without_dangling()
    of_run = _run_settings(run_dir)
    title = config.title
    if title is None and of_run:
        title = f"{of_run['task'].name} in {of_run['model'].name}"
    stem = Path(config.output) if config.output else folder / "circuit"
    for suffix in config.formats:
        draw_circuit(
            shown.edges,
            stem.with_name(f"{stem.name}.{suffix}"),
            title=title,
            heads_per_kv_head=circuit.graph.heads_per_kv_head,
        )
    dropped = len(circuit) - len(shown)
    note = f" ({dropped:,} dangling edges left out)" if dropped else ""
    files = ", ".join(f"{stem}.{suffix}" for suffix in config.formats)
    OUT.print(
        f"drew {len(shown):,} edges between {len(shown.nodes)} nodes{note} -> {files}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


# --------------------------------------------------------------------------------------- prepare


def prepare(config: PrepareConfig) -> None:
    """Write a task's prompts as JSONL."""
    from edgeprune.modeling import load_tokenizer

    check_model(config.model)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    records = _task_records(config.task, tokenizer)
    _write_records(records, Path(config.output))
    OUT.print(f"wrote {len(records):,} lines -> {config.output}", markup=False, highlight=False)


def _say(text: str) -> None:
    """A line for people, on standard error; never read as markup."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
