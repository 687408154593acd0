"""`edgeprune test`."""

from edgeprune.commands.console import print_result, print_table
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
    if done.paths:
        print_result(f"-> {', '.join(map(str, done.paths))}")
    else:
        print_result(
            "Nothing was written: circuit, model, prompts or ablation are not those of a run; "
            "output=FOLDER writes the result."
        )
