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
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from edgeprune.circuit import Circuit
from edgeprune.config import (
    SPLITS,
    AttributeConfig,
    PruneConfig,
    RunConfig,
    chosen_by,
    flatten,
    from_dict,
    settings_with,
    to_dict,
)
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import CheckpointError, ConfigError
from edgeprune.evaluation.curve import Curve
from edgeprune.evaluation.report import RunRecord
from edgeprune.files import (
    file_digest,
    put_in_place,
    read_if_intact,
    remove_unfinished,
    write_json,
    write_text,
)
from edgeprune.formats import CircuitFile, read_circuit, write_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.methods import METHODS
from edgeprune.paths import require_utf8
from edgeprune.runs import layout
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training import checkpoint as checkpoints
from edgeprune.training.checkpoint import Checkpoint
from edgeprune.training.snapshots import Snapshots

log = logging.getLogger("edgeprune")

PATHS = ("task.path", "model.path", "start", "circuit")
"""The settings that are paths of what a run reads."""


class Run:
    """A run directory.

    Attributes:
        path: the directory.
        config: its settings.
        is_new: whether it is still being set up next to its final place.
    """

    def __init__(self, path: Path, config: RunConfig, *, is_new: bool = False) -> None:
        self.path, self.config, self.is_new = path, config, is_new

    def __repr__(self) -> str:
        return f"Run({self.path}: {self.config.label})"

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open an existing run; raises ConfigError if the directory is not a run, or damaged."""
        path = Path(path)
        require_utf8(path)
        if not is_run(path):
            raise ConfigError(
                f"{path} is not a run directory (it has no {layout.MANIFEST}); give the run_dir of "
                "`edgeprune prune` or `edgeprune attribute`"
            )
        file = path / layout.CONFIG
        try:
            settings = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
            schema = AttributeConfig if "method" in settings else PruneConfig
            return cls(path, from_dict(schema, {**settings, "run_dir": str(path)}))
        except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({error}); restore it as `edgeprune prune` wrote it"
            ) from None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of run.json: graph, data, model, versions, machine."""
        file = self.path / layout.MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            CircuitGraph.from_dict(manifest["graph"])
            manifest["data"]["sha256"], manifest["model"]["sha256"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({type(error).__name__}: {error}); restore it as `edgeprune "
                "prune` wrote it"
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
    def data_path(self) -> Path:
        """The file of the run's prompts."""
        return Path(self.config.task.path or self.path / layout.DATA)

    @property
    def origin(self) -> dict[str, Any]:
        """What circuits of this run belong to, as written to circuit.json."""
        settings, digests = _portable(self.config), self.digests
        data = {"path": str(self.data_path.absolute()), "sha256": digests["data"]}
        return {
            "run": str(self.path.absolute()),
            "model": {"settings": settings["model"], "sha256": digests["model"]},
            "data": {"settings": settings["task"], **data},
            "ablation": settings["ablation"],
            "evaluation_batch_size": self.config.evaluation_batch_size,
        }

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The checkpoint of a step, or the last intact one; raises CheckpointError without one."""
        if step is not None:
            return checkpoints.load_checkpoint(self.path / layout.CHECKPOINTS, step)
        found = self.latest()
        if found is None:
            raise CheckpointError(f"{self.path} has no usable checkpoint")
        return found

    def scores(self, step: int | None = None) -> EdgeScores:
        """The scores after a step; by default the final ones, or those of the last checkpoint."""
        if step is None and (self.path / layout.SCORES).exists():
            return EdgeScores.load(self.path / layout.SCORES)
        method = self.config.method_name
        if method not in METHODS:
            raise ConfigError(
                f"{self.path} has scores only at its end; let it end (its command, with "
                "resume=auto), and give no checkpoint="
            )
        found = self.checkpoint(step)
        values = METHODS[method].scores(self.graph, found.state)
        return EdgeScores(self.graph, values, origin={"method": method, "step": found.step})

    @property
    def circuit_path(self) -> Path:
        """The run's circuit.json; raises ConfigError if no circuit has been chosen yet."""
        path = self.path / layout.CIRCUIT
        if not path.exists():
            raise ConfigError(
                f"{self.path} has no circuit yet; let the run end (its command, with resume=auto), "
                f"or choose one from what it has learned so far: edgeprune export {self.path}"
            )
        return path

    def circuit(self) -> CircuitFile:
        """The run's chosen circuit."""
        return read_circuit(self.circuit_path, self.graph)

    def write_circuit(self, circuit: Circuit, origin: Mapping[str, Any]) -> None:
        """Write the chosen circuit in both forms; `origin` says how it was chosen.

        Warns if none of its edges lies on a path from the input to the output.
        """
        if not len(circuit.without_dangling()):
            log.warning(
                f"the circuit now in {self.path} has {len(circuit):,} edges, none of which lies on "
                "a path from the input to the output; choose a larger one with `edgeprune export`"
            )
        write_circuit(circuit, self.path / layout.EDGES)
        origin = {**self.origin, **origin}
        write_circuit(circuit, self.path / layout.CIRCUIT, "circuit", origin=origin)

    def curve(self) -> Curve | None:
        """Metrics of circuits of many sizes on validation prompts; None if not measured yet."""
        again = "measurements are made again where they are needed"
        return read_if_intact(self.path / layout.CURVE, Curve.from_dict, again)

    def is_unfinished(self, origin: Mapping[str, Any]) -> bool:
        """Whether scores of this origin are not those of the run's last step."""
        return "step" in origin and origin["step"] < self.config.trainer.steps

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The measurements of the run's circuit, by split."""
        paths = {split: self.path / layout.evaluation(split) for split in SPLITS}
        found = {s: read_if_intact(path, dict, "evaluate again") for s, path in paths.items()}
        return {split: record for split, record in found.items() if record is not None}

    def record(self, name: str) -> RunRecord:
        """What a report needs to know; evaluations of other circuits or prompts are left out.

        `name` is for people; "." stands for the directory's name. Raises ConfigError if the run is
        unfinished, or its circuit has another size than it asked for.
        """
        file, config, own = self.circuit(), self.config, {}
        own["edges_sha256"], own["ablation"] = file.circuit.digest(), to_dict(config.ablation)
        own["model_sha256"], own["data_sha256"] = self.digests["model"], self.digests["data"]
        size = file.origin.get("cleanup", {}).get("num_edges_before", len(file.circuit))
        setting, value = config.choice
        if setting in ("sparsity", "num_edges"):
            is_asked = size == self.graph.resolve_size(**{setting: value})
        else:
            is_asked = file.origin.get("chosen_by") == chosen_by(config.choice)
        if not is_asked or self.is_unfinished(file.origin.get("scores", {})):
            raise ConfigError(
                "its circuit is unfinished, or was not chosen as its settings ask; let the run "
                f"end (its command, with resume=auto), then `edgeprune export {self.path}` and "
                "evaluate"
            )
        evaluations = self.evaluations()
        for split, found in list(evaluations.items()):
            if any(found.get(key) != value for key, value in own.items()):
                del evaluations[split]
                log.warning(
                    f"{self.path / layout.evaluation(split)} is of another circuit, model, data or "
                    "ablation than the run's; evaluate it again"
                )
        settings = flatten(_portable(config))
        distinguishing = settings.keys() - settings_with("distinguishes", False)
        name = self.path.resolve().name if name == "." else name
        return RunRecord(
            name, settings, file.circuit, evaluations, self.curve(), self.digests, distinguishing,
            self.origin,
        )  # fmt: skip

    def latest(self) -> Checkpoint | None:
        """The last intact checkpoint, or None."""
        return checkpoints.load_latest(self.path / layout.CHECKPOINTS)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint."""
        checkpoints.save_checkpoint(self.path / layout.CHECKPOINTS, checkpoint)

    def snapshots(self) -> Snapshots:
        """The scores at about 50 steps of training; none for a run that did not learn."""
        return Snapshots.load(self.path / layout.SNAPSHOTS, self.graph.num_edges)

    def save_snapshots(self, snapshots: Snapshots) -> None:
        """Write all snapshots."""
        snapshots.save(self.path / layout.SNAPSHOTS)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / layout.METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to one that a crash or a full disk damaged."""
        file, read = self.path / layout.METRICS, []
        with suppress(OSError, ValueError, LookupError, TypeError):
            for line in map(json.loads, file.read_text("utf-8", "replace").splitlines()):
                read.append({**line, "step": int(line["step"])})
        return read

    def truncate_log(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after a step; they will be written again."""
        lines = (json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step)
        write_text(self.path / layout.METRICS, "".join(lines))

    def begin(self, model: CircuitModel, world: World) -> None:
        """Put a new run in its place, or check that a resumed one has the same model and data.

        To be called by all processes when everything is loaded: an earlier run is deleted here.

        Raises ConfigError if, on resuming, the data file or the model has changed.
        """
        place = Path(self.config.run_dir)
        world.on_rank_zero(lambda: self._begin(model, place))
        self.path, self.is_new = place, False

    def _begin(self, model: CircuitModel, place: Path) -> None:
        manifest = _manifest(model, self.data_path)
        if self.is_new:
            if self.config.task.path is None:
                manifest["data"]["path"] = str(place / layout.DATA)
            write_json(self.path / layout.MANIFEST, manifest)
            put_in_place(self.path, place)
            return
        for key, digest in self.digests.items():
            if digest != manifest[key]["sha256"]:
                raise ConfigError(
                    f"cannot resume {place}: the {key} has changed since the run began; restore "
                    "it, or start again with overwrite=true"
                )
        write_text(place / layout.CONFIG, _as_yaml(self.config))


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run."""
    return (path / layout.MANIFEST).is_file() and (path / layout.CONFIG).is_file()


def run_of(path: Path) -> Path | None:
    """The run directory in which a path lies, or None."""
    return next((folder for folder in path.resolve().parents if is_run(folder)), None)


@contextmanager
def claim(config: RunConfig, world: World) -> Iterator[Run]:
    """Lock a run directory for a new run, or for one that is resumed.

    Called by all processes; rank 0 holds the lock, which the kernel releases when the process ends.

    Raises ConfigError if another process holds it, or its content may not be replaced or resumed.
    """
    place = Path(config.run_dir)
    target = Path(os.path.realpath(place))  # a link stays, and what it points to is replaced
    require_utf8(target)
    new = target.with_name(f".{target.name}.new")
    held: list[FileLock] = []

    def prepare() -> None:
        if is_run(place):
            held.append(_lock(place))
            _check_claim(place, config)
            if config.resume == "auto":
                shutil.rmtree(new, ignore_errors=True)  # of a run killed during set-up
                remove_unfinished(place)
                return
        elif place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(f"{place} is neither empty nor a run; choose another run_dir=")
        if Path.cwd().is_relative_to(target):
            raise ConfigError(f"run_dir={place} is the current directory; start from another one")
        new.mkdir(parents=True, exist_ok=True)
        held.append(_lock(new))
        for leftover in (layout.DATA, layout.MANIFEST):  # of a run killed during set-up
            (new / leftover).unlink(missing_ok=True)
        write_text(new / layout.CONFIG, _as_yaml(config))

    try:
        world.on_rank_zero(prepare)
        is_new = world.any(world.is_rank_zero and new.exists())
        yield Run(new if is_new else place, config, is_new=is_new)
    finally:
        for lock in held:
            lock.release()
        if held:
            shutil.rmtree(new, ignore_errors=True)


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / layout.LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another run is using {folder}; wait until it ends, or choose another run_dir="
        ) from None
    return lock


def _check_claim(place: Path, config: RunConfig) -> None:
    """Raise ConfigError unless a run may replace or continue the one in a directory."""
    if config.overwrite:
        settings = flatten(to_dict(config))
        for name in PATHS:
            path = settings.get(name)
            if path and Path(path).resolve().is_relative_to(place.resolve()):
                raise ConfigError(
                    f"{name}={path} would be deleted with the earlier run in {place}; copy it "
                    "elsewhere, or choose another run_dir="
                )
        return
    if config.resume == "never":
        raise ConfigError(
            f"{place} already holds a run; continue it with resume=auto, replace it with "
            "overwrite=true, or choose another run_dir="
        )
    old, new = (flatten(_portable(c)) for c in (Run.open(place).config, config))
    free = settings_with("resumable", True)
    for digest in ("model", "data"):  # compared by `begin`, since they may have been moved
        free |= {key for key in settings_with("digest", digest) if old.get(key) and new.get(key)}
    names = sorted((old.keys() | new.keys()) - free)
    changed = [name for name in names if old.get(name) != new.get(name)]
    if changed:
        listed = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in changed)
        raise ConfigError(
            f"the run in {place} cannot be resumed with other settings ({listed}); use its "
            "settings, another run_dir=, or overwrite=true"
        )


def _portable(config: RunConfig) -> dict[str, Any]:
    """The settings as JSON values, with paths that are valid from any directory."""
    settings = to_dict(config)
    for group, _, name in (path.rpartition(".") for path in PATHS):
        part = settings[group] if group else settings
        if part.get(name) and Path(part[name]).exists():  # not a hub name
            part[name] = str(Path(part[name]).absolute())
    return settings


def _as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(_portable(config), sort_keys=False)


def _manifest(model: CircuitModel, data_path: Path) -> dict[str, Any]:
    """The content of run.json."""
    libraries = ("torch", "transformers")
    machine = {"device": str(model.device), "threads": torch.get_num_threads()}
    return {
        "graph": model.graph.to_dict(),
        "data": {"path": str(data_path), "sha256": file_digest(data_path)},
        "model": {"name": model.name, "sha256": model.fingerprint(), "d_model": model.d_model},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in libraries}},
        "machine": {**machine, "processor": platform.machine()},
    }
