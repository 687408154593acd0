"""World: the processes that share a run (data parallel), started and joined through Accelerate.

Each process holds the model and the method's parameters, draws the same noise and the same batch,
runs its part of the batch, and sums its gradients with those of the others. All processes therefore
take the same step, which is the step of a single process. Rank 0 alone writes files.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError, ProcessError, RankZeroFailed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that share a run, seen from one of them. The default is a single process.

    As a context manager it leaves the process group at the end, unless another process is dead.
    Methods that wait for other processes raise ProcessError if one died or stopped responding.

    Attributes:
        count: number of processes.
        rank: index of this process, from 0.
        device: device of this process, or `auto`.
    """

    count: int = 1
    rank: int = 0
    device: str = "auto"

    @classmethod
    def join(cls, device: str, timeout: int) -> Self:
        """Join the processes that `accelerate launch`, `torchrun` or run_scripts/ have started.

        A process stops waiting for another after `timeout` minutes. All but rank 0 log errors only.
        """
        on_cpu = device.startswith("cpu") or not torch.cuda.is_available()
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else it waits for dead processes
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            state = PartialState(cpu=on_cpu, timeout=timedelta(minutes=timeout))
            if state.num_processes != expected:
                raise ValueError(f"{state.num_processes} of {expected} joined")
        except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
            raise ProcessError(
                f"the processes of the run could not connect: {_first_line(error)}. Each "
                "needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            ) from None
        if expected == 1:
            return cls(device=device)
        if state.process_index > 0:  # rank 0 speaks for all
            logging.getLogger("edgeprune").setLevel(logging.ERROR)
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"model.device={device} is one device, for {expected} processes")
        return cls(expected, state.process_index, "cpu" if on_cpu else str(state.device))

    def shard(
        self, load: Callable[[], CircuitModel], meta_model: CircuitModel, *, offload: bool
    ) -> CircuitModel:
        """Split a model's layers over the processes; only rank 0, which loads it, holds all of it.

        `meta_model` (see `load_meta_model`) receives the weights and is returned. With `offload`,
        shards stay in the CPU's memory while they are not used.
        """
        if self.count == 1:
            raise ConfigError("launcher.shard=true needs several processes, but there is only one")
        from edgeprune.scale.sharding import shard_model  # importing FSDP takes .4 seconds

        whole = self.on_rank_zero(load)
        mesh = init_device_mesh("cpu" if self.device == "cpu" else "cuda", (self.count,))

        def send(tensor: Tensor) -> None:
            self.collective(lambda: dist.broadcast(tensor, 0))

        shard_model(meta_model, whole, mesh, self.device, send=send, offload=offload)
        return meta_model

    def close(self) -> None:
        """Leave the process group; without, the exit of other processes may abort this one."""
        if self.count > 1 and dist.is_initialized():
            PartialState().destroy_process_group()
            time.sleep(0.1)  # gloo's threads abort if they release tensors after the interpreter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        is_dead = isinstance(error, ProcessError) and not isinstance(error, RankZeroFailed)
        if isinstance(error, Exception | None) and not is_dead:  # leaving may wait for the dead
            self.close()

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch; the parts differ in size by one at most."""
        total, rank = len(items), self.rank
        return items[rank * total // self.count : (rank + 1) * total // self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float32 tensor by its sum over the processes, in one all-reduce."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.collective(lambda: dist.all_reduce(flat))
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; also a barrier."""
        if self.count == 1:
            return flag
        num_set = torch.tensor(float(flag), device=self.device)
        self.sum([num_set])
        return num_set.item() > 0

    def on_rank_zero(self, function: Callable[[], T]) -> T | None:
        """Call a function on rank 0 and return its result there; the other processes wait.

        If it raises, the other processes raise RankZeroFailed.
        """
        result = failure = None
        try:
            if self.is_rank_zero:
                result = function()
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            raise failure or RankZeroFailed("rank 0 cannot continue")
        return result

    def check_same(self, what: str, text: str) -> None:
        """Raise ConfigError, which names `what`, if the processes were given different texts."""
        texts = [text] * self.count
        if self.count > 1:
            self.collective(lambda: dist.all_gather_object(texts, text))
        if len(set(texts)) > 1:
            raise ConfigError(
                f"{what} of the {self.count} processes differ: give each the same command and files"
            )

    def collective(self, function: Callable[[], T]) -> T:
        """Call a function that waits for other processes."""
        try:
            return function()
        except (torch.OutOfMemoryError, ProcessError):
            raise
        except RuntimeError as error:
            raise ProcessError(
                f"another process of the run died or stopped responding: {_first_line(error)}. "
                "Continue with the same command and resume=auto"
            ) from None

    def run(self, model: CircuitModel, function: Callable[[], T]) -> T:
        """Call a function that runs the model, which waits for other processes if it is sharded."""
        if self.count == 1:
            return function()
        from edgeprune.scale.sharding import is_sharded

        is_waiting = is_sharded(model.architecture.blocks[0].layer)
        return self.collective(function) if is_waiting else function()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
