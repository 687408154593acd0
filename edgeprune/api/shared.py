"""What several functions of the API need: models, ablations, a run's prompts, output paths."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.config import (
    AblationConfig,
    InspectConfig,
    LauncherConfig,
    ModelConfig,
    TaskConfig,
)
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.files import file_digest
from edgeprune.formats import CircuitFile, eap
from edgeprune.graph import CircuitGraph
from edgeprune.paths import require_utf8
from edgeprune.prompts import Pair, PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import data_of, first_split, load_pairs, warn_if_none_held_out
from edgeprune.runs.run import run_of
from edgeprune.runs.source import Source, find
from edgeprune.scale.world import World

log = logging.getLogger("edgeprune")


def load_model_of(config: ModelConfig) -> CircuitModel:
    """Load the model that settings name."""
    from edgeprune.models.load import load_model, pick_device  # transformers takes a second

    device = pick_device(config.device)
    fused = config.fused and device.startswith("cuda")
    return load_model(config.path, device=device, fused=fused, **_loaded_with(config))


def named_by(config: InspectConfig) -> tuple[Source | None, ModelConfig, TaskConfig | None]:
    """The source that `run=` names, if any; and model and task: the given ones or else its own."""
    if not config.run:
        return None, config.model, config.task
    source = find(config.run)
    return source, source.model(config.model), source.task(config.task)


def load_named_model(
    source: Source | None, given: ModelConfig | None, device: str | None = None
) -> CircuitModel:
    """Load the given model or else the source's, which should not have changed.

    `device` is where to load it; None: where its settings say.
    """
    config = given or source.model()
    model = load_model_of(replace(config, device=device or config.device))
    if given is None:
        warn_if_changed(model, source.digest("model"))
    return model


def warn_if_changed(model: CircuitModel, digest: str) -> None:
    """Warn if a model is not that of a run or circuit, whose fingerprint is given."""
    if model.fingerprint() != digest:
        log.warning(
            f"{model.name} differs from the model in which the circuit was found, in its weights, "
            "configuration or tokenizer"
        )


def load_meta_model_of(config: ModelConfig) -> CircuitModel:
    """The model that settings name, without weights."""
    from edgeprune.models.load import load_meta_model

    return load_meta_model(config.path, **_loaded_with(config))


def _loaded_with(config: ModelConfig) -> dict[str, Any]:
    """The settings that apply with and without weights."""
    names = ("dtype", "attention", "bits", "embedding_writers", "split_kv_readers",
             "trust_remote_code")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def load_in(world: World, config: ModelConfig, launcher: LauncherConfig) -> CircuitModel:
    """Load the model that settings name in each process, or split it over them if asked."""
    if not launcher.shard:
        return load_model_of(replace(config, device=world.device))
    load = partial(load_model_of, replace(config, device="cpu"))
    return world.shard(load, load_meta_model_of(config), offload=launcher.offload)


def graph_of(source: Source, model: ModelConfig | None) -> CircuitGraph | None:
    """The graph of the given model, or else the one that is known, if any."""
    if model is None:
        return source.graph
    return load_meta_model_of(replace(model, dtype="float32", bits=None, attention="auto")).graph


def read(
    source: Source, graph: CircuitGraph | None, ablation: AblationConfig | None = None
) -> CircuitFile:
    """Read a circuit, to be measured under an ablation if any; warn of what is not the same."""
    file = source.read(graph)
    for note in file.notes:
        log.warning(f"{source.path}: {note}")
    if file.is_eap and ablation is not None and ablation.kind == "zero":
        log.warning(f"{source.path}: {eap.ZERO_ABLATION}")
    return file


def ablation_of(
    model: CircuitModel, config: AblationConfig, pairs: Sequence[Pair], batch_size: int
) -> Ablation:
    """The ablation that settings name, with means over the pairs."""
    return Ablation(
        model, config.kind, pairs, per_position=config.per_position, batch_size=batch_size
    )


def check_output(
    output: Path, reads: Sequence[str | Path | None] = (), *, is_file: bool = True
) -> None:
    """Check before any work that a command may write a file, or a folder unless `is_file`.

    Raises ConfigError if it lies in a run directory, is one of the files that the command reads, or
    is not UTF-8.
    """
    require_utf8(output.absolute())
    file = output if is_file else output / "file"
    is_taken = file.exists() and not file.is_file()
    if is_taken or any(parent.is_file() for parent in file.parents):
        raise ConfigError(
            f"output={output} is a folder where a file is written, or a file where a folder is; "
            "choose another"
        )
    run = run_of(file)
    if run is not None:
        raise ConfigError(
            f"output={output} lies in the run directory {run}, which only its own run writes to; "
            "choose another place"
        )
    for path in reads:
        if path is not None and Path(path).resolve() == output.resolve():
            raise ConfigError(f"output={output} is an input of the command; choose another file")


def own_data(path: Path, digest: str) -> Path:
    """The file of a run's prompts; raises ConfigError if it is gone or its SHA-256 changed."""
    if not path.is_file():
        raise ConfigError(
            f"{path}, which holds the prompts of the run, is gone; restore it, or measure on "
            "others: task=custom task.path=FILE"
        )
    if file_digest(path) != digest:
        raise ConfigError(
            f"{path} has changed since the run began; restore it, or measure its present content "
            f"as other prompts: task=custom task.path={path}"
        )
    return path


class Prompts(NamedTuple):
    """A split of a task's prompts.

    Attributes:
        reference: the training prompts if they were asked for, else `pairs`.
        digest: SHA-256 of the file of all splits.
    """

    pairs: PairDataset
    reference: PairDataset
    digest: str


def load_prompts(
    source: Source | None, given: TaskConfig | None, model: CircuitModel, split: str, *,
    with_training: bool = False,
) -> Prompts:  # fmt: skip
    """Load a split of the given task's prompts, or else of the source's.

    Raises ConfigError if the source's file is gone or has changed.
    """
    task = given if source is None else source.task(given)
    with ExitStack() as stack:
        if given is None and source.run is not None:
            path = source.run.data_path
        else:
            path = stack.enter_context(data_of(task, model.tokenizer))
        if given is None:
            own_data(path, source.digest("data"))
        pairs = reference = load_pairs(path, task, model, split)
        if with_training:
            reference = load_pairs(path, task, model, first_split(path, "train"))
        digest = file_digest(path)
    if source is not None and digest == source.digest("data"):
        warn_if_none_held_out(pairs)
    return Prompts(pairs, reference, digest)


@contextmanager
def optional(path: Path) -> Iterator[None]:
    """Write a picture or page whose failure must neither hide how a run ended nor cost its circuit.

    The failure is reported.
    """
    try:
        yield
    except Exception as error:
        log.warning(f"{path} is not written: {error}")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell paths apart: of the run directory or file, as long as needed."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise ConfigError(f"a path is given twice among {', '.join(map(str, paths))}")
    named = [path.parent if path.name in layout.CHOSEN else path for path in whole]
    for length in range(1, max(len(path.parts) for path in named)):
        labels = [re.sub(r"[^\w.=+-]", "-", "-".join(path.parts[-length:])) for path in named]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}-{number}" for number, label in enumerate(labels, 1)]
