"""Several processes on one run (data parallel), started and joined through Accelerate.

Each process holds the model and the masks, draws the same noise and the same batch, runs its part
of that batch, and adds its gradients to those of the others; so all take the same step, which is
the step of one process. The first process alone writes files.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError, ProcessError, RankZeroFailed
from edgeprune.models.load import pick_device

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes that share a run, seen from one of them. By default there is only one.

    As a context: at its end they part company, unless one is dead.

    Attributes:
        count: how many.
        rank: which one this is, from 0.
        device: what this one runs on, or `auto`.
    """

    count: int = 1
    rank: int = 0
    device: str = "auto"

    @classmethod
    def join(cls, device: str, timeout: int) -> World:
        """Meet the processes that `accelerate launch`, `torchrun` or a script of ours has started.

        They tell by the environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Args:
            device: `auto`, `cpu` or `cuda`; with one process, any.
            timeout: minutes after which a process that waits for another gives up.

        Raises:
            ConfigError: one GPU is named for all processes.
            ProcessError: the others did not come.
        """
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else the dead are waited for
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            state = PartialState(cpu=on_cpu, timeout=timedelta(minutes=timeout))
            if state.num_processes != wanted:
                raise ValueError(f"{state.num_processes} of {wanted} came")
        except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
            raise ProcessError(
                f"the processes of the run could not meet: {_first_line(error)}. Each needs RANK, "
                "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `accelerate launch`, "
                "`torchrun` and run_scripts/ set them"
            ) from None
        if state.num_processes == 1:
            return cls(device=device)
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"model.device={device} is one device, but there are {state.num_processes} "
                "processes; give auto, cpu or cuda"
            )
        own = "cpu" if state.device.type == "cpu" else str(state.device)
        return cls(state.num_processes, state.process_index, own)

    def shard(
        self, load: Callable[[], CircuitModel], shape: CircuitModel, *, offload: bool
    ) -> CircuitModel:
        """Have a model whose layers are split over the processes.

        The first process alone loads it, and gives each of the others its share.

        Args:
            load: loads it on the CPU.
            shape: the same model without weights, see `load_meta_model`; it gets them.
            offload: whether the shares stay in the CPU's memory.

        Raises:
            ConfigError: there is only one process.
            RankZeroFailed: in the others, if it cannot be loaded.
            ProcessError: another process died, or did not answer in time.
        """
        if self.count == 1:
            raise ConfigError(
                "launcher.shard=true splits the model over several processes, but there is one; "
                "start more (launcher.processes=N, torchrun, run_scripts/), or leave it out"
            )
        loaded: list[CircuitModel] = []
        self.on_rank_zero(lambda: loaded.append(load()))
        mesh = init_device_mesh("cpu" if self.device == "cpu" else "cuda", (self.count,))
        whole = loaded.pop() if loaded else None
        is_tied = bool(self.from_rank_zero(int(whole is not None and whole.is_tied)))

        def send(tensor: Tensor) -> None:
            self.collective(lambda: dist.broadcast(tensor, 0))

        shape.shard(whole, mesh, self.device, send=send, is_tied=is_tied, offload=offload)
        return shape

    def free_memory(self) -> int:
        """Bytes that this process may still take: of its GPU, or its share of the machine's.

        Of the machine's no more than a container or a batch job is allowed.
        """
        device = pick_device(self.device)
        if device.startswith("cuda"):
            return torch.cuda.mem_get_info(torch.device(device))[0]
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = min(psutil.virtual_memory().available, memory_allowed())
        return int(free) // on_this_machine

    def close(self) -> None:
        """Let go of the others. A process that exits still joined may be aborted by their exit.

        What is sharded keeps gloo's threads alive. One that is just letting go of the last
        exchange's tensor needs the interpreter for that, and aborts the process if it finds it
        gone; so it gets a moment.
        """
        if self.count > 1 and dist.is_initialized():
            PartialState().destroy_process_group()
            time.sleep(0.1)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, ProcessError) and not isinstance(error, RankZeroFailed):
            return  # another process is dead, and letting go of it might wait for it
        if error is None or isinstance(error, Exception):
            self.close()

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def check_batch(self, size: int) -> None:
        """Raises ConfigError where a batch has fewer pairs than there are processes."""
        if size < self.count:
            raise ConfigError(
                f"a step has {size} pairs, which is less than the {self.count} processes; "
                "start fewer, or raise trainer.batch_size"
            )

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch; parts differ in size by one at most.

        Raises:
            ConfigError: fewer items than processes.
        """
        self.check_batch(len(items))
        total, rank = len(items), self.rank
        return items[rank * total // self.count : (rank + 1) * total // self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float32 tensor by its sum over the processes, in one exchange.

        Raises:
            ProcessError: another process died, or did not answer in time.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self.collective(lambda: dist.all_reduce(flat))
        parts = flat.split([tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; also waits for all of them."""
        return sum(self._gather(int(flag))) > 0

    def from_rank_zero(self, number: int) -> int:
        """The first process's number."""
        return self._gather(number)[0]

    def on_rank_zero(self, function: Callable[[], object]) -> None:
        """The first process does something while the others wait.

        Raises:
            RankZeroFailed: in the others, if it raises.
        """
        failure = None
        if self.is_rank_zero:
            try:
                function()
            except Exception as error:
                failure = error
        failed = self.any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise RankZeroFailed("the first process cannot go on")

    def check_same(self, what: str, text: str) -> None:
        """Refuse to go on where processes were given different things.

        Args:
            what: names the thing.
            text: is compared.

        Raises:
            ConfigError: it differs from the first process's.
        """
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        if len(set(self._gather(number))) > 1:
            raise ConfigError(
                f"{what} of the {self.count} processes differ: give each the same command, without "
                "${now:} in it, and keep run_dir, data and model where every node sees them"
            )

    def _gather(self, number: int) -> list[int]:
        """Every process's number, in their order."""
        if self.count == 1:
            return [number]
        numbers = torch.zeros(self.count, dtype=torch.long, device=PartialState().device)
        numbers[self.rank] = number
        self.collective(lambda: dist.all_reduce(numbers))
        return numbers.tolist()

    def collective(self, function: Callable[[], Item]) -> Item:
        """Do something that waits for other processes.

        Raises:
            ProcessError: another process died, or did not answer in time.
        """
        try:
            return function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ProcessError(
                f"another process of the run died or did not answer: {_first_line(error)}. "
                "What is said above by other processes may tell why; go on with the same command "
                "and resume=auto"
            ) from None


def memory_allowed(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes that the control groups (version 2) of this process leave it; infinite without limits.

    A container's limit, and that of a SLURM job, is one of a group or of those around it. What a
    group holds of files that are not in use can be had back, so it counts as free.

    Args:
        root: where control groups are mounted.
        own: says which is this process's, as "0::/path".
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return math.inf
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / path.strip("/")
    around = [folder for folder in group.parents if folder.is_relative_to(root)]
    return min(_left_in(folder) for folder in (group, *around))


def _left_in(group: Path) -> float:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return math.inf
        held = int((group / "memory.current").read_text())
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - held + int(kept.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, as the root and where version 1 is in use
        return math.inf


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
