"""Measuring circuits that are named by their run directory or file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.api.shared import (
    ablation_of,
    check_output,
    load_named_model,
    load_prompts,
    read,
)
from edgeprune.circuit import Circuit
from edgeprune.config import (
    MAX_EVALUATION_BATCH,
    AblationConfig,
    CircuitConfig,
    EvaluateConfig,
    ExplainConfig,
    TestConfig,
    to_dict,
)
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.evaluation.evaluate import Evaluation, evaluate
from edgeprune.files import write_json
from edgeprune.formats import CircuitFile
from edgeprune.prompts import Pair, PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import kind_of_prompts
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
    config: CircuitConfig,
    model: CircuitModel | None = None,
    device: str | None = None,
) -> Case:
    """Load the model (unless given), the circuit and the prompts; warn of what differs.

    `device` is where to load the model; None: where its settings say.
    """
    model_config, ablation = source.model(config.model), source.ablation(config.ablation)
    source.task(config.task)  # raises before the model is loaded
    model = model or load_named_model(source, config.model, device)
    file = read(source, model.graph, ablation)
    pairs, reference, digest = load_prompts(
        source, config.task, model, config.split, with_training=ablation.kind == "mean"
    )
    batch_size = config.batch_size or source.origin.get("evaluation_batch_size")
    return Case(
        model, file, pairs, reference, ablation, batch_size or MAX_EVALUATION_BATCH, digest,
        digest == source.digest("data"), source.is_chosen and source.is_of(model, digest, ablation),
        f"{model_config.title}, {pairs.name}, {ablation.kind} ablation",
    )  # fmt: skip


def scores_of(source: Source, file: CircuitFile) -> EdgeScores | None:
    """The scores from which a circuit was cut: those of its file or else of its run, if any."""
    if file.scores is not None or source.run is None:
        return file.scores
    scores = source.run.scores()
    return scores if scores.graph == file.circuit.graph else None


def case_record(
    source: Source, case: Case, pairs: Sequence[Pair], config: TestConfig | ExplainConfig
) -> dict[str, Any]:
    """What was tested, as JSON values."""
    measured = _measured(
        case.model, case.file.circuit, case.pairs, config.split, case.ablation, case.data_digest
    )
    own = {"num_prompts": len(pairs), "seed": config.seed}
    return {"circuit_file": str(source.path), **measured, **own}


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
    is_training = is_own and kind_of_prompts(split, pairs) == "training"
    measured = _measured(model, circuit, pairs, split, ablation, data_digest)
    return {**measured, "training_prompts": is_training, **evaluation.to_dict()}


def _measured(
    model: CircuitModel, circuit: Circuit, pairs: PairDataset, split: str, ablation: AblationConfig,
    data_digest: str,
) -> dict[str, Any]:  # fmt: skip
    """Which circuit was measured, and on what, as JSON values."""
    return {
        "edges_sha256": circuit.digest(),
        "model": model.name, "model_sha256": model.fingerprint(),
        "data": pairs.name, "data_sha256": data_digest, "split": split,
        "ablation": to_dict(ablation),
    }  # fmt: skip
