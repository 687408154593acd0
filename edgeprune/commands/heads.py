"""`edgeprune heads`."""

from edgeprune.commands.console import print_paths, print_table
from edgeprune.config import HeadsConfig


def heads(config: HeadsConfig) -> None:
    """Find out what each attention head attends to, and name the kinds of heads."""
    from edgeprune.api.heads import find_heads
    from edgeprune.evaluation.heads import circuit_tables, heads_table

    done = find_heads(config)
    print_table(heads_table(done.scores, done.title))
    if done.circuit is not None:
        for table in circuit_tables(done.scores.labels, done.circuit):
            print_table(table)
    print_paths(done.paths)
