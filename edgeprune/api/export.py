"""Choosing a circuit from scores, and writing it in another format."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.api.shared import ablation_of, check_output, graph_of, load_model_of, own_data, read
from edgeprune.circuit import Circuit
from edgeprune.config import ExportConfig
from edgeprune.errors import ConfigError
from edgeprune.evaluation.cleanup import CleanUp, clean_up
from edgeprune.formats import write_circuit
from edgeprune.methods.paper import circuit_by_threshold
from edgeprune.runs import layout
from edgeprune.runs.data import load_pairs
from edgeprune.runs.run import Run
from edgeprune.runs.source import find
from edgeprune.scores import EdgeScores

log = logging.getLogger("edgeprune")


class Exported(NamedTuple):
    """A circuit that was written, the file, and how the circuit was chosen, as JSON values."""

    circuit: Circuit
    output: Path
    origin: Mapping[str, Any]


def export(config: ExportConfig) -> Exported:
    """Choose a circuit from a run's scores, or convert a circuit file.

    Raises ConfigError if the size is out of range, or the output lies in a run directory.
    """
    form = config.format or ("eap_pt" if (config.output or "").endswith(".pt") else "edges")
    if Path(config.run).is_file():
        return _convert(config, form)
    run = Run.open(config.run)
    if config.output is not None:
        check_output(Path(config.output))
    scores, circuit, chosen = choose_from(
        run, config.checkpoint, config.sparsity, config.num_edges, config.threshold
    )
    if config.cleanup is not None:
        cleaned = _clean_up(run, circuit, scores, config.cleanup)
        circuit, chosen = cleaned_up(cleaned, chosen, config.cleanup)
    origin = {"scores": dict(scores.origin), **chosen}
    if config.output is None and form in ("edges", "circuit"):
        run.write_circuit(circuit, origin)
        return Exported(circuit, run.path / layout.EDGES, origin)
    graphs = {"eap_json": layout.GRAPH_JSON, "eap_pt": layout.GRAPH_PT}
    output = Path(config.output) if config.output else run.path / graphs[form]
    d_model, belongs_to = run.manifest["model"].get("d_model"), {**run.origin, **origin}
    write_circuit(circuit, output, form, scores=scores, d_model=d_model, origin=belongs_to)
    return Exported(circuit, output, origin)


def choose_from(
    run: Run,
    step: int | None = None,
    sparsity: float | None = None,
    num_edges: int | None = None,
    threshold: bool = False,
) -> tuple[EdgeScores, Circuit, dict[str, Any]]:
    """A run's scores, a circuit cut from them, and how it was chosen.

    Without a step, of the last checkpoint. Without a size, of the size that the run asked for, or
    with `threshold` by a threshold.
    """
    scores = run.scores(step)
    if step is None and run.is_unfinished(scores.origin):
        log.warning(
            f"the run in {run.path} has done {scores.origin['step']:,} of "
            f"{run.config.trainer.steps:,} steps; continue it with its command and resume=auto"
        )
    if sparsity is None and num_edges is None and not threshold:
        sparsity, num_edges = run.config.sparsity, run.config.num_edges
    by_size = (sparsity, num_edges) != (None, None)
    state = {} if by_size else run.checkpoint(scores.origin.get("step")).state
    return scores, *choose(scores, state, sparsity, num_edges)


def choose(
    scores: EdgeScores, state: Mapping[str, Any], sparsity: float | None, num_edges: int | None
) -> tuple[Circuit, dict[str, Any]]:
    """A circuit of a size, or without one by a threshold on the state; and how it was chosen."""
    if (sparsity, num_edges) != (None, None):
        return scores.circuit(sparsity=sparsity, num_edges=num_edges), {"chosen_by": "size"}
    circuit, thresholds = circuit_by_threshold(scores.graph, state)
    found = {"edge_threshold": thresholds["edge"], "node_threshold": thresholds.get("node")}
    return circuit, {"chosen_by": "threshold", **found}


def cleaned_up(
    cleaned: CleanUp, chosen: dict[str, Any], tolerance: float
) -> tuple[Circuit, dict[str, Any]]:
    """A cleaned circuit, and how it was chosen."""
    return cleaned.circuit, {**chosen, "cleanup": {"tolerance": tolerance, **cleaned.to_dict()}}


def _clean_up(run: Run, circuit: Circuit, scores: EdgeScores, tolerance: float) -> CleanUp:
    """Clean up on the run's own training prompts, with its own ablation."""
    model, config = load_model_of(run.config.model), run.config
    path = own_data(run.data_path, run.digests["data"])
    pairs = load_pairs(path, config.task, model, "train")
    ablation = ablation_of(model, config.ablation, pairs, config.evaluation_batch_size)
    return clean_up(
        model, circuit, pairs, tolerance=tolerance, scores=scores, ablation=ablation,
        batch_size=config.evaluation_batch_size,
    )  # fmt: skip


def _convert(config: ExportConfig, form: str) -> Exported:
    """From one circuit file to another; from scores in it, also to another size."""
    if (config.checkpoint, config.cleanup, config.threshold) != (None, None, False):
        raise ConfigError("checkpoint=, threshold= and cleanup= need a run directory")
    if config.output is None:
        raise ConfigError(f"say where to write the circuit of {config.run}: output=FILE")
    source, output = find(config.run), Path(config.output)
    check_output(output, reads=[source.path])
    file = read(source, graph_of(source, config.model))
    circuit = file.circuit
    if (config.sparsity, config.num_edges) != (None, None):
        if file.scores is None:
            raise ConfigError(
                f"{source.path} does not have a score for every edge, which sparsity= and "
                "num_edges= need; give a run directory, or a graph of EAP-IG or MIB with scores"
            )
        circuit = file.scores.circuit(sparsity=config.sparsity, num_edges=config.num_edges)
    d_model = file.d_model or (source.run and source.run.manifest["model"].get("d_model"))
    write_circuit(circuit, output, form, scores=file.scores, d_model=d_model, origin=source.origin)
    return Exported(circuit, output, {})
