"""Trackers: where metrics go besides metrics.jsonl."""

from __future__ import annotations

import netrc
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.config import TrackerConfig, TrackerKind
from edgeprune.training.trainer import StepMetrics


class Tracker:
    """Sends metrics to wandb, or nowhere. Used as a context manager and called each step."""

    def __init__(self, config: TrackerConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        self._run = None
        if config.kind is TrackerKind.wandb:
            import wandb

            self._run = wandb.init(
                project=config.project,
                name=run_dir.name,
                dir=run_dir,
                config=settings,
                mode=None if "WANDB_MODE" in os.environ or _has_key() else "offline",
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if kind else 0)

    def __call__(self, metrics: StepMetrics) -> None:
        if self._run is not None:
            values = {k: v for k, v in asdict(metrics).items() if v is not None}
            self._run.log(values, step=metrics.step)


def _has_key() -> bool:
    """Whether wandb can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
