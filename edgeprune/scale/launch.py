"""Starting the processes of a run on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from edgeprune.errors import ConfigError, JobFailed


def stop_signals() -> list[int]:
    """Signals that stop a run; SIGHUP only if it is not ignored (as it is under nohup)."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return numbers if is_ignored else [*numbers, signal.SIGHUP]


def in_processes() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def check_launched(count: int | None) -> None:
    """In a process started by a launcher, check the number of processes in the settings.

    Args:
        count: `launcher.processes`; 1 (the default) and None accept any number.

    Raises:
        ConfigError: it differs from the number that was started.
    """
    started = os.environ["WORLD_SIZE"]
    if count not in (None, 1) and str(count) != started:
        raise ConfigError(
            f"launcher.processes={count}, but {started} were started; leave it out where "
            "`accelerate launch`, `torchrun` or a batch script starts the processes"
        )


def launch_processes(count: int | None, overrides: Sequence[str]) -> None:
    """Run `edgeprune prune` in several processes on this machine, with `accelerate launch`.

    Signals to this process are forwarded to them.

    Args:
        count: number of processes; None: one per GPU.
        overrides: the settings of the run.

    Raises:
        JobFailed: a process failed or was stopped.
    """
    if count is None:
        import torch

        count = max(1, torch.cuda.device_count())
    command = [
        sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={count}",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        *(["--multi_gpu", "--main_process_port=0"] if count > 1 else []),
        "--module", "edgeprune", "prune", *overrides,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    process = subprocess.Popen(command, env={**threads, **os.environ, "WORLD_SIZE": str(count)})
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        process.terminate()

    old = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        code = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if code != 0:
        raise JobFailed(
            f"the run's {count} processes exited with code {code}; see their messages above. "
            "Continue with the same command and resume=auto",
            received[0] if received else None,
        )
