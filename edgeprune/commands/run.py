"""What the commands share that make runs or start several processes."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import SIZES, LauncherConfig, RunConfig, given_size
from edgeprune.errors import ConfigError
from edgeprune.scale.launch import launch_processes

if TYPE_CHECKING:
    from edgeprune.api.make_run import Pruned


def make_run(command: str, config: RunConfig) -> None:
    """Start the run's processes, or be one of them; print what was found."""
    if start_processes(command, config.launcher):
        return
    from edgeprune.evaluation.curve import curve_table
    from edgeprune.evaluation.evaluate import describe

    finished = getattr(import_module(f"edgeprune.api.{command}"), f"{command}_run")(config)
    if finished is None:  # rank 0 reports
        return
    pruned = finished.pruned
    title = f"{config.title}: circuits of these scores, {finished.prompts} prompts"
    print_table(curve_table(pruned.curve, title, _size(pruned)))
    print_result(f"{_reason(pruned, config)} {describe(finished.evaluation, pruned.circuit)}")
    print_result(f"-> {finished.run.path} (measured on {finished.prompts} prompts)")


def start_processes(command: str, launcher: LauncherConfig) -> bool:
    """Start the processes that settings ask for and wait for them; False if this is one of them."""
    processes, started = launcher.processes, os.environ.get("WORLD_SIZE")
    if processes != 1 and started is None:
        launch_processes(command, processes, _arguments())
        return True
    if started is not None and processes not in (None, 1, int(started)):
        raise ConfigError(f"launcher.processes={processes}, but {started} were started; omit it")
    return False


def _arguments() -> list[str]:
    """The arguments with which this run can be started again, alone if it is one of a sweep."""
    settings = HydraConfig.get()
    flags = {"main": "--config-path", "command-line": "--config-dir"}
    places = [s for s in settings.runtime.config_sources if s.provider in flags]
    searched = [o for o in settings.overrides.hydra if o.startswith("hydra.searchpath")]
    return [
        *settings.overrides.task, *searched, f"--config-name={settings.job.config_name}",
        *(f"{flags[place.provider]}={place.path}" for place in places),
    ]  # fmt: skip


def _size(pruned: Pruned) -> int | None:
    """The size that was cut from the scores, before any clean-up; None for a threshold."""
    if pruned.origin["chosen_by"] == "threshold":
        return None
    return pruned.origin.get("cleanup", {}).get("num_edges_before", len(pruned.circuit))


def _reason(pruned: Pruned, config: RunConfig) -> str:
    """How the circuit was chosen, in a sentence."""
    from edgeprune.api.choose import describe_choice

    chosen_by, cleanup = pruned.origin["chosen_by"], pruned.origin.get("cleanup")
    if chosen_by == "threshold" and "threshold" in pruned.scores.origin:
        reason = f"Chosen by the threshold {pruned.scores.origin['threshold']:g} of the scores"
    elif chosen_by == "threshold":
        reason = "Chosen by a threshold, which makes the circuit as sparse as the gates"
    elif config.choice[0] in ("sparsity", "num_edges"):
        reason = f"Chosen by size ({chosen_by})"
    else:
        reason = f"Chosen as the smallest circuit with {describe_choice(config.choice)}"
        if given_size(config) is None:
            others = ", ".join(f"{name}=" for name in SIZES)
            reason += f", the default ({others} choose others)"
    if cleanup:
        reason += f", then cleaned up from {cleanup['num_edges_before']:,} edges"
    return f"{reason}."
