"""Run: a run directory, from its creation to the measurements of its circuit.

A run directory belongs to one run. A new run is set up in a folder next to it, `.NAME.new`, which
takes its place when training is about to start: whatever fails before leaves an earlier run as it
was. `layout` names the files.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from edgeprune.circuit import Circuit
from edgeprune.config import (
    PruneConfig,
    Resume,
    Split,
    flatten,
    from_dict,
    settings_with,
    to_dict,
)
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import CheckpointError, ConfigError
from edgeprune.evaluation.report import RunRecord
from edgeprune.files import file_digest, write_json, write_text
from edgeprune.formats import CircuitFile, read_circuit, write_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.methods.states import scores_from_state
from edgeprune.runs import layout
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training import checkpoint as checkpoints
from edgeprune.training.checkpoint import Checkpoint

log = logging.getLogger("edgeprune")


class Run:
    """A run directory. Everything in it is read at most once.

    Attributes:
        path: the directory.
        config: its settings.
        is_new: whether it is still being set up next to its final place.
    """

    def __init__(self, path: Path, config: PruneConfig, *, is_new: bool = False) -> None:
        self.path = path
        self.config = config
        self.is_new = is_new

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open an existing run.

        Raises:
            ConfigError: it is not a run directory, or its config.yaml is damaged.
        """
        path = Path(path)
        if not is_run(path):
            raise ConfigError(
                f"{path} is not a run directory (it has no {layout.MANIFEST}); give the run_dir of "
                "an `edgeprune prune`"
            )
        file = path / layout.CONFIG
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ConfigError("expected settings by name")
            config = from_dict(PruneConfig, {**settings, "run_dir": str(path)})
        except (OSError, yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(
                f"{file} is not a valid config.yaml: {error}; restore it as `edgeprune prune` "
                "wrote it"
            ) from None
        return cls(path, config)

    # ------------------------------------------------------------------------- what it belongs to

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            ConfigError: it is missing or damaged.
        """
        file = self.path / layout.MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            CircuitGraph.from_dict(manifest["graph"])
            manifest["data"]["sha256"], manifest["model"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is not a valid run.json ({type(error).__name__}: {error}); restore it as "
                "`edgeprune prune` wrote it"
            ) from None
        return manifest

    @cached_property
    def graph(self) -> CircuitGraph:
        return CircuitGraph.from_dict(self.manifest["graph"])

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the run's `data` and `model`."""
        return {key: self.manifest[key]["sha256"] for key in ("data", "model")}

    @property
    def d_model(self) -> int | None:
        """Width of the model's residual stream."""
        return self.manifest["model"].get("d_model")

    @property
    def data_path(self) -> Path:
        """The file of the run's prompts."""
        return Path(self.config.task.path or self.path / layout.DATA)

    @property
    def origin(self) -> dict[str, Any]:
        """What circuits of this run belong to, as written to circuit.json."""
        settings = _portable(self.config)
        return {
            "run": str(self.path.absolute()),
            "model": {"settings": settings["model"], "sha256": self.digests["model"]},
            "data": {
                "settings": settings["task"],
                "path": str(self.data_path.absolute()),
                "sha256": self.digests["data"],
            },
            "ablation": settings["ablation"],
            "evaluation_batch_size": self.config.evaluation_batch_size,
        }

    # ---------------------------------------------------------------------------- scores, circuit

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The checkpoint of a step, or the last intact one.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = self.path / layout.CHECKPOINTS
        if step is not None:
            return checkpoints.load_checkpoint(folder, step)
        found = checkpoints.load_latest(folder)
        if found is None:
            raise CheckpointError(f"{self.path} has no usable checkpoint")
        return found

    def scores(self, step: int | None = None) -> EdgeScores:
        """The scores after a step; by default the final ones, or those of the last checkpoint."""
        if step is None and (self.path / layout.SCORES).exists():
            return EdgeScores.load(self.path / layout.SCORES)
        found = self.checkpoint(step)
        origin = {"method": self.config.trainer.method, "step": found.step}
        return scores_from_state(self.graph, found.state, origin)

    def circuit(self) -> CircuitFile:
        """The run's chosen circuit.

        Raises:
            ConfigError: none has been chosen yet.
        """
        if not (self.path / layout.CIRCUIT).exists():
            raise ConfigError(
                f"{self.path} has no circuit yet; let the run end (its command, with resume=auto), "
                f"or choose one from what it has learned so far: edgeprune export {self.path}"
            )
        return read_circuit(self.path / layout.CIRCUIT, self.graph)

    def unfinished_steps(self, step: Any) -> int | None:
        """The run's number of steps if `step` is not the last of them, else None."""
        steps = self.config.trainer.steps
        return steps if isinstance(step, int) and step < steps else None

    def write_circuit(self, circuit: Circuit, origin: Mapping[str, Any]) -> None:
        """Write the chosen circuit, in both forms; `origin` says how it was chosen."""
        origin = {**self.origin, **origin}
        write_circuit(circuit, self.path / layout.EDGES, "edges")
        write_circuit(circuit, self.path / layout.CIRCUIT, "circuit", origin=origin)

    # ------------------------------------------------------------------------------- measurements

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The measurements of the run's circuit, by split; damaged files are left out."""
        found = {}
        for split in Split:
            try:
                text = (self.path / layout.evaluation(split.name)).read_text(encoding="utf-8")
                found[split.name] = json.loads(text)
            except (OSError, ValueError):
                continue
        return found

    def record(self, name: str = "") -> RunRecord:
        """What a report needs to know; evaluations of other circuits or prompts are left out.

        Args:
            name: of the run, for people.

        Raises:
            ConfigError: the run is unfinished, or its circuit has another size than it asked for.
        """
        file = self.circuit()
        step = file.origin.get("scores", {}).get("step")
        if self.unfinished_steps(step):
            raise ConfigError(
                f"its circuit is of step {step:,} of {self.config.trainer.steps:,}; let the run "
                f"end (its command, with resume=auto), then `edgeprune export {self.path}`"
            )
        self._check_size(file)
        own = {
            "edges_sha256": file.circuit.digest(),
            "ablation": to_dict(self.config.ablation),
            "model_sha256": self.digests["model"],
            "data_sha256": self.digests["data"],
        }
        evaluations = {}
        for split, evaluation in self.evaluations().items():
            other = [key for key, value in own.items() if evaluation.get(key) != value]
            if other:
                log.warning(
                    f"{self.path / layout.evaluation(split)} does not belong to the run's circuit "
                    f"({', '.join(other)} differ); evaluate it again"
                )
            else:
                evaluations[split] = evaluation
        settings = flatten(_portable(self.config))
        return RunRecord(
            name or self.path.name, settings, file.circuit, evaluations, self.digests,
            settings.keys() - settings_with("distinguishes", False), self.path,
        )  # fmt: skip

    def _check_size(self, file: CircuitFile) -> None:
        """Raise ConfigError if the circuit, before any clean-up, is not of the size asked for."""
        config, size = self.config, len(file.circuit)
        size = file.origin.get("cleanup", {}).get("num_edges_before", size)
        if (config.sparsity, config.num_edges) != (None, None):
            asked = self.graph.resolve_size(config.num_edges, config.sparsity)
            if size != asked:
                raise ConfigError(
                    f"its circuit has {size:,} edges, but the run asked for {asked:,}; choose that "
                    f"one again by `edgeprune export {self.path}`, and evaluate it"
                )

    # --------------------------------------------------------------- what the training loop writes

    def latest(self) -> Checkpoint | None:
        """The last intact checkpoint, or None."""
        return checkpoints.load_latest(self.path / layout.CHECKPOINTS)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step."""
        return checkpoints.load_checkpoint(self.path / layout.CHECKPOINTS, step)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint."""
        checkpoints.save_checkpoint(self.path / layout.CHECKPOINTS, checkpoint)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / layout.METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to one that a crash or a full disk damaged."""
        file = self.path / layout.METRICS
        lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
        read = []
        for line in lines:
            try:
                metrics = json.loads(line)
                int(metrics["step"])
            except (ValueError, KeyError, TypeError):
                break
            read.append(metrics)
        return read

    def truncate_log(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after a step; they will be written again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.path / layout.METRICS, text)

    # ------------------------------------------------------------------------------------- set-up

    def begin(self, model: CircuitModel, world: World) -> None:
        """Put a new run in its place, or check that a resumed one has the same model and data.

        To be called by all processes when everything is loaded: an earlier run is deleted here.

        Raises:
            ConfigError: on resuming, the data file or the model has changed.
        """
        model.fingerprint()
        place = Path(self.config.run_dir)
        world.on_rank_zero(lambda: self._begin(model, place))
        self.path, self.is_new = place, False

    def _begin(self, model: CircuitModel, place: Path) -> None:
        manifest = _manifest(model, self.data_path)
        if self.is_new:
            if self.config.task.path is None:
                manifest["data"]["path"] = str(place / layout.DATA)
            write_json(self.path / layout.MANIFEST, manifest)
            _swap(self.path, place)
            return
        for key, digest in self.digests.items():
            if digest != manifest[key]["sha256"]:
                was = self.manifest[key]
                raise ConfigError(
                    f"cannot resume {place}: the {key} has changed since the run began "
                    f"({was.get('path') or was.get('name')}); restore it, or start again with "
                    "overwrite=true"
                )
        write_text(place / layout.CONFIG, yaml.safe_dump(_portable(self.config), sort_keys=False))


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run."""
    return (path / layout.MANIFEST).is_file() and (path / layout.CONFIG).is_file()


def run_of(path: Path) -> Path | None:
    """The run directory in which a path lies, or None."""
    return next((folder for folder in path.resolve().parents if is_run(folder)), None)


@contextmanager
def claim(config: PruneConfig, world: World) -> Iterator[Run]:
    """Lock a run directory for a new run, or for one that is resumed.

    Called by all processes; rank 0 holds the lock, which the kernel releases when the process ends.

    Raises:
        ConfigError: another process holds it; it has a run that is neither to be resumed nor to be
            replaced; it has other settings than the run to be resumed; or files of something else.
    """
    place = Path(config.run_dir)
    new = place.with_name(f".{place.name}.new")
    held: list[FileLock] = []

    def prepare() -> None:
        if is_run(place):
            held.append(_lock(place))
            _check_claim(place, config)
        elif place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(
                f"{place} is neither empty nor a run directory; choose another run_dir="
            )
        if not (is_run(place) and config.resume is Resume.auto):
            new.mkdir(parents=True, exist_ok=True)
            held.append(_lock(new))
            for leftover in new.iterdir():  # of a run that was killed during set-up
                if leftover.name != layout.LOCK:
                    leftover.unlink()
            write_text(new / layout.CONFIG, yaml.safe_dump(_portable(config), sort_keys=False))

    try:
        world.on_rank_zero(prepare)
        is_new = world.any(world.is_rank_zero and new.exists())
        run = Run(new if is_new else place, config, is_new=is_new)
        yield run
    finally:
        for lock in held:
            lock.release()
        if held and new.exists():
            shutil.rmtree(new, ignore_errors=True)


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / layout.LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another run is using {folder}; wait until it ends, stop it, or choose another "
            "run_dir="
        ) from None
    return lock


def _check_claim(place: Path, config: PruneConfig) -> None:
    """Whether a run may replace or continue the one in a directory."""
    if config.overwrite:
        for name, path in (("task.path", config.task.path), ("model.path", config.model.path)):
            if path and Path(path).resolve().is_relative_to(place.resolve()):
                raise ConfigError(
                    f"{name}={path} would be deleted with the earlier run in {place}; copy it "
                    "elsewhere, or choose another run_dir="
                )
        return
    if config.resume is Resume.never:
        raise ConfigError(
            f"{place} already holds a run; continue it with resume=auto, replace it with "
            "overwrite=true, or choose another run_dir="
        )
    old, new = (flatten(_portable(c)) for c in (Run.open(place).config, config))
    free = settings_with("resumable", True)
    for digest in ("model", "data"):  # compared by `begin`, since they may have been moved
        free |= {key for key in settings_with("digest", digest) if old.get(key) and new.get(key)}
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted((old.keys() | new.keys()) - free)
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{place} holds a run with other settings, which cannot be resumed with these "
            f"({'; '.join(changed)}). Use its settings, another run_dir=, or overwrite=true"
        )


def _swap(new: Path, place: Path) -> None:
    """Put a folder in the place of another one, which is deleted."""
    old = place.with_name(f".{place.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _portable(config: PruneConfig) -> dict[str, Any]:
    """The settings as JSON values, with paths that are valid from any directory."""
    settings = to_dict(config)
    for part in ("task", "model"):
        path = settings[part]["path"]
        if path and path != "embedded" and (part == "task" or Path(path).exists()):  # or a hub name
            settings[part]["path"] = str(Path(path).absolute())
    return settings


def _manifest(model: CircuitModel, data_path: Path) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "graph": model.graph.to_dict(),
        "data": {"path": str(data_path), "sha256": file_digest(data_path)},
        "model": {"name": model.name, "sha256": model.fingerprint(), "d_model": model.d_model},
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
