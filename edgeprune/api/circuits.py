"""Drawing circuits, comparing them, summarising many runs, and preparing prompts."""

import logging
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.api.export import Measuring, choose_from
from edgeprune.api.page import page_of_runs
from edgeprune.api.shared import check_output, graph_of, labels_of, read
from edgeprune.circuit import Circuit
from edgeprune.config import (
    DRAWINGS,
    CompareConfig,
    DrawConfig,
    PrepareConfig,
    ReportConfig,
    given_size,
)
from edgeprune.drawing import comparison_groups, draw_circuit
from edgeprune.errors import CircuitError, ConfigError, GraphvizMissing, UserError
from edgeprune.evaluation import compare as comparison
from edgeprune.evaluation.report import (
    Group,
    RunRecord,
    file_names,
    group_runs,
    page_name,
    write_report,
)
from edgeprune.evaluation.specificity import Specificity
from edgeprune.files import read_if_intact, replace_folder, write_json
from edgeprune.formats import write_circuit
from edgeprune.prompts import mib
from edgeprune.prompts.tasks import generate_records
from edgeprune.runs import layout
from edgeprune.runs.data import write_records
from edgeprune.runs.run import Run, is_run
from edgeprune.runs.source import Source, find, head_labels

log = logging.getLogger("edgeprune")


class Drawn(NamedTuple):
    """The circuit shown, the number of dangling edges left out, and the files."""

    circuit: Circuit
    num_dangling: int
    paths: list[Path]


def draw(config: DrawConfig) -> Drawn:
    """Draw a circuit with Graphviz; raises GraphvizMissing without `dot`, writing its source."""
    output = None if config.output is None else _drawing_stem(config)
    from_scores = (config.checkpoint, config.sparsity, config.num_edges) != (None, None, None)
    folder = Path(config.circuit)
    if is_run(folder) and (from_scores or not (folder / layout.CIRCUIT).exists()):
        run = Run.open(folder)
        choice = given_size(config) or run.config.choice
        measuring = cache(lambda: Measuring.of(run))
        _, circuit, _ = choose_from(run, choice, config.checkpoint, measuring)
        stem, title = folder / layout.DRAWING, run.config.title
        labels = head_labels(folder)
    elif from_scores:
        raise ConfigError("checkpoint=, sparsity= and num_edges= need a run directory")
    else:
        source = find(config.circuit)
        labels = head_labels(source.path.parent)
        circuit = read(source, graph_of(source, config.model)).circuit
        stem = source.path.with_name(layout.DRAWING if source.is_chosen else source.path.stem)
        title = source.title
    stem = output or stem
    shown = circuit if config.dangling else circuit.without_dangling()
    paths = _drawings(stem, config)
    for path in paths:
        draw_circuit(
            shown, path, title=title if config.title is None else config.title, kinds=labels
        )
    return Drawn(shown, len(circuit) - len(shown), paths)


def _drawing_stem(config: DrawConfig) -> Path:
    """The path without a suffix that `output=` names; raises ConfigError if it may not be used."""
    output = config.output
    stem = Path(output) / (layout.DRAWING if output.endswith("/") else "")
    stem = stem.with_suffix("") if stem.suffix.removeprefix(".") in DRAWINGS else stem
    if stem.name in ("", ".."):
        raise ConfigError(f"output={output} has no file name, such as pictures/circuit")
    for path in _drawings(stem, config):
        check_output(path)
    return stem


def _drawings(stem: Path, config: DrawConfig) -> list[Path]:
    return [stem.with_name(f"{stem.name}.{suffix}") for suffix in config.formats]


def compare(config: CompareConfig) -> tuple[dict[str, Any], list[str]]:
    """Compare circuits, write the parts that they share and draw them.

    Returns the result of `evaluation.compare.compare`, and the names of the parts.
    """
    sources, reference = _find_all(config)
    folder = Path(config.output)
    check_output(folder, is_file=False)
    for source in sources:
        if source.path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{source.path} lies in output={folder}, which is replaced")
    labels = labels_of([source.path for source in sources])
    circuits = dict(zip(labels, _read_all(sources, config), strict=True))
    result = comparison.compare(circuits, None if reference is None else labels[reference])
    for label, source in zip(labels, sources, strict=True):
        result["circuits"][label] = {"path": str(source.path), **result["circuits"][label]}
    kinds = next(filter(None, (head_labels(source.path.parent) for source in sources)), {})
    if kinds:
        result["kinds_of_heads"] = comparison.kinds_of_heads(kinds, circuits)
    parts = comparison.parts(circuits)
    origin = _shared_origin(sources)
    title = ", ".join(dict.fromkeys(filter(None, (source.title for source in sources))))
    with replace_folder(folder, ".edgeprune-compare") as new:
        for name, part in parts.items():
            chosen = {**origin, "chosen_by": f"{name} of {', '.join(labels)}"}
            write_circuit(part, new / name / layout.EDGES)
            write_circuit(part, new / name / layout.CIRCUIT, "circuit", origin=chosen)
        write_json(new / "comparison.json", result)
        _draw_comparison(circuits, new, config.formats, title)
    return result, list(parts)


def _find_all(config: CompareConfig) -> tuple[list[Source], int | None]:
    """The circuits to compare, and the place of the reference among them, if there is one."""
    sources, reference = [find(name) for name in config.circuits], None
    if config.reference is not None:
        known = find(config.reference)
        paths = [source.path.resolve() for source in sources]
        if known.path.resolve() not in paths:
            sources.append(known)
        reference = [*paths, known.path.resolve()].index(known.path.resolve())
    if len(sources) < 2:
        raise ConfigError(
            f"got {len(sources)} circuit, expected two or more: edgeprune compare PATH PATH ..., "
            "or one and reference=PATH"
        )
    return sources, reference


def _read_all(sources: Sequence[Source], config: CompareConfig) -> list[Circuit]:
    """The circuits; a file that does not identify its graph has that of the first that does."""
    known = [graph_of(source, config.model) for source in sources]
    graph = next((graph for graph in known if graph is not None), None)
    circuits = [read(s, own or graph).circuit for s, own in zip(sources, known, strict=True)]
    for source, circuit in zip(sources, circuits, strict=True):
        if circuit.graph != circuits[0].graph:
            raise CircuitError(
                f"circuits of different graphs cannot be compared: {sources[0].path} has "
                f"{circuits[0].graph}, {source.path} has {circuit.graph}"
            )
    return circuits


def _shared_origin(sources: Sequence[Source]) -> dict[str, Any]:
    """Model, data and ablation of circuits that agree in model and data, else nothing."""
    digests = {(source.digest("model"), source.digest("data")) for source in sources}
    if len(digests) > 1 or None in next(iter(digests)):
        return {}
    shared = ("model", "data", "ablation", "evaluation_batch_size")
    return {key: sources[0].origin[key] for key in shared if key in sources[0].origin}


def _draw_comparison(
    circuits: Mapping[str, Circuit], folder: Path, formats: Sequence[str], title: str
) -> None:
    """The connected edges of each circuit, coloured by the circuits in which they are connected."""
    connected = {name: circuit.without_dangling() for name, circuit in circuits.items()}
    groups = comparison_groups({name: c.edge_set for name, c in connected.items()})
    shown = comparison.parts(connected)["union"]
    try:
        for suffix in formats:
            draw_circuit(shown, folder / f"comparison.{suffix}", title=title, groups=groups)
    except GraphvizMissing as error:
        log.warning(str(error))


def report(config: ReportConfig) -> tuple[list[Group], Path]:
    """Summarise all runs below a folder; returns the groups of runs and the folder written."""
    folder = Path(config.folder)
    output = Path(config.output) if config.output else folder / layout.REPORT
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}; give one with run directories in it")
    if config.output:
        check_output(output, is_file=False)
    names = sorted(file.parent.relative_to(folder) for file in folder.rglob(layout.MANIFEST))
    records = [
        record for name in names
        if not any(part.startswith(".") for part in name.parts)  # being set up or replaced
        and is_run(folder / name) and (record := _record(folder / name, str(name)))
    ]  # fmt: skip
    if not records:
        raise ConfigError(
            f"no finished run below {folder}; make some, for instance with `edgeprune prune "
            "experiment=ioi seed=0,1,2 --multirun`"
        )
    groups = group_runs(records, config.split)
    specificities = _specificities(folder, {record.circuit.digest() for record in records})
    with replace_folder(output, ".edgeprune-report") as new:
        title = f"edgeprune: {len(records)} runs in {folder.resolve().name}"
        _write_pages(groups, new)
        write_report(groups, new, title, specificities)
    return groups, output


def _specificities(folder: Path, circuits: Set[str]) -> dict[str, Specificity]:
    """What `edgeprune test` found of several runs together, if their circuits are still these."""
    found = {}
    for path in sorted(folder.rglob(layout.TESTS)):
        several = read_if_intact(path, _of_several, "run edgeprune test again")
        if several is not None:
            model, digests, specificity = several
            if digests <= circuits:
                found[f"circuits in {model} ({path.parent.name})"] = specificity
            else:
                log.warning(f"{path} is left out: it is not of these runs' circuits; test again")
    return found


def _of_several(record: Mapping[str, Any]) -> tuple[str, set[str], Specificity] | None:
    """Model, digests of the circuits, and what was found; None for a test of a single circuit."""
    if "cells" not in record:
        return None
    measured = [*record["circuits"].values()]
    digests = {each["edges_sha256"] for each in measured}
    return measured[0]["model"], digests, Specificity.from_dict(record)


def _write_pages(groups: Sequence[Group], folder: Path) -> None:
    """Write a page per group to look into its runs; none for a group with damaged scores."""
    for group, name in zip(groups, file_names(groups), strict=True):
        paths = [run.origin["run"] for point in group.points for run in point.runs]
        try:
            page_of_runs([Run.open(path) for path in paths], group.title).save(
                folder / page_name(name)
            )
        except UserError as error:
            log.warning(f"there is no page of {group.title}: {error}")


def _record(path: Path, name: str) -> RunRecord | None:
    """What a report needs of a run; None, with a warning, for an unfinished or damaged one."""
    try:
        return Run.open(path).record(name)
    except (ConfigError, CircuitError) as error:
        log.warning(f"{path} is left out: {error}")
        return None


def prepare(config: PrepareConfig) -> int:
    """Write a task's prompts for a model's tokenizer; returns the number of lines."""
    from edgeprune.models.load import load_tokenizer

    output, task = Path(config.output), config.task
    check_output(output, [config.model.path, task.path])
    if config.counterfactual and task.path is None:
        raise ConfigError(
            f"counterfactual={config.counterfactual} is for rows of the MIB benchmark; give their "
            "file or folder as task.path="
        )
    rows = None if task.path is None else mib.read_rows(task.path)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    if rows is None:
        records = generate_records(task.name, tokenizer, task.sizes, task.seed)
    else:
        records = mib.make_records(rows, tokenizer, task.sizes, config.counterfactual)
    write_records(records, output)
    return len(records)
