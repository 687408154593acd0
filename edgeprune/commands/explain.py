"""`edgeprune explain`."""

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import ExplainConfig


def explain(config: ExplainConfig) -> None:
    """Find out what each edge of a circuit is for, and how it got there."""
    from edgeprune.api.explain import explain_circuit
    from edgeprune.evaluation.explain_tables import explanation_tables, in_words

    done = explain_circuit(config)
    for table in explanation_tables(done.explanation, done.title):
        print_table(table)
    print_result(in_words(done.explanation))
    if done.output is None:
        print_result(
            "Nothing was written: circuit, model, prompts or ablation are not those of a run; "
            "output=FILE writes the result."
        )
        return
    print_result(f"-> {done.output}")
    if config.output is None:
        print_result(f"`edgeprune page {done.output.parent}` shows it on the page.")
