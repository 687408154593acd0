"""`edgeprune prepare`."""

from edgeprune.commands.console import print_result
from edgeprune.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    """Write a task's prompts as JSONL."""
    from edgeprune.api.circuits import prepare

    print_result(f"wrote {prepare(config):,} lines -> {config.output}")
