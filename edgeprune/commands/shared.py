"""What several commands share: words for people, models, prompts, and finding circuits."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console

from edgeprune.config import (
    ModelConfig,
    PruneConfig,
    Split,
    TaskConfig,
    check_model,
    check_num_edges,
    model_title,
    task_title,
)
from edgeprune.errors import ConfigError
from edgeprune.files import (
    check_can_be_file,
    file_digest,
    listed,
    remove_listed,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from edgeprune.circuit import Circuit
    from edgeprune.evaluation.export import Export
    from edgeprune.formats.eap import CircuitFile
    from edgeprune.graph import CircuitGraph
    from edgeprune.models import CircuitModel
    from edgeprune.prompts import PairDataset


class _Console(Console):
    """Goes on when nobody reads any more (`| head`), so that results are still written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


OUT = _Console()
ERR = _Console(stderr=True)

ORIGIN = ".origin"
"""Added to the name of an exported circuit: a note beside it of its graph and run."""


def be_quiet() -> None:
    """Print nothing but errors: what follows is said by the run's first process."""
    OUT.quiet = ERR.quiet = True


def show(text: str) -> None:
    """A result in words, on standard output; never read as markup."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line for people, on standard error; never read as markup."""
    ERR.print(text, markup=False, highlight=False, soft_wrap=True)


def check_output(
    output: Path, reads: Iterable[str | Path | None] = (), may_be: tuple[str, ...] = ()
) -> None:
    """Find before any work that a file cannot be written, or that what is needed would be lost.

    Args:
        output: the file to write.
        reads: files that the command reads.
        may_be: those of a run's own files that the command may write.

    Raises:
        ConfigError: it is read, is one of a run's own, or can be no file.
    """
    from edgeprune.runs.run import OWN_FILES, has_run

    try:
        check_can_be_file(output)
    except OSError as error:
        raise ConfigError(f"output={output}: {error.strerror}") from None
    real = output.resolve()
    for path in reads:
        if path is not None and Path(path).resolve() == real:
            raise ConfigError(
                f"output={output} is what is read, which would be replaced; choose another file"
            )
    for folder in real.parents:
        name = real.relative_to(folder).parts[0]
        if name in OWN_FILES and name not in may_be and has_run(folder):
            raise ConfigError(
                f"output={output} is one of the own files of the run in {folder} ({name}); choose "
                "another file"
            )


def load_model(config: ModelConfig) -> CircuitModel:
    from edgeprune.models import load_model, pick_device

    check_model(config)
    device = pick_device(config.device)
    with OUT.status(f"loading {config.path}"):
        return load_model(
            config.path,
            device=device,
            dtype=config.dtype,
            attention=config.attention,
            bits=config.bits,
            fused=config.fused and device.startswith("cuda"),
            embedding_writers=config.embedding_writers,
            trust_remote_code=config.trust_remote_code,
        )


def data_file(task: TaskConfig, folder: Path) -> Path:
    """The task's JSONL: the user's, or the one that is generated into a folder."""
    from edgeprune.runs.run import DATA

    return folder / DATA if task.path is None else Path(task.path)


def make_data(task: TaskConfig, tokenizer: Any, folder: Path) -> Path:
    """The task's JSONL, generated if it is not the user's and not there yet."""
    path = data_file(task, folder)
    if task.path is None and not path.exists():
        write_records(task_records(task, tokenizer), path)
    return path


def check_formats(formats: list[str]) -> None:
    """Raises ConfigError for a drawing's format that is none."""
    from edgeprune.drawing import SUFFIXES

    for suffix in formats:
        if suffix not in SUFFIXES:
            raise ConfigError(f"formats has {suffix!r}; choose of {', '.join(SUFFIXES)}")


def own_data(task: TaskConfig, run_dir: Path) -> Path:
    """The JSONL of a run's own task.

    Raises:
        ConfigError: it is gone.
    """
    path = data_file(task, run_dir)
    if not path.is_file():
        raise ConfigError(
            f"{path} is gone, which had the prompts of the run in {run_dir}; restore it (what was "
            "generated edgeprune prepare writes anew), or measure on others: edgeprune evaluate "
            f"{run_dir} task=custom task.path=FILE"
        )
    return path


def check_own_data(run_dir: Path, digest: str, data_path: Path) -> None:
    """Refuse a data file that is no longer the one a run was trained on.

    Args:
        run_dir: the run's.
        digest: SHA-256 of the file.
        data_path: the file.

    Raises:
        ConfigError: run.json has another digest.
    """
    from edgeprune.runs.run import read_digests

    if digest != read_digests(run_dir)["data"]:
        raise ConfigError(
            f"{data_path} has changed since the run in {run_dir} began, whose prompts it held; "
            "restore it, or measure what it holds now as other prompts: edgeprune evaluate "
            f"{run_dir} task=custom task.path={data_path}"
        )


def task_records(task: TaskConfig, tokenizer: Any) -> list[dict]:
    """A task's prompts, generated."""
    from edgeprune.prompts.tasks import FROM_MODEL, TASKS, make_records, tracr

    if task.name == FROM_MODEL:
        if not hasattr(tokenizer, "folder"):
            raise ConfigError(
                f"task={FROM_MODEL} takes the prompts that come with a Tracr model; this model is "
                "none, so choose another task"
            )
        return tracr.make_records(tokenizer.folder, tokenizer.config)
    if task.name not in TASKS:
        raise ConfigError(
            f"unknown task {task.name!r}; choose {', '.join((*TASKS, FROM_MODEL))}, or give a file "
            "of your own with task=custom task.path=FILE"
        )
    sizes = {"train": task.train, "validation": task.validation, "test": task.test}
    records, report = make_records(task.name, tokenizer, sizes, task.seed)
    say(f"{task.name}: {report}")
    return records


def write_records(records: list[dict], path: Path) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def load_pairs(path: Path, task: TaskConfig, model: CircuitModel, split: str) -> PairDataset:
    """One split of a file, or of the prompts that were generated for the task."""
    from edgeprune.errors import DataError
    from edgeprune.prompts import load_dataset
    from edgeprune.runs.run import has_run

    def named(text: object) -> str:
        """Without the path of a file that the command will not leave."""
        is_left = task.path is not None or has_run(path.parent)
        return str(text) if is_left else str(text).replace(str(path), "the generated prompts")

    limit = model.max_length if task.max_length is None else task.max_length
    limit = min(limit, model.max_length)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            pairs = load_dataset(path, model.tokenizer, split, max_length=limit)
        except DataError as error:
            raise type(error)(named(error)) from None
    for warning in caught:
        say(named(warning.message))
    return pairs


def first_split(path: Path, wanted: Split) -> Split:
    """The wanted split if the file has it (or no splits at all), else the first it has."""
    from edgeprune.prompts import iterate_records

    found = {record.get("split", wanted.name) for record in iterate_records(path)}
    return wanted if wanted.name in found else next(split for split in Split if split.name in found)


def find_circuit(given: str) -> tuple[Path, Path | None]:
    """(file, its run directory if there is one) of a run directory or a circuit's file.

    What is noted beside a circuit that `export`, `compare` or `report` wrote names its run.
    """
    from edgeprune.runs.run import EDGES, has_run

    path = Path(given)
    if not path.exists():
        raise ConfigError(
            f"no such file or directory: {path}; give a run directory, an edges.json, or a graph "
            "of EAP-IG or MIB"
        )
    if path.is_dir():
        if not (path / EDGES).exists():
            if not has_run(path):
                raise ConfigError(f"{path} is no run directory and holds no {EDGES}")
            raise ConfigError(
                f"{path} has no {EDGES} yet; let the run end (its command, with resume=auto), or "
                f"make a circuit of what it has learned: edgeprune export {path}"
            )
        path = path / EDGES
    origin = read_origin(path).get("run")
    if isinstance(origin, str) and has_run(path.parent / origin):
        return path, path.parent / origin
    return path, path.parent if has_run(path.parent) else None


def read_origin(path: Path) -> dict[str, Any]:
    """What is noted beside a circuit: FILE.origin, or an edges.json's circuit.json; or nothing."""
    from edgeprune.runs.run import CIRCUIT_NOTE, EDGES

    notes = [path.with_name(path.name + ORIGIN)]
    if path.name == EDGES:
        notes.append(path.with_name(CIRCUIT_NOTE))
    for note in notes:
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("sha256") in (None, file_digest(path)):
            return found
    return {}


def write_origin(path: Path, graph: CircuitGraph, run_dir: Path | None) -> Path:
    """Note beside an edges.json of which graph and run it is, since the file cannot say.

    The note holds for the file as it now is. Returns the note's path.
    """
    run = None if run_dir is None else os.path.relpath(run_dir, path.parent)
    origin = {"sha256": file_digest(path), "run": run, "graph": graph.to_dict()}
    note = path.with_name(path.name + ORIGIN)
    write_json(note, origin)
    return note


def known_graph(path: Path, run_dir: Path | None) -> CircuitGraph | None:
    """The graph of a circuit's file if it is known without reading the file, else None."""
    from edgeprune.graph import CircuitGraph
    from edgeprune.runs.run import read_graph

    try:
        return CircuitGraph.from_dict(read_origin(path)["graph"])
    except (KeyError, TypeError, ValueError):
        return None if run_dir is None else read_graph(run_dir)


def read_circuit(path: Path, graph: CircuitGraph | None = None) -> Circuit:
    """A circuit's file of any format; says what was lost in reading, or had to be guessed.

    Args:
        path: the file.
        graph: the model's; None: the file's own or, for an edges.json, the smallest that fits.
    """
    from edgeprune.formats.eap import read_circuit_file

    return circuit_of(path, read_circuit_file(path, graph))


def circuit_of(path: Path, file: CircuitFile) -> Circuit:
    """The circuit of a `CircuitFile`; says what `read_circuit` says."""
    from edgeprune.circuit import Circuit
    from edgeprune.formats.eap import infer_graph

    for note in file.notes:
        say(note)
    graph = file.graph or infer_graph(file.edges, str(path))
    if file.graph is None:
        say(
            f"{path} does not say which model it is of, so the graph is the smallest that has "
            f"these edges ({graph.num_layers} layers of {graph.num_heads} heads), without grouped "
            "queries: of a model that has them, it is the wrong one. What `edgeprune export RUN` "
            f"writes is known, with its FILE{ORIGIN} beside it"
        )
    elif not file.sure:
        say(
            f"{path} does not say whether heads share keys and values, so each is taken to have "
            "its own; of a model with grouped queries, an edges.json made of it is wrong"
        )
    return Circuit.from_edges_checked(graph, file.edges, str(path))


def write_circuit(
    folder: Path, circuit: Circuit, chosen_by: str, run_dir: Path | None
) -> list[Path]:
    """Write a circuit made of others: edges.json, and a circuit.json that says how and of what.

    Returns the two files.
    """
    from edgeprune.runs.run import CIRCUIT_NOTE, EDGES

    run = None if run_dir is None else os.path.relpath(run_dir, folder)
    report = {
        "chosen_by": chosen_by,
        "run": run,
        "graph": circuit.graph.to_dict(),
        **circuit.sizes(),
    }
    circuit.save(folder / EDGES)
    write_json(folder / CIRCUIT_NOTE, report)
    return [folder / EDGES, folder / CIRCUIT_NOTE]


@contextmanager
def replacing_earlier(
    folder: Path, command: str, reads: Iterable[Path] = ()
) -> Iterator[list[Path]]:
    """Remove what the command wrote into a folder before, and note what it writes now.

    Only files that are still as they were written are removed, and folders that this leaves empty.

    Args:
        folder: where it writes.
        command: its name.
        reads: files that it reads.

    Yields: a list, to which the files written are added.

    Raises:
        ConfigError: it reads a file that would be removed.
    """
    note = folder / f".{command}.json"
    before = {(folder / name).resolve() for name in listed(note)}
    for path in reads:
        if path.resolve() in before:
            raise ConfigError(
                f"{path} is of an earlier `edgeprune {command}`, which would be replaced in "
                f"{folder}; choose another output="
            )
    remove_listed(note)
    written: list[Path] = []
    try:
        yield written
    finally:
        files = {str(path.relative_to(folder)): file_digest(path) for path in written}
        write_json(note, files)


def run_settings(run_dir: Path | None) -> dict[str, Any]:
    """Model, task, ablation and trainer settings of a run; nothing without a run."""
    if run_dir is None:
        return {}
    from edgeprune.runs.run import read_config

    content = read_config(run_dir)
    try:
        settings = OmegaConf.merge(OmegaConf.structured(PruneConfig), content)
        return {
            key: OmegaConf.to_object(settings[key])
            for key in ("model", "task", "ablation", "trainer")
        }
    except Exception as error:  # whatever OmegaConf finds wrong with a file edited by hand
        raise ConfigError(f"{run_dir}/config.yaml cannot be used: {error}") from None


def unfinished_steps(settings: dict[str, Any], step: Any) -> int | None:
    """All steps of a run, where a checkpoint's step is not the last of them."""
    trainer = settings.get("trainer")
    steps = trainer.get("steps") if isinstance(trainer, dict) else None
    known = isinstance(steps, int) and isinstance(step, int)
    return steps if known and step < steps else None


def run_title(run_dir: Path | None) -> str | None:
    """'ioi in embedded'; one's own data or model goes by its file's name. None without a run."""
    of_run = run_settings(run_dir)
    if not of_run:
        return None
    task, model = of_run["task"], of_run["model"]
    return f"{task_title(task.name, task.path)} in {model_title(model.name, model.path)}"


def export_from(
    run_dir: Path,
    step: int | None,
    sparsity: float | None,
    num_edges: int | None,
    threshold: bool = False,
) -> tuple[Export, int]:
    """The circuit of a run's checkpoint, and its step.

    Args:
        run_dir: the run's.
        step: of the checkpoint; None: the last.
        sparsity, num_edges: its size; neither: as the run asked for.
        threshold: whether a threshold decides in place of a size.
    """
    from edgeprune.evaluation.export import export_circuit
    from edgeprune.runs.run import load_masks, read_config

    settings, is_last = read_config(run_dir), step is None
    masks, step = load_masks(run_dir, step, say)
    of_all = unfinished_steps(settings, step)
    if is_last and of_all:
        say(
            f"the run in {run_dir} has done {step:,} of {of_all:,} steps, so its gates have not "
            "become what they are to be; go on with its command and resume=auto"
        )
    check_num_edges(num_edges, masks.graph.num_edges)
    if sparsity is None and num_edges is None and not threshold:
        sparsity, num_edges = settings.get("sparsity"), settings.get("num_edges")
    return export_circuit(masks, sparsity=sparsity, num_edges=num_edges), step
