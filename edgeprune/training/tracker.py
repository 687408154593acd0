"""Sends metrics to Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune.training.trainer import StepMetrics


@contextmanager
def open_tracker(
    project: str, run_dir: Path, settings: dict[str, Any]
) -> Iterator[Callable[[StepMetrics], None]]:
    """Open a wandb run, offline without an API key; yields a function that logs a step's metrics."""
    import wandb

    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = os.environ.get("WANDB_API_KEY") or (netrc.exists() and "wandb" in netrc.read_text())
    mode = None if has_key or "WANDB_MODE" in os.environ else "offline"
    run = wandb.init(project=project, name=run_dir.name, dir=run_dir, config=settings, mode=mode)
    exit_code = 1
    try:
        yield lambda metrics: run.log(
            {name: x for name, x in metrics.to_dict().items() if x is not None}, step=metrics.step
        )
        exit_code = 0
    finally:
        run.finish(exit_code)
