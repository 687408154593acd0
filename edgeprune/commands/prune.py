"""`edgeprune prune`."""

import os

from hydra.core.hydra_config import HydraConfig

from edgeprune.commands.console import print_result
from edgeprune.config import PruneConfig
from edgeprune.scale.launch import launch_processes


def prune(config: PruneConfig) -> None:
    """Learn the gates of a model's edges on a task; leaves a run directory."""
    if config.launcher.processes != 1 and "WORLD_SIZE" not in os.environ:
        launch_processes(config.launcher.processes, HydraConfig.get().overrides.task)
        return
    from edgeprune.api.prune import prune_run
    from edgeprune.evaluation.evaluate import describe

    finished = prune_run(config)
    if finished is None:  # rank 0 reports
        return
    print_result(describe(finished.evaluation, finished.pruned.circuit))
    print_result(f"-> {finished.run.path} (measured on {finished.prompts} prompts)")
