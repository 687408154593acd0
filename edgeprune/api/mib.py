"""Measuring scores as the Mechanistic Interpretability Benchmark does, and submitting them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.evaluate import scores_of
from edgeprune.api.shared import check_output, load_named_model, load_prompts, read
from edgeprune.circuit import Circuit
from edgeprune.config import MibConfig
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.mib import (
    SHARES,
    Areas,
    Recovery,
    mib_areas,
    mib_circuits,
    recovery,
)
from edgeprune.files import replace_folder, write_json
from edgeprune.formats import eap, write_circuit
from edgeprune.metrics import Output
from edgeprune.models import tracr
from edgeprune.runs import layout
from edgeprune.runs.source import Source, find
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import progress

log = logging.getLogger("edgeprune")

IMPORTANCES = "importances"
"""The scores of all edges, as the stem of a file, and the folder of one submission."""
CIRCUITS = "circuits"
"""The folder of another submission, with a circuit per share below 1."""
NAMES = {
    "Qwen2.5-0.5B": "qwen2.5", "gemma-2-2b": "gemma2", "Llama-3.1-8B": "llama3",
    "copycolors-mcqa": "mcqa",
}  # fmt: skip
"""What the leaderboard calls models and datasets, where it is not their own name with hyphens."""


class Benchmarked(NamedTuple):
    """The areas per ranking, how well it recovers the true circuit, a title, and the files that
    were written. Areas are empty for models without logits, recoveries where the truth is unknown.
    """

    areas: Mapping[str, Areas]
    recovered: Mapping[str, Recovery]
    title: str
    outputs: list[Path]


def benchmark(config: MibConfig) -> Benchmarked:
    """Measure a run's scores, or those of a graph file; write submissions if asked.

    Raises ConfigError for a source without scores, DataError as `mib_areas` and `recovery` do.
    """
    source = find(config.scores)
    model_config, task = source.model(config.model), source.task(config.task)
    output = Path(config.output) if config.output else None
    if output:
        paths = [source.path, model_config.path, task.path, config.truth]
        check_output(output, paths, is_file=False)
    model = load_named_model(source, config.model)
    truth = _truth(config, source, model)
    scores = scores_of(source, read(source, model.graph))
    if scores is None:
        raise ConfigError(
            f"{source.path} has no scores; give a run directory, or a graph of EAP-IG with scores"
        )
    theirs, ours = eap.their_graph(model.graph).num_edges, model.graph.num_edges
    if theirs != ours and model.output is Output.logits:
        log.warning(
            f"the benchmark's graph of {model.name} has {theirs:,} edges, this one {ours:,}; to "
            f"compare with its numbers, score the edges with {eap.EXACT}"
        )
    pairs, _, digest = load_prompts(source, config.task, model, config.split)
    areas, recovered, records = {}, {}, {}
    for name, by_magnitude in (("by |score|", True), ("by score", False)):
        ranked, records[name] = EdgeScores(scores.graph, scores.magnitudes(), by_magnitude), {}
        if truth is not None:
            recovered[name] = recovery(ranked, truth)
            records[name] |= recovered[name].to_dict()
        if truth is None or model.output is Output.logits:  # others have no logit differences
            if areas and bool((ranked.values >= 0).all()):  # both rankings are the same
                areas[name] = areas["by |score|"]
            else:
                with progress(len(pairs), f"{name}: prompt") as show:
                    areas[name] = mib_areas(
                        model, ranked, pairs, batch_size=config.batch_size, listener=show
                    )
            records[name] |= areas[name].to_dict()
    outputs = []
    if source.run is not None and source.is_chosen and source.is_of(model, digest):
        path = source.run.path / layout.mib(config.split)
        write_json(path, {"data": pairs.name, "graph_edges": model.graph.num_edges, **records})
        outputs.append(path)
    if output is not None:
        outputs += _submit(scores, model, output, submission_name(task.title, model_config.path))
    return Benchmarked(areas, recovered, f"{model_config.title}, {pairs.name}", outputs)


def submission_name(dataset: str, model: str) -> str:
    """The folder of a submission, as the leaderboard reads it: `arc-easy_gemma2`.

    Args:
        dataset: its name, with hyphens or, as on the Hugging Face Hub, underscores.
        model: its path or name on the Hub.
    """
    names = (name.replace("_", "-") for name in (dataset, Path(model).name))
    return "_".join(NAMES.get(name, name) for name in names)


def _truth(config: MibConfig, source: Source, model: CircuitModel) -> Circuit | None:
    """The true circuit: the given one, or a compiled model's under the run's kind of ablation."""
    if config.truth is not None:
        return read(find(config.truth), model.graph).circuit
    return tracr.true_circuit(model, source.ablation().kind)


def _submit(scores: EdgeScores, model: CircuitModel, output: Path, name: str) -> list[Path]:
    """Write two submissions: the scores, and a circuit per share below 1 ranked by |score|.

    In each, the leaderboard expects a folder per task and model with nothing else in it.
    """
    ranked = replace(scores, values=scores.magnitudes(), by_magnitude=True)
    circuits = dict(zip(map(str, SHARES[:-1]), mib_circuits(ranked), strict=False))
    every = Circuit(scores.graph, frozenset(scores.graph.edges))
    folders = []
    for part, files in ((IMPORTANCES, {IMPORTANCES: every}), (CIRCUITS, circuits)):
        folders.append(output / part / name)
        with replace_folder(folders[-1], f"{next(iter(files))}.json") as new:
            for stem, circuit in files.items():
                own = {"scores": ranked, "d_model": model.d_model}
                write_circuit(circuit, new / f"{stem}.json", "eap_json", **own)
    return folders
