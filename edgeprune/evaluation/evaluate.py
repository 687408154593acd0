"""Evaluate a circuit, next to the full model and the empty circuit."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.evaluation.table import Table
from edgeprune.files import json_values
from edgeprune.metrics import METRICS, ExampleMetrics, Metrics, Output, measure
from edgeprune.prompts import Batch, Pair, iterate_batches


@dataclass(frozen=True)
class WorstExample:
    """The example on which the circuit is least faithful: largest `kl`, or `error` of values.

    Predictions are the text of all predicted tokens, which are separated by |.
    """

    text: str
    kl: float
    error: float
    full_prediction: str
    circuit_prediction: str


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a circuit, and of the models to compare it with."""

    circuit: Metrics
    full: Metrics
    empty: Metrics
    head_permuted: Metrics | None  # mean over head-permuted circuits, if any were measured
    worst: WorstExample
    num_examples: int
    num_edges: int
    sparsity: float
    num_with_distractors: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        return json_values(asdict(self))


def evaluate(
    model: CircuitModel, circuit: Circuit, pairs: Sequence[Pair], *,
    ablation: Ablation | str = "interchange", batch_size: int = 64, head_permuted: int = 0,
) -> Evaluation:  # fmt: skip
    """Measure how much of the model's behaviour a circuit keeps.

    Args:
        ablation: what ablated edges carry, such as `Pruned.ablation`; or `interchange`, `zero` or
            `mean` (over `pairs`, per position).
        head_permuted: number of head-permuted circuits to measure too, with seeds 0, 1, ...

    Raises ValueError if the circuit belongs to another graph than the model's, there are no
    prompts, one is too long for the model, or the batch size is out of range.
    """
    Circuit.check(circuit, model.graph)
    model.check_prompts(pairs)
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    batches = list(iterate_batches(pairs, batch_size))
    permuted = [circuit.head_permuted(seed) for seed in range(head_permuted)]
    circuits = [circuit, Circuit(model.graph, frozenset()), *permuted]
    examples = measure_circuits(model, circuits, batches, ablation)
    full, of_circuit, empty, *_ = examples
    metrics = [Metrics.of(each, full, empty) for each in examples]
    mean = {name: sum(m[name] for m in metrics[3:]) / max(head_permuted, 1) for name in METRICS}
    return Evaluation(
        full=metrics[0], circuit=metrics[1], empty=metrics[2],
        head_permuted=Metrics(mean) if permuted else None,
        worst=_worst_example(model, batches, of_circuit, full),
        num_examples=len(pairs), num_edges=len(circuit), sparsity=circuit.sparsity,
        num_with_distractors=int((~full.logit_difference.isnan()).sum()),
    )  # fmt: skip


@torch.no_grad()
def measure_circuits(
    model: CircuitModel,
    circuits: Sequence[Circuit],
    batches: Sequence[Batch],
    ablation: Ablation,
    listener: Callable[[int], object] | None = None,
    run_pair: Callable[[Batch], tuple[Tensor, Activations | None]] | None = None,
) -> list[ExampleMetrics]:
    """Measure the full model and then each circuit, on the same passes of the full model.

    Args:
        listener: called after each batch with the number of prompts done.
        run_pair: takes the place of the model's, for instance where its passes are kept.
    """
    run_pair = run_pair or partial(model.run_pair, corrupted=ablation.needs_corrupted)
    masks = [circuit.mask() for circuit in circuits]
    order = sorted(range(len(masks)), key=masks.__getitem__)  # neighbours share their first layers
    gates = [torch.tensor(masks[i], dtype=torch.float32, device=model.device) for i in order]
    parts: list[list[ExampleMetrics]] = [[] for _ in range(1 + len(masks))]
    for batch in batches:
        batch = batch.to(model.device)
        reference, corrupted = run_pair(batch)
        values = ablation.values(batch, corrupted)
        parts[0].append(measure(batch, reference, reference, model.output))
        for i, outputs in zip(order, model.run_circuits(batch, gates, values), strict=True):
            parts[1 + i].append(measure(batch, reference, outputs, model.output))
        if listener is not None:
            listener(sum(len(measured.kl) for measured in parts[0]))
    return [ExampleMetrics.concatenate(part) for part in parts]


def _worst_example(
    model: CircuitModel, batches: Sequence[Batch], circuit: ExampleMetrics, full: ExampleMetrics
) -> WorstExample:
    worst = int((circuit.kl if model.output is Output.logits else circuit.error).argmax())
    return WorstExample(
        text=[pair.text for batch in batches for pair in batch.pairs][worst],
        kl=circuit.kl[worst].clamp(min=0).item(),
        error=circuit.error[worst].item(),
        full_prediction=model.text_of(full.predicted[worst].tolist()),
        circuit_prediction=model.text_of(circuit.predicted[worst].tolist()),
    )


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """Metrics by model; metrics that do not apply to the prompts are left out."""
    models = {
        f"circuit,\n{evaluation.num_edges:,} edges": evaluation.circuit,
        "full\nmodel": evaluation.full,
        "empty\ncircuit": evaluation.empty,
    }
    if evaluation.head_permuted is not None:
        models["head-\npermuted"] = evaluation.head_permuted
    num, rows = evaluation.num_with_distractors, []
    for metric in METRICS.values():
        values = [metrics[metric.name] for metrics in models.values()]
        if not all(map(math.isnan, values)):
            covers_some = metric.needs_distractors and num < evaluation.num_examples
            label = f"{metric.label} ({num:,} prompts)" if covers_some else metric.label
            rows.append([label, *map(metric.text, values)])
    return Table(["", *models], rows, title)


def describe(evaluation: Evaluation, circuit: Circuit) -> str:
    """Describe in a few sentences how well a circuit does and what it consists of."""
    graph, connected = circuit.graph, circuit.without_dangling()
    kinds = [node[0] for node in connected.nodes]
    edges_at = Counter(writer for writer, _ in connected.edges)
    for _, reader in connected.edges:
        edges_at.update(connected.nodes_fed_by(reader))
    busiest = ", ".join(f"{node} ({count})" for node, count in edges_at.most_common(5))
    permuted = evaluation.head_permuted
    controls = ""
    if permuted is not None:
        controls = f", head-permuted circuits on {permuted.exact_match:.1%} on average"
    return (
        f"The circuit has {len(circuit):,} of {graph.num_edges:,} edges and gives the full model's "
        f"answer on {evaluation.circuit.exact_match:.1%} of the prompts; the empty circuit does so "
        f"on {evaluation.empty.exact_match:.1%}{controls}. The full model is right on "
        f"{evaluation.full.accuracy:.1%}. Of the edges {len(connected):,} lie on paths from the "
        f"input to the output, through {kinds.count('a')} of {graph.num_layers * graph.num_heads} "
        f"heads and {kinds.count('m')} of {graph.num_layers} MLPs"
        f"{f'; most edges meet at {busiest}' if busiest else ''}."
    )
