"""Drawing circuits, comparing them, and summarising many runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.api.export import choose_circuit
from edgeprune.api.shared import check_output, graph_of, read
from edgeprune.circuit import Circuit
from edgeprune.config import CompareConfig, DrawConfig, ReportConfig
from edgeprune.drawing import SUFFIXES, comparison_groups, draw_circuit
from edgeprune.errors import CircuitError, ConfigError, GraphvizMissing
from edgeprune.evaluation import compare as comparison
from edgeprune.evaluation.report import Group, RunRecord, group_runs, write_report
from edgeprune.files import replace_folder, write_json
from edgeprune.formats import write_circuit
from edgeprune.runs import layout
from edgeprune.runs.run import Run, is_run
from edgeprune.runs.source import Source, find

log = logging.getLogger("edgeprune")


@dataclass(frozen=True)
class Drawn:
    """A drawing: the edges shown, how many dangling ones are left out, and its files."""

    circuit: Circuit
    num_dangling: int
    paths: list[Path]


def draw(config: DrawConfig) -> Drawn:
    """Draw a circuit with Graphviz.

    Raises:
        ConfigError: an unknown format, or an output in a run directory.
        GraphvizMissing: `dot` is not installed.
    """
    check_formats(config.formats)
    stem = None if config.output is None else _stem(config.output)
    from_scores = (config.checkpoint, config.sparsity, config.num_edges) != (None, None, None)
    folder = Path(config.circuit)
    if is_run(folder) and (from_scores or not (folder / layout.CIRCUIT).exists()):
        run = Run.open(folder)
        _, circuit, _ = choose_circuit(run, config.checkpoint, config.sparsity, config.num_edges)
        own, title = folder / layout.DRAWING, run.config.title
    elif from_scores:
        raise ConfigError("checkpoint=, sparsity= and num_edges= need a run directory")
    else:
        source = find(config.circuit)
        circuit = read(source, graph_of(source, config.model)).circuit
        is_chosen = source.path.name in (layout.CIRCUIT, layout.EDGES)
        own = source.path.with_name(layout.DRAWING if is_chosen else source.path.stem)
        title = source.title
    shown = circuit if config.dangling else circuit.without_dangling()
    stem = stem or own
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in config.formats]
    for path in paths:
        draw_circuit(shown, path, title=title if config.title is None else config.title)
    return Drawn(shown, len(circuit) - len(shown), paths)


def check_formats(formats: Sequence[str]) -> None:
    """Raise ConfigError unless all are formats of drawings."""
    unknown = [suffix for suffix in formats if suffix not in SUFFIXES]
    if unknown:
        raise ConfigError(f"formats has {unknown[0]!r}; choose from {', '.join(SUFFIXES)}")


def _stem(output: str) -> Path:
    """The path of a drawing without its suffix."""
    path = Path(output)
    if output.endswith("/"):
        path /= layout.DRAWING
    if path.suffix.removeprefix(".") in SUFFIXES:
        path = path.with_suffix("")
    if path.name in ("", ".."):
        raise ConfigError(f"output={output} has no file name; give one, such as pictures/circuit")
    check_output(path)
    return path


# --------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Compared:
    """A comparison: `evaluation.compare.compare`'s result and what was written."""

    result: Mapping[str, Any]
    folder: Path
    parts: list[str]


def compare(config: CompareConfig) -> Compared:
    """Compare circuits, write the parts that they share and draw them.

    Raises:
        ConfigError: fewer than two circuits, one given twice, or of different graphs.
    """
    check_formats(config.formats)
    sources = [find(name) for name in config.circuits]
    reference = None
    if config.reference is not None:
        known = find(config.reference)
        if known.path.resolve() not in [source.path.resolve() for source in sources]:
            sources.append(known)
        reference = [s.path.resolve() for s in sources].index(known.path.resolve())
    if len(sources) < 2:
        raise ConfigError(
            f"got {len(sources)} circuit, expected two or more: edgeprune compare PATH PATH ..., "
            "or one and reference=PATH"
        )
    folder = Path(config.output)
    check_output(folder)
    for source in sources:
        if source.path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{source.path} lies in output={folder}, which is replaced")
    labels = labels_of([source.path for source in sources])
    circuits = dict(zip(labels, _read_all(sources, config), strict=True))
    result = comparison.compare(circuits, None if reference is None else labels[reference])
    for label, source in zip(labels, sources, strict=True):
        result["circuits"][label] = {"path": str(source.path), **result["circuits"][label]}
    parts = comparison.parts(circuits)
    origin = _origin_of_all(sources)
    title = ", ".join(dict.fromkeys(filter(None, (source.title for source in sources))))
    with replace_folder(folder, ".edgeprune-compare") as new:
        for name, part in parts.items():
            chosen = {**origin, "chosen_by": f"{name} of {', '.join(labels)}"}
            write_circuit(part, new / name / layout.EDGES, "edges")
            write_circuit(part, new / name / layout.CIRCUIT, "circuit", origin=chosen)
        write_json(new / "comparison.json", result)
        _draw_comparison(circuits, new, config.formats, title)
    return Compared(result, folder, list(parts))


def _read_all(sources: Sequence[Source], config: CompareConfig) -> list[Circuit]:
    """The circuits, all of one graph: the first that is known, which must be everybody's."""
    known = [graph_of(source, config.model) for source in sources]
    graph = next((graph for graph in known if graph is not None), None)
    circuits = []
    for source, own in zip(sources, known, strict=True):
        circuits.append(read(source, own or graph).circuit)
        if circuits[-1].graph != circuits[0].graph:
            raise CircuitError(
                f"circuits of different graphs cannot be compared: {sources[0].path} has "
                f"{circuits[0].graph}, {source.path} has {circuits[-1].graph}"
            )
    return circuits


def _origin_of_all(sources: Sequence[Source]) -> dict[str, Any]:
    """Model, data and ablation of circuits that agree in model and data, else nothing."""

    def digests(source: Source) -> list[Any]:
        return [source.origin.get(part, {}).get("sha256") for part in ("model", "data")]

    first = sources[0]
    if None in digests(first) or any(digests(source) != digests(first) for source in sources):
        return {}
    shared = ("model", "data", "ablation", "evaluation_batch_size")
    return {key: first.origin[key] for key in shared if key in first.origin}


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell paths apart: of the run directory or file, as long as needed.

    Raises:
        ConfigError: a path is given twice.
    """
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise ConfigError(f"{path} is given twice; give different circuits")
    chosen = (layout.EDGES, layout.CIRCUIT)
    named = [path.parent if path.name in chosen else path for path in whole]
    for length in range(1, max(len(path.parts) for path in named)):
        labels = [re.sub(r"[^\w.=+-]", "-", "-".join(path.parts[-length:])) for path in named]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}-{number}" for number, label in enumerate(labels, 1)]


def _draw_comparison(
    circuits: Mapping[str, Circuit], folder: Path, formats: Sequence[str], title: str
) -> None:
    """The connected edges of each circuit, coloured by the circuits in which they are connected."""
    connected = {name: circuit.without_dangling() for name, circuit in circuits.items()}
    groups = comparison_groups({name: c.edge_set for name, c in connected.items()})
    shown = comparison.parts(connected)["union"]
    for suffix in formats:
        try:
            draw_circuit(shown, folder / f"comparison.{suffix}", title=title, groups=groups)
        except GraphvizMissing as error:
            log.warning(str(error))
            return


# ---------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Reported:
    """A report: the groups of runs, how many runs, and what was written."""

    groups: list[Group]
    num_runs: int
    folder: Path


def report(config: ReportConfig) -> Reported:
    """Summarise all runs below a folder: frontiers, and stability over seeds.

    Raises:
        ConfigError: there are none, or the output holds something else than a report.
    """
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}; give one with run directories in it")
    default = folder.with_name(f"{folder.resolve().name}-report") if is_run(folder) else (
        folder / layout.REPORT)  # fmt: skip
    output = Path(config.output) if config.output else default
    check_output(output)
    records = [record for path in _run_dirs(folder) if (record := _record(path, folder))]
    if not records:
        raise ConfigError(
            f"no finished run below {folder}; make some, for instance with `edgeprune prune "
            "experiment=ioi sparsity=0.9,0.95,0.98 seed=0,1,2 --multirun`"
        )
    groups = group_runs(records, config.split.name if config.split else None)
    title = f"edgeprune: {len(records)} runs in {folder.resolve().name}"
    with replace_folder(output, ".edgeprune-report") as new:
        write_report(groups, new, title=title)
    return Reported(groups, len(records), output)


def _run_dirs(folder: Path) -> list[Path]:
    found = (manifest.parent for manifest in folder.rglob(layout.MANIFEST))
    return sorted(path for path in found if is_run(path) and not path.name.startswith("."))


def _record(path: Path, folder: Path) -> RunRecord | None:
    """What a report needs of a run; None, with a warning, for an unfinished or damaged one."""
    try:
        run = Run.open(path)
        return run.record("" if path == folder else str(path.relative_to(folder)))
    except (ConfigError, CircuitError) as error:
        log.warning(f"{path} is left out: {error}")
        return None
