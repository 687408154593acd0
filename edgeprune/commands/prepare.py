"""`edgeprune prepare`."""

from __future__ import annotations

from pathlib import Path

from edgeprune.commands.shared import check_output, show, task_records, write_records
from edgeprune.config import CUSTOM, PrepareConfig, check_model, check_task
from edgeprune.errors import ConfigError


def prepare(config: PrepareConfig) -> None:
    """Write a task's prompts as JSONL."""
    from edgeprune.models import load_tokenizer
    from edgeprune.runs.run import DATA

    if config.task.name == CUSTOM or config.task.path is not None:
        raise ConfigError(
            "prepare writes the prompts of one of the project's tasks, such as task=ioi; a file of "
            f"your own needs no preparing: give prune task={CUSTOM} "
            f"task.path={config.task.path or 'FILE'}"
        )
    check_model(config.model)
    check_task(config.task)
    output = Path(config.output)
    check_output(output, [config.model.path], may_be=() if output.exists() else (DATA,))
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    records = task_records(config.task, tokenizer)
    write_records(records, output)
    show(f"wrote {len(records):,} lines -> {output}")
