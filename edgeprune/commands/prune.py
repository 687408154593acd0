"""`edgeprune prune`."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig

from edgeprune.commands.console import print_result
from edgeprune.config import PruneConfig
from edgeprune.scale.launch import check_launched, in_processes, launch_processes


def prune(config: PruneConfig) -> None:
    """Learn the gates of a model's edges on a task; leaves a run directory."""
    if in_processes():
        check_launched(config.launcher.processes)
    elif config.launcher.processes != 1:
        launch_processes(config.launcher.processes, HydraConfig.get().overrides.task)
        return
    from edgeprune.api.prune import prune_run
    from edgeprune.evaluation.evaluate import describe

    finished = prune_run(config)
    if finished is None:  # rank 0 reports
        return
    print_result(describe(finished.evaluation, finished.pruned.circuit))
    print_result(f"-> {finished.run.path} (measured on {finished.split} prompts)")
