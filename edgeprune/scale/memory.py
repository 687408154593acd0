"""The memory that pruning a model takes, computed from shapes, and the memory that is free."""

import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from edgeprune.engine.cache import MAX_KEPT, KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel, lookaheads
from edgeprune.models.load import pick_device
from edgeprune.prompts import Batch, Pair, collate

MASK_COPIES = 8
"""Float32 numbers per edge: score, gradient, two moments; noise or slope, gate, two gradients."""

WORKING_COPIES = 3
"""Size of a running block's temporary tensors, in saved blocks; measured on the CPU."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per process at the peak of a step, the beginning of the backward pass."""

    weights: int  # the model's weights; if sharded, the process's shard and one whole layer
    outboxes: int  # deltas and their gradients, the readers' inputs, and temporary products
    blocks: int  # what the blocks save for the backward pass
    working: int  # temporary tensors while one block runs or is differentiated
    corrupted: int  # ablation values and logits
    masks: int  # scores, their gradients and the optimiser's state
    kept: int  # kept passes over the training set, see `KeptPasses`

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {in_gb(size)}" for name, size in vars(self).items())
        return f"{in_gb(self.total)} ({parts})"


def plan_memory(
    model: CircuitModel,
    pairs: Sequence[Pair],
    batch_size: int,
    *,
    recompute: bool = False,
    shares: int = 1,
    offload: bool = False,
    bits: int | None = None,
    corrupted_kept: bool = True,
    repeated: bool = True,
) -> MemoryPlan:
    """Plan a step on the longest prompts: run it on the meta device and count what it saves.

    Args:
        model: from `load_meta_model`.
        pairs: the training set.
        batch_size: pairs that this process runs at a time.
        recompute: whether the backward pass recomputes the blocks.
        shares: number of processes over which the layers are split.
        offload: whether the shards are kept in the CPU's memory.
        bits: bits per weight of the layers' matrices; None: as the model's dtype.
        corrupted_kept: whether kept passes include activations on the corrupted prompts.
        repeated: whether pairs are used more than once; otherwise no passes are kept.
    """
    num_layers = model.graph.num_layers
    longest = max(pairs, key=lambda pair: len(pair.clean_ids))
    batch = collate([longest] * min(batch_size, len(pairs))).to("meta")
    corrupted = _empty_activations(model, batch)
    blocks = _saved_bytes(model, batch, corrupted, bits)
    working = WORKING_COPIES * blocks // num_layers
    if recompute:  # only the blocks and inputs of one look-ahead exist at a time
        blocks = blocks * len(lookaheads(model.graph)[0]) // num_layers
        model.release()
        _run_step(model, batch, corrupted, recompute=True)
    # the reference, the circuit's logits, and log-probabilities of one of them
    num_logits = 3 * len(batch.rows) * model.architecture.unembed.out_features
    kept = KeptPasses.size(model, pairs, corrupted=corrupted_kept)
    return MemoryPlan(
        weights=_weight_bytes(model, shares, offload, bits),
        outboxes=sum(buffer.nbytes for buffer in model.workspace.buffers.values()),
        blocks=blocks,
        working=working,
        corrupted=sum(tensor.nbytes for tensor in _tensors_of(corrupted)) + 4 * num_logits,
        masks=MASK_COPIES * 4 * model.graph.num_edges,
        kept=kept if repeated and kept <= MAX_KEPT else 0,
    )


def free_memory(device: str) -> int:
    """Bytes that this process may still allocate, on its GPU or as its share of the machine."""
    device = pick_device(device)
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(psutil.virtual_memory().available, memory_allowed())) // num_processes


def memory_allowed(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes that this process's control groups (version 2) still allow; infinity without a limit.

    The limit of a container or a SLURM job is set on the process's group or one of its parents.
    They are mounted at `root`; `own` names the group, as "0::/path". Unused cached files are free.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group, allowed = root / path.strip("/"), math.inf
    for folder in (group, *group.parents):
        try:
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
        allowed = min(allowed, max(0, limit - used + int(stat.get("inactive_file", 0))))
    return allowed


def in_gb(size: int) -> str:
    """A number of bytes for display, in GB."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e9:.3f} GB"


def _weight_bytes(model: CircuitModel, shares: int, offload: bool, bits: int | None) -> int:
    def layer_bytes(layer: torch.nn.Module, bits: int | None = None) -> int:
        return sum(
            tensor.nbytes if bits is None or tensor.dim() < 2 else tensor.numel() * bits // 8
            for tensor in (*layer.parameters(), *layer.buffers())
        )

    modules = [block.layer for block in model.architecture.blocks]
    outside = sum(x.nbytes for x in _weights(model).values()) - sum(map(layer_bytes, modules))
    layers = [layer_bytes(layer, bits) for layer in modules]
    if shares == 1:
        return outside + sum(layers)
    return outside + max(layers) + (0 if offload else sum(layers) // shares)


def _memory(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    return tensor.untyped_storage()._cdata


def _weights(model: CircuitModel) -> dict[int, Tensor]:
    """Parameters and buffers by the identity of their memory; tied ones count once."""
    modules = (model.architecture.body, model.architecture.unembed)
    return {_memory(x): x for m in modules for x in (*m.parameters(), *m.buffers())}


def _saved_bytes(
    model: CircuitModel, batch: Batch, corrupted: Activations, bits: int | None
) -> int:
    """Bytes that the blocks save for the backward pass of a step."""
    known = {*_weights(model), *map(_memory, _tensors_of(corrupted))}
    if bits is not None:  # heads dequantise their matrices and save them
        for block in model.architecture.blocks:
            known -= set(map(_memory, block.attention.parameters()))
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[_memory(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        _run_step(model, batch, corrupted, recompute=False)
    known |= set(map(_memory, model.workspace.buffers.values()))
    return sum(storage.nbytes() for memory, storage in saved.items() if memory not in known)


def _run_step(model: CircuitModel, batch: Batch, corrupted: Activations, recompute: bool) -> None:
    gates = torch.ones(model.graph.num_edges, device="meta", requires_grad=True)
    with torch.enable_grad():
        model.run_circuit(batch, gates, corrupted, recompute=recompute).sum().backward()


def _tensors_of(x: Activations) -> list[Tensor]:
    return [x.embeddings, *x.head_values, *x.mlp_outputs, *x.residuals]


def _empty_activations(model: CircuitModel, batch: Batch) -> Activations:
    """The activations of `run_pair`; the full model's own code does not run on the meta device."""
    arch, layers = model.architecture, model.graph.num_layers
    embeddings = arch.embed(batch.clean_ids)  # [embedding, batch, pos, d_model]
    batch_pos, d_model = embeddings.shape[1:3], embeddings.shape[3]

    def empty(count: int, width: int) -> list[Tensor]:
        return [embeddings.new_empty(*batch_pos, width) for _ in range(count)]

    heads = empty(layers, model.graph.num_heads * arch.blocks[0].d_head)
    return Activations(embeddings, heads, empty(layers, d_model), empty(2 * layers + 1, d_model))
