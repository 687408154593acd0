"""`edgeprune test`."""

from edgeprune.commands.console import print_paths, print_result, print_table
from edgeprune.commands.run import start_processes
from edgeprune.config import TestConfig


def test(config: TestConfig) -> None:
    """Test a circuit as a sceptic would, or several on each other's prompts."""
    if start_processes("test", config.launcher):
        return
    from edgeprune.api.test import test

    done = test(config)
    if done is None:  # rank 0 reports
        return
    for table in done.tables:
        print_table(table)
    print_result(done.words)
    print_paths(done.paths, "FOLDER")
