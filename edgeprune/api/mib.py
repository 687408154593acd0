"""Measuring scores as the Mechanistic Interpretability Benchmark does, and submitting them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.evaluate import load_prompts
from edgeprune.api.shared import check_output, load_model_of, read
from edgeprune.config import AblationConfig, MibConfig
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.mib import SHARES, Areas, mib_areas, mib_circuits
from edgeprune.files import replace_folder, write_json
from edgeprune.formats import eap, write_circuit
from edgeprune.runs import layout
from edgeprune.runs.source import Source, find
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import progress

log = logging.getLogger("edgeprune")

IMPORTANCES = "importances.json"
"""The file of a submission with the scores of all edges."""
CIRCUITS = "circuits"
"""The folder of a submission with a circuit per share below 1."""


class Benchmarked(NamedTuple):
    """The areas per ranking, a title, and the files that were written."""

    areas: Mapping[str, Areas]
    title: str
    outputs: list[Path]


def benchmark(config: MibConfig) -> Benchmarked:
    """Measure the areas of a run's scores, or those of a graph file; write a submission if asked.

    Raises ConfigError for a source without scores, DataError as `mib_areas` does.
    """
    source = find(config.scores)
    model_config, task = source.model(config.model), source.task(config.task)
    output = Path(config.output) if config.output else None
    if output:
        paths = [source.path, model_config.path, task.path]
        check_output(output, paths, is_file=False)
    model = load_model_of(model_config)
    scores = _scores(source, model)
    theirs, ours = eap.their_graph(model.graph).num_edges, model.graph.num_edges
    if theirs != ours:
        log.warning(
            f"the benchmark's graph of {model.name} has {theirs:,} edges, this one {ours:,}; to "
            f"compare with its numbers, score the edges with {eap.EXACT}"
        )
    ablation = AblationConfig(kind="interchange")
    pairs, _, digest = load_prompts(source, ablation, model, config.task, config.split)
    areas = {}
    for name, by_magnitude in (("by |score|", True), ("by score", False)):
        ranked = EdgeScores(scores.graph, scores.magnitudes(), by_magnitude)
        with progress(len(pairs), f"{name}: prompt") as show:
            areas[name] = mib_areas(
                model, ranked, pairs, batch_size=config.batch_size,
                listener=lambda done, show=show: show(done, ""),
            )  # fmt: skip
    outputs = []
    if source.run is not None and digest == source.digest("data"):
        path = source.run.path / layout.mib(config.split)
        write_json(path, {
            "data": pairs.name, "graph_edges": model.graph.num_edges,
            **{name: own.to_dict() for name, own in areas.items()},
        })  # fmt: skip
        outputs.append(path)
    if output is not None:
        _submit(scores, model, output)
        outputs.append(output)
    return Benchmarked(areas, f"{model_config.title}, {pairs.name}", outputs)


def _scores(source: Source, model: CircuitModel) -> EdgeScores:
    scores = source.run.scores() if source.run is not None else read(source, model.graph).scores
    if scores is None:
        raise ConfigError(
            f"{source.path} has no scores; give a run directory, or a graph of EAP-IG with scores"
        )
    return scores


def _submit(scores: EdgeScores, model: CircuitModel, folder: Path) -> None:
    """Write the scores, and a circuit per share below 1, ranked by |score|, as graphs."""
    ranked = replace(scores, values=scores.magnitudes(), by_magnitude=True)
    with replace_folder(folder, IMPORTANCES) as new:
        own = {"scores": ranked, "d_model": model.d_model}
        circuits = mib_circuits(ranked)
        (new / CIRCUITS).mkdir()
        write_circuit(circuits[-1], new / IMPORTANCES, "eap_json", **own)
        for share, circuit in zip(SHARES[:-1], circuits, strict=False):
            write_circuit(circuit, new / CIRCUITS / f"{share}.json", "eap_json", **own)
