"""`edgeprune evaluate`."""

import math

from edgeprune.commands.console import print_paths, print_result, print_table
from edgeprune.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> None:
    """Measure a circuit, the full model and the empty circuit on the same prompts."""
    from edgeprune.api.evaluate import evaluate_circuit
    from edgeprune.evaluation.evaluate import describe, evaluation_table

    done = evaluate_circuit(config)
    print_table(evaluation_table(done.evaluation, done.title))
    print_result(describe(done.evaluation, done.circuit))
    worst = done.evaluation.worst
    distance = f"error {worst.error:.3g}" if math.isnan(worst.kl) else f"KL {worst.kl:.3g}"
    print_result(
        f"The least faithful prompt ({distance}) is {worst.text!r}, where the full model predicts "
        f"{worst.full_prediction!r} and the circuit {worst.circuit_prediction!r}."
    )
    print_paths([] if done.output is None else [done.output])
