"""Sends metrics to Weights & Biases."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.training.trainer import StepMetrics


class Tracker:
    """A wandb run as a context manager, called after each step; without a project it does nothing.

    Args:
        project: wandb project, or None.
        run_dir: where wandb keeps its files; its name is the name of the wandb run.
        settings: recorded with the run.
    """

    def __init__(self, project: str | None, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run = None
        if project is not None:
            import wandb

            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                dir=run_dir,
                config=dict(settings),
                mode=None if "WANDB_MODE" in os.environ or _has_key() else "offline",
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if kind else 0)

    def __call__(self, metrics: StepMetrics) -> None:
        """Log the numbers of a step."""
        if self._run is not None:
            values = {k: v for k, v in metrics.to_dict().items() if v is not None}
            self._run.log(values, step=metrics.step)


def _has_key() -> bool:
    """Whether wandb can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
