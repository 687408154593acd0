"""`edgeprune prepare`."""

from __future__ import annotations

from pathlib import Path

from edgeprune.commands.console import print_result
from edgeprune.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    """Write a task's prompts as JSONL."""
    from edgeprune.api.shared import prepare_prompts

    print_result(f"wrote {prepare_prompts(config):,} lines -> {Path(config.output)}")
