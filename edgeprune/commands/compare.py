"""`edgeprune compare`."""

from __future__ import annotations

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import CompareConfig


def compare(config: CompareConfig) -> None:
    """Compare circuits: what they share, what only one has, and how similar they are."""
    from edgeprune.api.circuits import compare
    from edgeprune.evaluation.compare import comparison_tables

    done = compare(config)
    for table in comparison_tables(done.result):
        print_table(*table)
    print_result(f"-> {done.folder}: comparison.json, drawings, {', '.join(done.parts)}")
