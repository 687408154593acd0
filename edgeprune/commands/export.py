"""`edgeprune export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.commands.shared import (
    OUT,
    check_output,
    check_own_data,
    circuit_of,
    export_from,
    find_circuit,
    known_graph,
    load_model,
    load_pairs,
    own_data,
    run_settings,
    say,
    show,
    write_origin,
)
from edgeprune.config import (
    CircuitFormat,
    ExportConfig,
    check_cleanup,
    check_num_edges,
    check_size,
    edges_left,
    evaluation_batch_size,
)
from edgeprune.errors import ConfigError
from edgeprune.files import file_digest, write_json

if TYPE_CHECKING:
    from edgeprune.evaluation.cleanup import CleanUp
    from edgeprune.evaluation.export import Export
    from edgeprune.formats.eap import CircuitFile
    from edgeprune.models import CircuitModel


def export(config: ExportConfig, model: CircuitModel | None = None) -> None:
    """Make a circuit of a run's checkpoint, or read one from a file, and write it."""
    check_size(config.sparsity, config.num_edges)
    if config.threshold and (config.sparsity, config.num_edges) != (None, None):
        raise ConfigError("threshold=true finds the size itself; leave out sparsity= or num_edges=")
    check_cleanup(config.cleanup)
    from edgeprune.runs.run import (
        CIRCUIT_NOTE,
        EDGES,
        GRAPH_JSON,
        GRAPH_PT,
        load_masks,
    )

    if Path(config.run).is_file():
        _convert(config)
        return
    run_dir, format = Path(config.run), _format(config)
    names = {"edges": EDGES, "eap_json": GRAPH_JSON, "eap_pt": GRAPH_PT}
    output = Path(config.output) if config.output else run_dir / names[format]
    _check_no_runs(output, run_dir)
    check_output(output, may_be=(EDGES,))
    chosen, step = export_from(
        run_dir, config.checkpoint, config.sparsity, config.num_edges, config.threshold
    )
    cleaned = None
    if config.cleanup is not None:
        cleaned = _clean_up(run_dir, chosen, config.cleanup, model)
        chosen = replace(chosen, circuit=cleaned.circuit)
    if format == "edges":
        chosen.circuit.save(output)
        if output.parent.resolve() != run_dir.resolve():
            write_origin(output, chosen.circuit.graph, run_dir)
    else:
        scores = load_masks(run_dir, step)[0].scores()
        chosen.circuit.save(output, format, scores=scores, d_model=_d_model(run_dir))
    report = {"checkpoint": step, **chosen.to_dict()}
    if cleaned is not None:
        report["cleanup"] = {"tolerance": config.cleanup, **cleaned.to_dict()}
    if output.resolve() == (run_dir / EDGES).resolve():
        write_json(run_dir / CIRCUIT_NOTE, report)
    connected = report["without_dangling"]
    threshold = report["edge_threshold"]
    how = "exactly as asked" if threshold is None else f"at threshold {threshold:.4f}"
    if cleaned is not None:
        how = (
            f"cleaned up from {cleaned.num_edges_before:,} ({how}; distance from the full model "
            f"{cleaned.distance_before:.3g} before, {cleaned.distance_after:.3g} after)"
        )
    show(
        f"circuit of step {step}: {report['num_edges']:,} of {report['all_edges']:,} edges "
        f"({report['sparsity']:.2%} sparse), {how}; without dangling edges "
        f"{connected['num_edges']:,} edges, {connected['num_nodes']} nodes -> {output}"
    )


def _clean_up(
    run_dir: Path, chosen: Export, tolerance: float, model: CircuitModel | None
) -> CleanUp:
    """On the run's own training prompts, under its own ablation."""
    from edgeprune.engine.ablation import Ablation
    from edgeprune.evaluation.cleanup import clean_up

    of_run = run_settings(run_dir)
    if model is None:
        model = load_model(of_run["model"])
    task = of_run["task"]
    data_path = own_data(task, run_dir)
    pairs = load_pairs(data_path, task, model, "train")
    check_own_data(run_dir, file_digest(data_path), data_path)
    batch_size = evaluation_batch_size(of_run["trainer"])
    with OUT.status(f"cleaning up {len(chosen.circuit):,} edges"):
        return clean_up(
            model,
            chosen.circuit,
            pairs,
            tolerance=tolerance,
            ranking=chosen.ranking,
            ablation=Ablation(model, of_run["ablation"], pairs, batch_size),
            batch_size=batch_size,
        )


def _format(config: ExportConfig) -> str:
    if config.format is not None:
        return config.format.name
    is_pt = config.output is not None and config.output.endswith(".pt")
    return (CircuitFormat.eap_pt if is_pt else CircuitFormat.edges).name


def _convert(config: ExportConfig) -> None:
    """From a circuit's file to another; of a graph file with scores, also another size."""
    from edgeprune.formats.eap import read_circuit_file

    path, run_dir = find_circuit(config.run)
    if (config.checkpoint, config.cleanup) != (None, None) or config.threshold:
        raise ConfigError("checkpoint=, threshold= and cleanup= need a run directory")
    if config.output is None:
        raise ConfigError(f"where shall the circuit of {path} be written? Give output=FILE")
    format, output = _format(config), Path(config.output)
    _check_no_runs(output, None)
    check_output(output, reads=[path])
    file = read_circuit_file(path, known_graph(path, run_dir))
    if format != "edges" and file.graph is None:
        raise ConfigError(
            f"{path} does not say which model it is of, but a graph holds all of its edges; export "
            f"the run itself (edgeprune export RUN format={format} output=FILE), or from Python "
            f"Circuit.load(FILE, edgeprune.load_model(NAME).graph).save(FILE, {format!r})"
        )
    if (config.sparsity, config.num_edges) != (None, None):
        file = _choose(path, file, config)
    circuit = circuit_of(path, file)
    d_model = file.d_model or (_d_model(run_dir) if run_dir else None)
    circuit.save(output, format, scores=file.scores, d_model=d_model)
    if format == "edges" and file.sure:
        write_origin(output, circuit.graph, run_dir)
    show(f"{len(circuit):,} of {circuit.graph.num_edges:,} edges of {path} -> {output}")
    if format != "edges" and file.scores is None:
        say("scores are 1 for kept edges, else 0; `edgeprune export RUN` has the learned ones")


def _d_model(run_dir: Path) -> int | None:
    """Width of a run's model, where its run.json has it."""
    from edgeprune.runs.run import read_manifest

    model = read_manifest(run_dir).get("model")
    return model.get("d_model") if isinstance(model, dict) else None


def _check_no_runs(output: Path, own: Path | None) -> None:
    """Raises ConfigError where a run's circuit would be replaced by one that is not its own."""
    from edgeprune.runs.run import EDGES, has_run

    real = output.resolve()
    is_own = own is not None and real.parent == own.resolve()
    if real.name == EDGES and has_run(real.parent) and not is_own:
        raise ConfigError(
            f"{output} is the circuit of a run, whose circuit.json says how it was chosen; give "
            f"another output=, or export the run itself: edgeprune export {real.parent}"
        )


def _choose(path: Path, file: CircuitFile, config: ExportConfig) -> CircuitFile:
    """The file with the edges of the largest scores, as many as asked for."""
    if file.scores is None:
        raise ConfigError(
            f"{path} has no score for every edge, by which sparsity= and num_edges= choose; give a "
            "run directory, or a graph of EAP-IG or MIB with scores"
        )
    num_edges, all_edges = config.num_edges, file.graph.num_edges
    if num_edges is None:
        num_edges = edges_left(config.sparsity, all_edges)
    check_num_edges(num_edges, all_edges)
    return replace(file, edges=file.largest(num_edges), notes=())
