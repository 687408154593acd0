"""Choosing a circuit from scores, and writing it in another format."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from edgeprune.api.choose import Choice, choose, cleaned_up, curve_of, cut
from edgeprune.api.shared import (
    ablation_of,
    check_output,
    graph_of,
    load_model_of,
    own_data,
    read,
    warn_if_changed,
)
from edgeprune.circuit import Circuit
from edgeprune.config import SIZES, ExportConfig, given_size, is_given
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.curve import Curve
from edgeprune.formats import write_circuit
from edgeprune.prompts import PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import first_split, load_pairs
from edgeprune.runs.run import Run, is_run
from edgeprune.runs.source import find
from edgeprune.scores import EdgeScores

log = logging.getLogger("edgeprune")


class Exported(NamedTuple):
    """A circuit that was written, the file, and how the circuit was chosen, as JSON values."""

    circuit: Circuit
    output: Path
    origin: Mapping[str, Any]


def export(config: ExportConfig) -> Exported:
    """Choose a circuit from a run's scores, or convert a circuit outside of a run.

    Raises ConfigError if the size is out of range, or the output lies in a run directory.
    """
    form = config.format or ("eap_pt" if (config.output or "").endswith(".pt") else "edges")
    if not is_run(Path(config.run)):
        return _convert(config, form)
    run = Run.open(config.run)
    if config.output is not None:
        check_output(Path(config.output), [run.data_path])
    by_threshold = ("threshold", None) if config.threshold else None
    choice = given_size(config) or by_threshold or run.config.choice
    measuring = cache(lambda: Measuring.of(run))
    is_greedy = config.choose == "greedy"
    scores, circuit, chosen = choose_from(
        run, choice, config.checkpoint, measuring, greedy=is_greedy
    )
    if config.cleanup is not None:
        own = measuring()
        circuit, chosen = cleaned_up(
            own.model, circuit, chosen, own.train, tolerance=config.cleanup, scores=scores,
            ablation=own.ablation, batch_size=run.config.evaluation_batch_size,
        )  # fmt: skip
    origin = {"scores": dict(scores.origin), **chosen}
    if config.output is None and form in ("edges", "circuit"):
        run.write_circuit(circuit, origin)
        return Exported(circuit, run.path / layout.EDGES, origin)
    graphs = {"eap_json": layout.GRAPH_JSON, "eap_pt": layout.GRAPH_PT}
    output = Path(config.output) if config.output else run.path / graphs[form]
    d_model, belongs_to = run.manifest["model"].get("d_model"), {**run.origin, **origin}
    write_circuit(circuit, output, form, scores=scores, d_model=d_model, origin=belongs_to)
    return Exported(circuit, output, origin)


class Measuring(NamedTuple):
    """What is needed to measure circuits of a run: its own model, prompts and ablation."""

    model: CircuitModel
    train: PairDataset
    held_out: PairDataset
    ablation: Ablation

    @classmethod
    def of(cls, run: Run) -> Self:
        """Load them."""
        config = run.config
        model = load_model_of(config.model)
        warn_if_changed(model, run.digests["model"])
        path = own_data(run.data_path, run.digests["data"])
        train, held_out = (
            load_pairs(path, config.task, model, split)
            for split in ("train", first_split(path, "validation"))
        )
        ablation = ablation_of(model, config.ablation, train, config.evaluation_batch_size)
        return cls(model, train, held_out, ablation)


def choose_from(
    run: Run,
    choice: Choice,
    step: int | None,
    measuring: Callable[[], Measuring],
    *,
    greedy: bool = False,
) -> tuple[EdgeScores, Circuit, dict[str, Any]]:
    """A run's scores after a step, or else the last; a circuit chosen from them, and how it was."""
    scores = run.scores(step)
    if step is None and run.is_unfinished(scores.origin):
        log.warning(
            f"the run in {run.path} has done {scores.origin['step']:,} of "
            f"{run.config.trainer.steps:,} steps; continue it with its command and resume=auto"
        )
    if choice[0] == "threshold" and run.config.default_choice != choice:
        raise ConfigError(
            "threshold=true needs gates or method=acdc, but the run has other scores; give "
            f"{', '.join(f'{name}=' for name in SIZES)} or none"
        )
    if choice[0] == "threshold" and greedy:
        raise ConfigError(
            "choose=greedy adds edges up to a size, not to a threshold; give "
            f"{', '.join(f'{name}=' for name in SIZES)}"
        )
    ranked = scores.greedy() if greedy else scores

    def measure(sizes: Sequence[int] | None) -> Curve:
        known = run.curve() if sizes is None and step is None and not greedy else None
        if known is not None:
            return known
        own, batch_size = measuring(), run.config.evaluation_batch_size
        return curve_of(own.model, ranked, own.held_out, own.ablation, batch_size, sizes)

    circuit, origin, _ = choose(
        ranked, choice, state=lambda: run.checkpoint(scores.origin.get("step")).state,
        measure=measure,
    )  # fmt: skip
    return scores, circuit, {**origin, "order": "greedy"} if greedy else origin


def _convert(config: ExportConfig, form: str) -> Exported:
    """Write a circuit file in another format; from scores in it, also a circuit of another size."""
    source = find(config.run)
    for name in ("checkpoint", "max_kl", "min_exact_match", "threshold", "cleanup"):
        if is_given(getattr(config, name)):
            raise ConfigError(f"{name}= needs a run directory, which {config.run} is not")
    if config.choose == "greedy" and (config.sparsity, config.num_edges) == (None, None):
        raise ConfigError("choose=greedy needs sparsity= or num_edges= to cut the file's scores")
    if config.output is None:
        raise ConfigError(f"say where to write the circuit of {config.run}: output=FILE")
    output = Path(config.output)
    check_output(output, reads=[source.path])
    file = read(source, graph_of(source, config.model))
    circuit = file.circuit
    if (config.sparsity, config.num_edges) != (None, None):
        if file.scores is None:
            raise ConfigError(
                f"{source.path} does not have a score for every edge, which sparsity= and "
                "num_edges= need; give a run directory, or a graph of EAP-IG or MIB with scores"
            )
        ranked = file.scores.greedy() if config.choose == "greedy" else file.scores
        circuit = cut(ranked, sparsity=config.sparsity, num_edges=config.num_edges)
    d_model = file.d_model or (source.run and source.run.manifest["model"].get("d_model"))
    write_circuit(circuit, output, form, scores=file.scores, d_model=d_model, origin=source.origin)
    return Exported(circuit, output, {})
