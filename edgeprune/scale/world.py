"""World: the processes that share a run (data parallel), started and joined through Accelerate.

Each process holds the model and the method's parameters, draws the same noise and the same batch,
runs its part of the batch, and sums its gradients with those of the others. All processes therefore
take the same step, which is the step of a single process. Rank 0 alone writes files.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError, ProcessError, RankZeroFailed
from edgeprune.scale.sharding import shard_model

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes that share a run, seen from one of them. The default is a single process.

    As a context manager it leaves the process group at the end, unless another process is dead.

    Attributes:
        count: number of processes.
        rank: index of this process, from 0.
        device: device of this process, or `auto`.
    """

    count: int = 1
    rank: int = 0
    device: str = "auto"

    @classmethod
    def join(cls, device: str, timeout: int) -> World:
        """Join the processes that `accelerate launch`, `torchrun` or run_scripts/ have started.

        They are described by the environment variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
        and MASTER_PORT.

        Args:
            device: `auto`, `cpu` or `cuda`; any device if there is only one process.
            timeout: minutes after which a process stops waiting for another.

        Raises:
            ConfigError: a single GPU is named for several processes.
            ProcessError: the other processes did not join.
        """
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else it waits for dead processes
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            state = PartialState(cpu=on_cpu, timeout=timedelta(minutes=timeout))
            if state.num_processes != expected:
                raise ValueError(f"{state.num_processes} of {expected} joined")
        except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
            raise ProcessError(
                f"the processes of the run could not connect: {_first_line(error)}. Each needs "
                "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `accelerate launch`, "
                "`torchrun` and run_scripts/ set them"
            ) from None
        if state.num_processes == 1:
            return cls(device=device)
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"model.device={device} is a single device, but there are {state.num_processes} "
                "processes; use auto, cpu or cuda"
            )
        own = "cpu" if state.device.type == "cpu" else str(state.device)
        return cls(state.num_processes, state.process_index, own)

    def shard(
        self, load: Callable[[], CircuitModel], meta_model: CircuitModel, *, offload: bool
    ) -> CircuitModel:
        """Load a model whose layers are split over the processes; only rank 0 ever holds all of it.

        Args:
            load: loads the model on the CPU; called by rank 0.
            meta_model: the same model without weights (see `load_meta_model`); it receives them.
            offload: whether the shards stay in the CPU's memory while they are not used.

        Raises:
            ConfigError: there is only one process.
            RankZeroFailed: on the other ranks, if it cannot be loaded.
            ProcessError: another process died or stopped responding.
        """
        if self.count == 1:
            raise ConfigError(
                "launcher.shard=true splits the model over several processes, but there is only "
                "one; start more (launcher.processes=N, torchrun, run_scripts/), or leave it out"
            )
        loaded: list[CircuitModel] = []
        self.on_rank_zero(lambda: loaded.append(load()))
        whole = loaded.pop() if loaded else None
        shard_model(
            meta_model,
            whole,
            init_device_mesh("cpu" if self.device == "cpu" else "cuda", (self.count,)),
            self.device,
            send=lambda tensor: self.collective(lambda: dist.broadcast(tensor, 0)),
            offload=offload,
        )
        return meta_model

    def close(self) -> None:
        """Leave the process group. A process that exits without may be aborted by others' exit.

        After sharding, gloo's threads stay alive. A thread that is just releasing a tensor needs
        the interpreter and aborts the process if it is gone, hence the short wait.
        """
        if self.count > 1 and dist.is_initialized():
            PartialState().destroy_process_group()
            time.sleep(0.1)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, ProcessError) and not isinstance(error, RankZeroFailed):
            return  # another process is dead, and leaving the group might wait for it
        if error is None or isinstance(error, Exception):
            self.close()

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def check_batch(self, size: int) -> None:
        """Raise ConfigError if a batch has fewer pairs than there are processes."""
        if size < self.count:
            raise ConfigError(
                f"a step has {size} pairs, fewer than the {self.count} processes; start fewer "
                "processes, or raise trainer.batch_size"
            )

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch; the parts differ in size by one at most.

        Raises:
            ConfigError: fewer items than processes.
        """
        self.check_batch(len(items))
        total, rank = len(items), self.rank
        return items[rank * total // self.count : (rank + 1) * total // self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float32 tensor by its sum over the processes, in one all-reduce.

        Raises:
            ProcessError: another process died or stopped responding.
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
        """Whether the flag is set on any process; also a barrier."""
        return sum(self._gather(int(flag))) > 0

    def from_rank_zero(self, number: int) -> int:
        """The number that rank 0 passed."""
        return self._gather(number)[0]

    def on_rank_zero(self, function: Callable[[], object]) -> None:
        """Call a function on rank 0 while the other processes wait.

        Raises:
            RankZeroFailed: on the other ranks, if it raises.
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
            raise RankZeroFailed("rank 0 cannot continue")

    def check_same(self, what: str, text: str) -> None:
        """Check that all processes were given the same.

        Args:
            what: names it in the message.
            text: is compared.

        Raises:
            ConfigError: the processes differ.
        """
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        if len(set(self._gather(number))) > 1:
            raise ConfigError(
                f"{what} of the {self.count} processes differ: give each the same command, without "
                "${now:} in it, and keep run_dir, data and model where every node sees them"
            )

    def _gather(self, number: int) -> list[int]:
        """The number of every process, by rank."""
        if self.count == 1:
            return [number]
        numbers = torch.zeros(self.count, dtype=torch.long, device=PartialState().device)
        numbers[self.rank] = number
        self.collective(lambda: dist.all_reduce(numbers))
        return numbers.tolist()

    def collective(self, function: Callable[[], Item]) -> Item:
        """Call a function that waits for other processes.

        Raises:
            ProcessError: another process died or stopped responding.
        """
        try:
            return function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ProcessError(
                f"another process of the run died or stopped responding: {_first_line(error)}. "
                "Messages of the other processes above may tell the reason; continue with the same "
                "command and resume=auto"
            ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
