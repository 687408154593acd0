"""How much memory pruning a model takes, told from its shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from edgeprune.engine.cache import MAX_KEPT, KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel, lookaheads
from edgeprune.prompts import Batch, Pair, collate

MASK_COPIES = 8
"""Numbers for each edge: log alpha, gradient, two moments; noise, gates and their gradients."""

WORKING_COPIES = 3
"""Measured on the CPU: the peak is a few times one block's kept values above what is kept."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that each process needs at the peak of a step, the beginning of the backward pass.

    Attributes:
        weights: of the model; with shares, its own and one whole layer.
        outboxes: the writers' deltas and their gradients, the readers' inputs, and what products
            are put into on their way there.
        blocks: what the blocks keep for the backward pass.
        working: what comes and goes while one block runs or is differentiated.
        corrupted: what closed edges carry, and the logits.
        masks: log alphas, their gradients and the optimiser's state.
        kept: kept passes over the training set (see `KeptPasses`).
    """

    weights: int
    outboxes: int
    blocks: int
    working: int
    corrupted: int
    masks: int
    kept: int

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
) -> MemoryPlan:
    """Plan a step on the longest prompts.

    The circuit's pass is run on the meta device, where tensors have a shape and no values, and what
    it would keep is counted.

    Args:
        model: from `load_meta_model`.
        pairs: the training set.
        batch_size: pairs that this process runs at a time.
        recompute: whether the backward pass runs blocks again.
        shares: processes over which the layers are split; 1: they are not.
        offload: whether the shares lie elsewhere.
        bits: of the layers' matrices; None: as the model's dtype.
        corrupted_kept: whether kept passes are to hold activations on the corrupted prompts.
    """
    longest = max(pairs, key=lambda pair: len(pair.clean_ids))
    batch = collate([longest] * min(batch_size, len(pairs))).to("meta")
    corrupted = _activations(model, batch)
    weights = {
        tensor.untyped_storage()._cdata: tensor
        for module in (model.architecture.body, model.architecture.unembed)
        for tensor in (*module.parameters(), *module.buffers())
    }
    in_layers = [_size_of_layer(block.layer, bits) for block in model.architecture.blocks]
    outside = sum(tensor.nbytes for tensor in weights.values()) - sum(
        _size_of_layer(block.layer, None) for block in model.architecture.blocks
    )
    if shares == 1:
        held = sum(in_layers)
    else:
        held = max(in_layers) + (0 if offload else sum(in_layers) // shares)

    known = {*weights, *_storages(corrupted)}
    if bits is not None:  # heads unpack their matrices and keep them for the backward pass
        known -= {
            weight.untyped_storage()._cdata
            for block in model.architecture.blocks
            for weight in block.attention.parameters()
        }
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    gates = torch.ones(model.graph.num_edges, device="meta", requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model.run_circuit(batch, gates, corrupted)
        logits.sum().backward()  # takes buffers too
    for buffer in model.workspace.buffers:
        saved.pop(buffer.untyped_storage()._cdata, None)
    blocks = sum(storage.nbytes() for storage in saved.values())
    working = WORKING_COPIES * blocks // model.graph.num_layers
    if recompute:  # only one look-ahead's are there at a time, and the inputs that it reads
        of_stretch = max(len(layers) for layers in lookaheads(model.graph))
        blocks = blocks * of_stretch // model.graph.num_layers
        model.release()
        with torch.enable_grad():
            model.run_circuit(batch, gates, corrupted, recompute=True).sum().backward()
    buffers = model.workspace.buffers
    kept = KeptPasses.size(model, pairs, corrupted=corrupted_kept)
    return MemoryPlan(
        weights=outside + held,
        outboxes=sum(buffer.nbytes for buffer in buffers),
        blocks=blocks,
        working=working,
        corrupted=sum(s.nbytes() for s in _storages(corrupted).values())
        + 3 * logits.numel() * 4,  # the reference, the circuit's, and one's log-probabilities
        masks=MASK_COPIES * 4 * model.graph.num_edges,
        kept=kept if kept <= MAX_KEPT else 0,
    )


def _storages(activations: Activations) -> dict[int, torch.UntypedStorage]:
    """The memory that activations take, by identity."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    activations.map(note)
    return storages


def _activations(model: CircuitModel, batch: Batch) -> Activations:
    """What `run_pair` gives, by shape: the whole model's own code does not run on meta."""
    arch, graph = model.architecture, model.graph
    embeddings = arch.embed(batch.clean_ids)  # [embedding writer, batch, pos, d_model]
    stream = embeddings[0]
    values = stream.new_empty(*stream.shape[:2], graph.num_heads * arch.blocks[0].d_head)

    def each(like: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(like) for _ in range(count))

    layers = graph.num_layers
    return Activations(
        embeddings, each(values, layers), each(stream, layers), each(stream, 2 * layers + 1)
    )


def _size_of_layer(layer: nn.Module, bits: int | None) -> int:
    return sum(
        tensor.nbytes if bits is None or tensor.dim() < 2 else tensor.numel() * bits // 8
        for tensor in (*layer.parameters(), *layer.buffers())
    )


def in_gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e9:.3f} GB"
