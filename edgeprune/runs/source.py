"""Which run, model, data and ablation a circuit that the user names belongs to."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.config import AblationConfig, ModelConfig, TaskConfig, from_dict, to_dict
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import CircuitError, ConfigError
from edgeprune.files import read_if_intact
from edgeprune.formats import CircuitFile, read_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.runs import layout
from edgeprune.runs.run import Run, is_run

EXAMPLES = {
    "model": "model=embedded, or model.path=... with a folder or a hub name",
    "data": "task=ioi, or task.path=... with a file",
}


@dataclass(frozen=True)
class Source:
    """A circuit file and what identifies it.

    Attributes:
        path: the file.
        run: the run in whose directory it lies, if any.
        graph: its graph, where the run or a circuit.json next to it knows it.
        origin: what it belongs to, as `Run.origin` has it; empty where nothing identifies it.
    """

    path: Path
    run: Run | None
    graph: CircuitGraph | None
    origin: dict[str, Any]

    def read(self, graph: CircuitGraph | None = None) -> CircuitFile:
        """Read the file; `graph` is the model's, None: the one that is known."""
        return read_circuit(self.path, graph or self.graph)

    def digest(self, part: str) -> str | None:
        """SHA-256 of the `model` or the `data` it belongs to."""
        return self.origin.get(part, {}).get("sha256")

    def model(self, given: ModelConfig | None = None) -> ModelConfig:
        """The given settings, or those of the model in which the circuit was found."""
        return given or self._settings("model", ModelConfig)

    def task(self, given: TaskConfig | None = None) -> TaskConfig:
        """The given settings, or those of the task on which the circuit was found."""
        if given is not None:
            return given
        task = self._settings("data", TaskConfig)
        path = self.origin["data"].get("path")
        if self.run is None and path and Path(path).is_file():
            task.path = path  # what a run generated
        return task

    def ablation(self, given: AblationConfig | None = None) -> AblationConfig:
        """The given settings, or those with which the circuit was found, or interchange."""
        return given or from_dict(AblationConfig, self.origin.get("ablation") or {})

    def is_of(
        self, model: CircuitModel, data_digest: str, ablation: AblationConfig | None = None
    ) -> bool:
        """Whether a model, the file of prompts of this SHA-256 and an ablation, if any, are its."""
        is_own_ablation = ablation is None or to_dict(ablation) == self.origin.get("ablation")
        digests = model.fingerprint(), data_digest
        return is_own_ablation and digests == (self.digest("model"), self.digest("data"))

    @property
    def is_chosen(self) -> bool:
        """Whether it is a chosen circuit, of a run or in a folder of its own."""
        return self.path.name in layout.CHOSEN

    @property
    def title(self) -> str | None:
        """Task and model for people, such as 'ioi in embedded'; None where unknown."""
        if not {"model", "data"} <= self.origin.keys():
            return None
        return f"{self._settings('data', TaskConfig).title} in {self.model().title}"

    def _settings(self, part: str, schema: type) -> Any:
        if "settings" not in self.origin.get(part, {}):
            raise ConfigError(
                f"nothing next to {self.path} identifies its {part}; give {EXAMPLES[part]}"
            )
        return from_dict(schema, self.origin[part]["settings"])


def find(given: str | Path) -> Source:
    """Find a circuit by a run directory, a folder with a circuit.json, or a file."""
    path = Path(given)
    if not path.exists():
        raise ConfigError(
            f"no such file or directory: {path}; give a run directory, an edges.json, a "
            "circuit.json, or a graph of EAP-IG or MIB"
        )
    if path.is_dir():
        names = [n for n in layout.CHOSEN if (path / n).is_file()]
        path = path / names[0] if names else Run.open(path).circuit_path
    run = Run.open(path.parent) if is_run(path.parent) else None
    origin, graph = (run.origin, run.graph) if run else ({}, None)
    note = path.with_name(layout.CIRCUIT)
    if path.name in layout.CHOSEN and note.is_file():
        found = read_circuit(note)
        origin, graph = {**origin, **found.origin}, found.circuit.graph
    elif run is None:
        with suppress(CircuitError):  # unless it does not describe itself
            file = read_circuit(path)
            origin, graph = file.origin, file.circuit.graph
    return Source(path, run, graph, origin)


def head_labels(folder: Path) -> dict[str, list[str]]:
    """The kinds of heads, by head, that `edgeprune heads` found; empty if it wrote nothing."""
    path = folder / layout.HEADS
    found = read_if_intact(path, lambda record: dict(record["labels"]), "run edgeprune heads again")
    return found or {}


def load_circuit(path: Path | str, graph: CircuitGraph | None = None) -> Circuit:
    """Read a circuit from a run directory or a file of any format.

    Args:
        path: a run directory, edges.json, circuit.json, or a graph of EAP-IG or MIB.
        graph: `model.graph`, for a file that nothing next to it identifies.

    Raises CircuitError if the file is damaged, of another graph, or of an unknown one.
    """
    return find(path).read(graph).circuit
