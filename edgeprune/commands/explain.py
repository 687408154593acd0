"""`edgeprune explain`."""

from edgeprune.commands.console import print_paths, print_result, print_table
from edgeprune.config import ExplainConfig


def explain(config: ExplainConfig) -> None:
    """Find out what each edge of a circuit is for, and how it got there."""
    from edgeprune.api.explain import explain_circuit
    from edgeprune.evaluation.explain_tables import explanation_tables, in_words

    done = explain_circuit(config)
    for table in explanation_tables(done.explanation, done.title):
        print_table(table)
    print_result(in_words(done.explanation))
    print_paths([] if done.output is None else [done.output])
    if done.output is not None and config.output is None:
        print_result(f"`edgeprune page {done.output.parent}` shows it on the page.")
