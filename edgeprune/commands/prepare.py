"""`edgeprune prepare`."""

from __future__ import annotations

from edgeprune.commands.console import print_result
from edgeprune.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    """Write a task's prompts as JSONL."""
    from edgeprune.api.circuits import prepare

    output, count, report = prepare(config)
    print_result(f"wrote {count:,} lines ({report}) -> {output}")
