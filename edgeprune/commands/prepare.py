"""`edgeprune prepare`."""

from __future__ import annotations

from pathlib import Path

from edgeprune.commands.console import print_result
from edgeprune.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    """Write a task's prompts as JSONL."""
    from edgeprune.api.shared import prepare_prompts

    number, report = prepare_prompts(config)
    print_result(f"wrote {number:,} lines ({report}) -> {Path(config.output)}")
