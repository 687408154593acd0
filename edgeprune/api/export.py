"""Choosing a circuit from scores, and writing it in another format."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from edgeprune.api.choose import Choice, choose, cleaned_up, curve_of
from edgeprune.api.shared import ablation_of, check_output, graph_of, load_model_of, own_data, read
from edgeprune.circuit import Circuit
from edgeprune.config import SIZES, ExportConfig
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.cleanup import clean_up
from edgeprune.evaluation.curve import Curve
from edgeprune.formats import write_circuit
from edgeprune.prompts import PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import first_split, load_pairs
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
    choice = _asked(config) or run.config.choice
    scores, circuit, chosen = choose_from(run, choice, config.checkpoint)
    if config.cleanup is not None:
        measuring = Measuring.of(run, "train")
        cleaned = clean_up(
            measuring.model, circuit, measuring.pairs, tolerance=config.cleanup, scores=scores,
            ablation=measuring.ablation, batch_size=run.config.evaluation_batch_size,
        )  # fmt: skip
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


def _asked(config: ExportConfig) -> Choice | None:
    """How the settings say that the circuit is chosen, if they do."""
    given = [(name, getattr(config, name)) for name in SIZES]
    by_threshold = ("threshold", None) if config.threshold else None
    return next((choice for choice in given if choice[1] is not None), by_threshold)


def choose_from(
    run: Run, choice: Choice, step: int | None = None
) -> tuple[EdgeScores, Circuit, dict[str, Any]]:
    """A run's scores after a step, or else the last; a circuit chosen from them, and how it was."""
    scores = run.scores(step)
    if step is None and run.is_unfinished(scores.origin):
        log.warning(
            f"the run in {run.path} has done {scores.origin['step']:,} of "
            f"{run.config.trainer.steps:,} steps; continue it with its command and resume=auto"
        )
    if choice[0] == "threshold" and run.config.trainer.method == "every_size":
        raise ConfigError(
            "threshold=true needs gates, but trainer=every_size learns scores; give "
            f"{', '.join(f'{name}=' for name in SIZES)} or none"
        )

    @cache
    def measuring() -> Measuring:
        return Measuring.of(run, "validation")

    def measure(sizes: Sequence[int] | None = None) -> Curve:
        m = measuring()
        return curve_of(
            m.model, scores, m.pairs, m.ablation, run.config.evaluation_batch_size, sizes
        )

    def curve() -> Curve:
        known = run.curve() if step is None else None
        return known or measure()

    chosen = choose(
        scores, choice, state=lambda: run.checkpoint(scores.origin.get("step")).state,
        curve=curve, measure=measure,
    )  # fmt: skip
    return scores, chosen.circuit, chosen.origin


class Measuring(NamedTuple):
    """What measuring circuits of a run takes: its own model, prompts and ablation."""

    model: CircuitModel
    pairs: PairDataset
    ablation: Ablation

    @classmethod
    def of(cls, run: Run, split: str) -> Self:
        """Load the model, and the prompts of a split (or of another, if it is empty)."""
        config = run.config
        model = load_model_of(config.model)
        path = own_data(run.data_path, run.digests["data"])
        train = load_pairs(path, config.task, model, "train")
        ablation = ablation_of(model, config.ablation, train, config.evaluation_batch_size)
        pairs = load_pairs(path, config.task, model, first_split(path, split))
        return cls(model, pairs, ablation)


def _convert(config: ExportConfig, form: str) -> Exported:
    """From one circuit file to another; from scores in it, also to another size."""
    for name in ("checkpoint", "max_kl", "min_exact_match", "threshold", "cleanup"):
        if getattr(config, name) not in (None, False):
            raise ConfigError(f"{name}= needs a run directory; {config.run} is a file")
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
