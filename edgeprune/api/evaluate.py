"""Measuring circuits that are named by their run directory or file."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.api.shared import (
    ablation_of,
    check_output,
    load_model_of,
    prompts_file,
    read,
    warn_if_changed,
)
from edgeprune.circuit import Circuit
from edgeprune.config import (
    MAX_EVALUATION_BATCH,
    AblationConfig,
    EvaluateConfig,
    ExplainConfig,
    TaskConfig,
    TestConfig,
    to_dict,
)
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.evaluation.evaluate import Evaluation, evaluate
from edgeprune.files import file_digest, write_json
from edgeprune.formats import CircuitFile
from edgeprune.prompts import Pair, PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import (
    first_split,
    kind_of_prompts,
    load_pairs,
    warn_if_none_held_out,
)
from edgeprune.runs.source import Source, find
from edgeprune.scores import EdgeScores


class Measured(NamedTuple):
    """An evaluation, the circuit it is of, a title, and the file it was written to, if any."""

    evaluation: Evaluation
    circuit: Circuit
    title: str
    output: Path | None


class Case(NamedTuple):
    """A circuit and everything with which it is measured.

    Attributes:
        reference: the prompts over which mean ablation averages.
        data_digest: SHA-256 of the prompts' file.
        is_own_data: whether the circuit was found on this file.
        is_own: whether circuit, model, prompts and ablation are those of a run or of the folder.
    """

    model: CircuitModel
    file: CircuitFile
    pairs: PairDataset
    reference: PairDataset
    ablation: AblationConfig
    batch_size: int
    data_digest: str
    is_own_data: bool
    is_own: bool
    title: str

    def make_ablation(self) -> Ablation:
        return ablation_of(self.model, self.ablation, self.reference, self.batch_size)


def load_case(
    source: Source,
    config: EvaluateConfig | TestConfig | ExplainConfig,
    model: CircuitModel | None = None,
    device: str | None = None,
) -> Case:
    """Load the model (unless given), the circuit and the prompts; warn of what differs.

    `device` is where to load the model; None: where its settings say.
    """
    model_config, ablation = source.model(config.model), source.ablation(config.ablation)
    source.task(config.task)  # raises before the model is loaded
    model = model or load_model_of(replace(model_config, device=device or model_config.device))
    file = read(source, model.graph, ablation)
    is_own_model = model.fingerprint() == source.digest("model")
    if config.model is None:
        warn_if_changed(model, source.digest("model"))
    pairs, reference, digest = load_prompts(source, ablation, model, config.task, config.split)
    batch_size = config.batch_size or source.origin.get("evaluation_batch_size")
    is_own_data = digest == source.digest("data")
    is_own = is_own_model and is_own_data and to_dict(ablation) == source.origin.get("ablation")
    return Case(
        model, file, pairs, reference, ablation, batch_size or MAX_EVALUATION_BATCH, digest,
        is_own_data, is_own and source.path.name in layout.CHOSEN,
        f"{model_config.title}, {pairs.name}, {ablation.kind} ablation",
    )  # fmt: skip


def scores_of(source: Source, file: CircuitFile) -> EdgeScores | None:
    """The scores from which a circuit was cut: those of its file or else of its run, if any."""
    if file.scores is not None or source.run is None:
        return file.scores
    scores = source.run.scores()
    return scores if scores.graph == file.circuit.graph else None


def drawn(pairs: Sequence[Pair], config: TestConfig | ExplainConfig) -> list[Pair]:
    """As many of the prompts as asked for, or all if there are fewer."""
    if len(pairs) <= config.prompts:
        return list(pairs)
    return random.Random(config.seed).sample(list(pairs), config.prompts)


def case_record(
    source: Source, case: Case, pairs: Sequence[Pair], config: TestConfig | ExplainConfig
) -> dict[str, Any]:
    """What was tested, as JSON values."""
    return {
        "circuit_file": str(source.path),
        "edges_sha256": case.file.circuit.digest(),
        "model": case.model.name,
        "model_sha256": case.model.fingerprint(),
        "data": case.pairs.name,
        "data_sha256": case.data_digest,
        "split": config.split,
        "num_prompts": len(pairs),
        "seed": config.seed,
        "ablation": to_dict(case.ablation),
    }


def checked_output(config: EvaluateConfig | ExplainConfig, source: Source) -> Path | None:
    """The file that settings name, if any; raises ConfigError if it may not be written."""
    if config.output is None:
        return None
    reads = [source.path, source.model(config.model).path, source.task(config.task).path]
    check_output(Path(config.output), reads)
    return Path(config.output)


def evaluate_circuit(config: EvaluateConfig) -> Measured:
    """Measure a circuit that is named by its run directory or file."""
    source = find(config.circuit)
    output = checked_output(config, source)
    case = load_case(source, config)
    model, circuit, pairs = case.model, case.file.circuit, case.pairs
    evaluation = evaluate(
        model, circuit, pairs, batch_size=case.batch_size, head_permuted=config.head_permuted,
        ablation=case.make_ablation(),
    )  # fmt: skip
    if output is None and case.is_own:
        output = source.path.with_name(layout.evaluation(config.split))
    if output is not None:
        record = evaluation_record(
            model, circuit, pairs, config.split, case.ablation, evaluation,
            data_digest=case.data_digest, is_own=case.is_own_data,
        )  # fmt: skip
        write_json(output, {"circuit_file": str(source.path), **record})
    return Measured(evaluation, circuit, case.title, output)


def load_prompts(
    source: Source,
    ablation: AblationConfig,
    model: CircuitModel,
    given: TaskConfig | None,
    split: str,
) -> tuple[PairDataset, PairDataset, str]:
    """A split's prompts, those over which means are taken, and the SHA-256 of their file.

    `given` is the task of which they are; None: the source's own.
    """
    task = source.task(given)
    with prompts_file(source, given, model) as path:
        pairs = reference = load_pairs(path, task, model, split)
        if ablation.kind == "mean":
            reference = load_pairs(path, task, model, first_split(path, "train"))
        digest = file_digest(path)
    if digest == source.digest("data"):
        warn_if_none_held_out(pairs)
    return pairs, reference, digest


def evaluation_record(
    model: CircuitModel,
    circuit: Circuit,
    pairs: PairDataset,
    split: str,
    ablation: AblationConfig,
    evaluation: Evaluation,
    *,
    data_digest: str,
    is_own: bool,
) -> dict[str, Any]:
    """An evaluation and what it is of, as JSON values.

    `data_digest` is that of the prompts' file, `is_own` whether the circuit was found on it.
    """
    return {
        "edges_sha256": circuit.digest(),
        "model": model.name,
        "model_sha256": model.fingerprint(),
        "data": pairs.name,
        "data_sha256": data_digest,
        "split": split,
        "training_prompts": is_own and kind_of_prompts(split, pairs) == "training",
        "ablation": to_dict(ablation),
        **evaluation.to_dict(),
    }
