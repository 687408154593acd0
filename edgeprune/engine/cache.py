"""The full model's passes over a small training set, run once and kept."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.prompts import Batch, Pair, iterate_batches

MAX_KEPT = 2 * 2**30
"""Maximum size in bytes; the passes over a larger training set are run again in every step."""


class KeptPasses:
    """The results of `CircuitModel.run_pair` for any batch of a training set.

    The model is frozen, so reference logits and corrupted activations never change; they are half
    of a step's operations. Each pair is always run in the same batch (of `batch_size` pairs), so
    that a resumed run sees the same bits.
    """

    def __init__(
        self, model: CircuitModel, pairs: Sequence[Pair], batch_size: int, *, corrupted: bool
    ) -> None:
        width = max(len(pair.clean_ids) for pair in pairs)
        references: list[Tensor] = []
        order: list[Pair] = []
        self._activations: Activations | None = None
        for batch in iterate_batches(pairs, batch_size):
            reference, activations = model.run_pair(batch.to(model.device), corrupted=corrupted)
            references.append(reference)
            start = len(order)
            order += batch.pairs
            if activations is not None:
                new = activations.stacked()
                self._activations = self._activations or new.map(
                    lambda x: x.new_zeros(*x.shape[:-3], len(pairs), width, x.shape[-1])
                )
                at = (..., slice(start, len(order)), slice(batch.clean_ids.shape[1]), slice(None))
                self._activations.map(lambda kept, x, at=at: kept[at].copy_(x), new)
        self._row = {pair: row for row, pair in enumerate(order)}
        counts = [len(pair.target_ids) for pair in order]
        self._tokens = torch.arange(sum(counts)).split(counts)  # per pair, rows of the reference
        self._reference = torch.cat(references)

    @classmethod
    def where_they_fit(
        cls, model: CircuitModel, pairs: Sequence[Pair], batch_size: int, *, corrupted: bool
    ) -> Callable[[Batch], tuple[Tensor, Activations | None]]:
        """A `run_pair`: of kept passes, or the model's own if they would exceed `MAX_KEPT`."""
        if cls.size(model, pairs, corrupted=corrupted) > MAX_KEPT:
            return partial(model.run_pair, corrupted=corrupted)
        return cls(model, pairs, batch_size, corrupted=corrupted).run_pair

    @staticmethod
    def size(model: CircuitModel, pairs: Sequence[Pair], *, corrupted: bool) -> int:
        """Size of the kept passes in bytes."""
        arch, layers = model.architecture, model.graph.num_layers
        numbers = sum(len(pair.target_ids) for pair in pairs) * arch.body.config.vocab_size
        if corrupted:
            # embeddings, MLPs and sites; and the heads' values
            per_position = model.d_model * (len(arch.embeddings) + 3 * layers + 1)
            per_position += layers * model.graph.num_heads * arch.blocks[0].d_head
            numbers += len(pairs) * max(len(pair.clean_ids) for pair in pairs) * per_position
        return numbers * arch.body.get_input_embeddings().weight.element_size()

    def run_pair(self, batch: Batch) -> tuple[Tensor, Activations | None]:
        """See `CircuitModel.run_pair`."""
        device = self._reference.device
        rows = [self._row[pair] for pair in batch.pairs]
        tokens = torch.cat([self._tokens[row] for row in rows]).to(device, non_blocking=True)
        reference = self._reference[tokens]
        if self._activations is None:
            return reference, None
        at, length = torch.tensor(rows).to(device, non_blocking=True), batch.clean_ids.shape[1]
        # Selected before they are cut: index_select first copies whatever is not contiguous.
        return reference, self._activations.map(lambda x: x.index_select(-3, at)[..., :length, :])
