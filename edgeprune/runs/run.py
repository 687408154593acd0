"""A run directory: what a run leaves behind, and how it goes on after an interruption.

config.yaml      the resolved settings
run.json         graph, data and model fingerprints, versions
data.jsonl       the prompts, where they were generated
metrics.jsonl    one line every few steps; training.png is their plot
checkpoints/     masks and optimiser state
edges.json       the circuit; circuit.json says how it was chosen
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from edgeprune.config import FREE_TO_CHANGE, KNOWN_BY_DIGEST, PruneConfig, Resume, to_dict
from edgeprune.drawing import SUFFIXES
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import CheckpointError, ConfigError, Interrupted, ProcessError, TrainingError
from edgeprune.files import file_digest, remove_listed, write_json, write_text
from edgeprune.graph import CircuitGraph
from edgeprune.methods.masks import CircuitMasks
from edgeprune.scale.launch import stop_signals
from edgeprune.scale.world import World
from edgeprune.training.checkpoint import load_checkpoint, load_latest, save_checkpoint
from edgeprune.training.trainer import StepMetrics, Trainer

CONFIG = "config.yaml"
MANIFEST = "run.json"
METRICS = "metrics.jsonl"
PLOT = "training.png"
DATA = "data.jsonl"
EDGES = "edges.json"
CIRCUIT_NOTE = "circuit.json"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluation-*.json"
GRAPH_JSON, GRAPH_PT = "graph.json", "graph.pt"
DRAWINGS = tuple(f"circuit.{suffix}" for suffix in SUFFIXES)
MADE_OF_A_RUN = (EVALUATIONS, EDGES, CIRCUIT_NOTE, GRAPH_JSON, GRAPH_PT, *DRAWINGS)
REPORT_LIST = "report/.report.json"
"""What `report` wrote there, where the run directory itself was its folder."""
LOCK = ".lock"
NEW = ".new-run"
"""Where a new run's first files lie until it begins; what is there already stays until then."""
OWN_FILES = (CONFIG, MANIFEST, DATA, METRICS, PLOT, CHECKPOINTS, EDGES, CIRCUIT_NOTE, LOCK, NEW)
"""What a run writes and goes by, which no command's output may replace."""


# ----------------------------------------------------------------------------------- preparation


def has_run(run_dir: Path) -> bool:
    """Whether a run got as far as loading its model and data there."""
    return (run_dir / MANIFEST).exists()


def _has_results(run_dir: Path) -> bool:
    """Whether a run there has learned anything: a checkpoint, or what was made of one."""
    names = (f"{CHECKPOINTS}/step-*", *MADE_OF_A_RUN)
    return has_run(run_dir) and any(path for name in names for path in run_dir.glob(name))


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, so that no second run writes there.

    The kernel lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: another run holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run is at work in {run_dir}; wait until it ends, stop it, or choose "
                "another run_dir="
            ) from None
        yield


def claim(run_dir: Path, config: PruneConfig) -> None:
    """Find whether this config may run there, before anything slow is done.

    Nothing is deleted yet, see `begin`; a new run's settings are written into NEW. A run that was
    stopped before its first checkpoint has nothing to lose, and a new one begins.

    Raises:
        ConfigError: it holds another run, one that is not to be resumed, or files of no run.
    """
    if (run_dir / NEW).exists():  # of one that was killed
        shutil.rmtree(run_dir / NEW)
    if _has_results(run_dir) and not config.overwrite:
        if config.resume is Resume.never:
            raise ConfigError(
                f"{run_dir} already holds a run; go on with resume=auto, start anew with "
                "overwrite=true, or choose another run_dir="
            )
        _check_same(run_dir, _settings(config))
        return
    _left_by_earlier(run_dir, config.task.path)
    write_text(run_dir / NEW / CONFIG, _as_yaml(config))


def first_files(run_dir: Path, processes: World) -> Path:
    """Where the settings and generated prompts of a claimed run lie, as the first process sees it.

    Others may, on a disk that several machines share, see it later.
    """
    return run_dir / NEW if processes.from_rank_zero((run_dir / NEW).exists()) else run_dir


def begin(run_dir: Path, config: PruneConfig, model: CircuitModel, data_path: Path) -> None:
    """Put a new run in the place of an earlier one, or check that one goes on as it was.

    To be called when everything is loaded, since what the earlier run left is deleted here. One
    that goes on notes where data and model lie now.

    Raises:
        ConfigError: on resuming, the data file or the model has changed.
    """
    manifest = _manifest(model, data_path)
    new = run_dir / NEW
    if not new.exists():
        _check_unchanged(run_dir, manifest)
        write_text(run_dir / CONFIG, _as_yaml(config))
        return
    if config.task.path is None:
        manifest["data"]["path"] = str(run_dir / DATA)
    write_json(new / MANIFEST, manifest)
    left = _left_by_earlier(run_dir, config.task.path)
    if has_run(run_dir):
        remove_listed(run_dir / REPORT_LIST)
    for path in left:  # run.json, which makes it a run, last
        if path.name != CONFIG:  # which is replaced
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (CONFIG, DATA, MANIFEST):
        if (new / name).exists():
            os.replace(new / name, run_dir / name)
    new.rmdir()


def _as_yaml(config: PruneConfig) -> str:
    return yaml.safe_dump(_settings(config), sort_keys=False)


def _settings(config: PruneConfig) -> dict[str, Any]:
    """What config.yaml holds: the settings, with paths that can be found from any directory."""
    settings = to_dict(config)
    for part in ("task", "model"):
        path = settings[part]["path"]
        if path and path != "embedded" and (part == "task" or Path(path).exists()):  # or a hub name
            settings[part]["path"] = str(Path(path).absolute())
    return settings


def _left_by_earlier(run_dir: Path, task_path: str | None) -> list[Path]:
    """What a run left there, or one that was stopped as it began, and nothing else.

    Raises:
        ConfigError: files that no run left are in the way, or the task's prompts are among them.
    """
    names = (CONFIG, *MADE_OF_A_RUN, METRICS, PLOT, CHECKPOINTS, DATA, MANIFEST)
    found = [path for name in names for path in run_dir.glob(name)]
    foreign = [path.name for path in found if path.name not in _left_by_a_run(run_dir, found)]
    if foreign:
        _check_readable(run_dir, foreign)
        raise ConfigError(
            f"{run_dir} holds files that no run left there, but would be taken for one's: "
            f"{', '.join(foreign)}; choose another run_dir="
        )
    if task_path is not None and any(
        Path(task_path).resolve().is_relative_to(path.resolve()) for path in found
    ):
        raise ConfigError(
            f"task.path={task_path} would be deleted with the earlier run in {run_dir}; copy it to "
            "another place, or choose another run_dir="
        )
    return found


def _check_readable(run_dir: Path, foreign: list[str]) -> None:
    """Raises ConfigError where what would tell that a run left these files is damaged."""
    if not (run_dir / CONFIG).exists():
        return
    try:
        read_config(run_dir)
        if has_run(run_dir):
            read_manifest(run_dir)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; so it cannot be told whether a run left {', '.join(foreign)} there: restore "
            "it, remove them, or choose another run_dir="
        ) from None


def _left_by_a_run(run_dir: Path, found: list[Path]) -> set[str]:
    """Which of these files are a run's: its settings and run.json tell, not their names alone."""
    try:
        settings = read_config(run_dir)
    except ConfigError:
        return set()
    task = settings.get("task")
    if not isinstance(task, dict) or not {"model", "ablation", "run_dir"} <= settings.keys():
        return set()
    try:
        begun = {"graph", "data", "model"} <= read_manifest(run_dir).keys()
    except ConfigError:
        begun = False
    ours = {path.name for path in found} if begun else {CONFIG, DATA}
    return ours if task.get("path") is None else ours - {DATA}


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run, as plain values.

    Raises:
        ConfigError: not a run directory, or a config.yaml of something else.
    """
    path = run_dir / CONFIG
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"{run_dir} is no run directory: it has no {CONFIG}; give the run_dir of a "
            "`edgeprune prune`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is no list of settings, as `edgeprune prune` writes it")
    return settings


def _check_same(run_dir: Path, config: dict[str, Any]) -> None:
    old, new = flatten(read_config(run_dir)), flatten(config)
    free = list(FREE_TO_CHANGE)
    free += [key for key in KNOWN_BY_DIGEST if old.get(key) and new.get(key)]  # they may have moved
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if changed:
        raise ConfigError(
            f"{run_dir} holds a run of another config, which cannot be resumed with this one "
            f"({'; '.join(changed)}). Use its settings, another run_dir=, or overwrite=true"
        )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'trainer': {'steps': 600}} -> {'trainer.steps': 600}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _manifest(model: CircuitModel, data_path: Path) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "graph": model.graph.to_dict(),
        "data": {"path": str(data_path), "sha256": file_digest(data_path)},
        "model": {
            "name": model.name,
            "sha256": model.fingerprint(),
            "d_model": model.d_model,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "machine": {
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        },
    }


def _check_unchanged(run_dir: Path, manifest: dict[str, Any]) -> None:
    for key, digest in read_digests(run_dir).items():
        if digest != manifest[key]["sha256"]:
            was = read_manifest(run_dir)[key]
            raise ConfigError(
                f"cannot resume {run_dir}: the {key} has changed since the run began "
                f"({was.get('path') or was.get('name')}); restore it, or start anew with "
                "overwrite=true"
            )


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """run.json, as written.

    Raises:
        ConfigError: not a run directory, or one whose training has not begun, or damaged.
    """
    read_config(run_dir)
    path = run_dir / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {path}: {reason}") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"cannot read {path}: it is not what `edgeprune prune` wrote there")
    return manifest


def read_graph(run_dir: Path) -> CircuitGraph:
    """The graph of a run, without loading its model; errors as `read_manifest`."""
    manifest = read_manifest(run_dir)
    try:
        return CircuitGraph.from_dict(manifest["graph"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise ConfigError(
            f"{run_dir / MANIFEST} does not say which graph the run had{reason}; restore it as "
            "`edgeprune prune` wrote it"
        ) from None


def read_digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of a run's `data` and of its `model`; errors as `read_manifest`."""
    manifest = read_manifest(run_dir)
    try:
        return {key: manifest[key]["sha256"] for key in ("data", "model")}
    except (KeyError, TypeError):
        raise ConfigError(
            f"{run_dir / MANIFEST} does not say which data and model the run had; restore it as "
            "`edgeprune prune` wrote it"
        ) from None


def load_masks(
    run_dir: Path | str, step: int | None = None, say: Callable[[str], object] = warnings.warn
) -> tuple[CircuitMasks, int]:
    """The masks of a run's checkpoint, the last intact one by default, and its step.

    Args:
        run_dir: the run's.
        step: of the checkpoint.
        say: called with what a person should know: a damaged checkpoint is passed over.

    Raises:
        ConfigError: not a run directory.
        CheckpointError: no such checkpoint, or a damaged one.
    """
    run_dir = Path(run_dir)
    graph = read_graph(run_dir)
    if step is not None:
        checkpoint, damaged = load_checkpoint(run_dir, step), []
    else:
        checkpoint, damaged = load_latest(run_dir)
    if checkpoint is None:
        reason = "; ".join(damaged) or "none has been written yet"
        raise CheckpointError(f"{run_dir} has no usable checkpoint: {reason}")
    for message in damaged:
        say(f"{message}; passing over it")
    masks = CircuitMasks(graph, node_gates="node_log_alpha" in checkpoint.masks)
    try:
        masks.load_state_dict(checkpoint.masks)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit the run's graph: {error}"
        ) from None
    return masks, checkpoint.step


# -------------------------------------------------------------------------------------- training


def train(
    trainer: Trainer,
    run_dir: Path,
    on_step: Callable[[StepMetrics], None],
    say: Callable[[str], None],
) -> None:
    """Train to the end, from the last intact checkpoint if there is one.

    Args:
        trainer: at step 0; under several processes each calls this, and the first writes.
        run_dir: where metrics and checkpoints go.
        on_step: called after each step.
        say: called with what a person should know.

    Raises:
        Interrupted: by SIGINT, SIGTERM, SIGUSR1 or SIGHUP, after saving a checkpoint, in the last
            step, too.
        TrainingError: a loss was not finite; a checkpoint of the state before it is saved, as when
            a GPU's memory is too small.
        CheckpointError: a checkpoint cannot be saved.
    """
    processes, config = trainer.processes, trainer.config
    _restore_latest(trainer, run_dir, say)
    saved = trainer.step
    metrics_file: Any = nullcontext()
    if processes.is_rank_zero:
        _truncate_metrics(run_dir / METRICS, trainer.step)
        metrics_file = (run_dir / METRICS).open("a", encoding="utf-8")
    with _stop_signals(alone=processes.count == 1) as stopped_by, metrics_file as metrics:
        while trainer.step < config.steps:
            try:
                done = trainer.train_step()
            except (TrainingError, ProcessError, torch.OutOfMemoryError):
                _save(trainer, run_dir, saved)
                raise
            if metrics and (done.step % config.log_every == 0 or done.step == config.steps):
                metrics.write(json.dumps(asdict(done)) + "\n")
                metrics.flush()
            on_step(done)
            last = done.step == config.steps
            stop = processes.any(bool(stopped_by))
            if done.step % config.checkpoint_every == 0 or last or stop:
                saved = _save(trainer, run_dir, saved)
            if stop:
                processes.any(False)  # the others wait until it is saved
                number = stopped_by[0] if stopped_by else signal.SIGTERM
                raise Interrupted(number, trainer.step, run_dir)


def _restore_latest(trainer: Trainer, run_dir: Path, say: Callable[[str], None]) -> None:
    """Go on from the last intact checkpoint, the same on every process."""
    processes = trainer.processes
    checkpoint = None
    if processes.is_rank_zero:
        checkpoint, damaged = load_latest(run_dir)
        for message in damaged:
            say(f"{message}; passing over it")
    step = processes.from_rank_zero(checkpoint.step if checkpoint else 0)
    if step > 0:
        trainer.restore(checkpoint or load_checkpoint(run_dir, step))
        say(f"resuming from step {trainer.step} of {trainer.config.steps}")


def _save(trainer: Trainer, run_dir: Path, saved: int) -> int:
    if trainer.processes.is_rank_zero and trainer.step != saved:
        save_checkpoint(run_dir, trainer.checkpoint())
    return trainer.step


def _truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines up to a step; later ones will be written again."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, up to one that is damaged, as by a crash or a full disk."""
    read = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            break
        if not isinstance(metrics, dict) or type(metrics.get("step")) is not int:
            break
        read.append(metrics)
    return read


@contextmanager
def _stop_signals(alone: bool):
    """Collect the signals that stop a run, for the loop to act on.

    Args:
        alone: whether this is the run's only process; then a second signal acts at once. Launchers
            of several repeat signals, and end by force what takes too long.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if received and alone and number != signal.SIGHUP:  # which shell and terminal both send
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, receive) for number in stop_signals()}
    completed = False
    try:
        yield received
        completed = True
    finally:
        if alone or completed:  # else the process is about to end, and has still to say why
            for number, handler in old.items():
                signal.signal(number, handler)
