"""`edgeprune prune`."""

import os

from hydra.core.hydra_config import HydraConfig

from edgeprune.commands.console import print_result
from edgeprune.config import PruneConfig
from edgeprune.errors import ConfigError
from edgeprune.scale.launch import launch_processes


def prune(config: PruneConfig) -> None:
    """Learn the gates of a model's edges on a task; leaves a run directory."""
    processes, started = config.launcher.processes, os.environ.get("WORLD_SIZE")
    if processes != 1 and started is None:
        launch_processes(processes, HydraConfig.get().overrides.task)
        return
    if started is not None and processes not in (None, 1, int(started)):
        raise ConfigError(f"launcher.processes={processes}, but {started} were started; omit it")
    from edgeprune.api.prune import prune_run
    from edgeprune.evaluation.evaluate import describe

    finished = prune_run(config)
    if finished is None:  # rank 0 reports
        return
    print_result(describe(finished.evaluation, finished.pruned.circuit))
    print_result(f"-> {finished.run.path} (measured on {finished.prompts} prompts)")
