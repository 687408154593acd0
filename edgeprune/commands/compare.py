"""`edgeprune compare`."""

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import CompareConfig


def compare(config: CompareConfig) -> None:
    """Compare circuits: what they share, what only one has, and how similar they are."""
    from edgeprune.api.circuits import compare
    from edgeprune.evaluation.compare import comparison_tables

    result, parts = compare(config)
    for table in comparison_tables(result):
        print_table(table)
    print_result(f"-> {config.output}: comparison.json, drawings, {', '.join(parts)}")
