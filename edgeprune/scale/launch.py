"""Starting the processes of a run on this machine, and the signals that stop them."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from edgeprune.errors import JobFailed


@contextmanager
def on_stop_signals(
    handler: Callable[[int, object], None], *, restore_on_error: bool = True
) -> Iterator[None]:
    """Handle SIGINT, SIGTERM, SIGUSR1 and, unless it is ignored (as under nohup), SIGHUP.

    The old handlers return at the end; after an exception only if `restore_on_error`. Only the main
    thread may have handlers; in another one nothing is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, handler) for number in numbers}
    restore = restore_on_error
    try:
        yield
        restore = True
    finally:
        for number in old if restore else ():
            signal.signal(number, old[number])


def launch_processes(command: str, count: int | None, overrides: Sequence[str]) -> None:
    """Run a command of edgeprune in `count` processes (None: one per GPU) with `accelerate launch`.

    Signals to this process are forwarded. Raises JobFailed if a process failed or was stopped.
    """
    if count is None:
        import torch

        count = max(1, torch.cuda.device_count())
    arguments = [
        sys.executable, "-m", __name__, f"--num_processes={count}",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        *(["--multi_gpu", "--main_process_port=0"] if count > 1 else []),
        "--module", "edgeprune", command, *overrides,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    process = subprocess.Popen(arguments, env={**threads, **os.environ, "WORLD_SIZE": str(count)})
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        process.terminate()

    with on_stop_signals(stop):
        code = process.wait()
    if code != 0:
        raise JobFailed(
            f"the {count} processes exited with code {code}; see their messages above. A run "
            "continues with the same command and resume=auto",
            received[0] if received else None,
        )


def main() -> None:
    """`accelerate launch`, but no traceback if a process fails: it has reported the reason."""
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        accelerate_launch()
    except ChildFailedError:
        sys.exit(1)


if __name__ == "__main__":
    main()
