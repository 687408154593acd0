"""The whole model's passes over a small training set, done once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.prompts import Batch, Pair, iterate_batches

MAX_KEPT = 2 * 2**30
"""Bytes; the passes over a larger training set are run anew each step."""


class KeptPasses:
    """What `CircuitModel.run_pair` gives, for any batch of a training set, without running.

    The model is frozen, so its reference logits and corrupted activations never change; they are
    half of a step's operations. Every pair is run in the same company whatever is asked for first,
    so that a resumed run sees the same bits.

    Args:
        model: the model.
        pairs: the training set.
        batch_size: pairs a forward pass.
        corrupted: whether the corrupted prompts are run, too.
    """

    def __init__(
        self, model: CircuitModel, pairs: Sequence[Pair], batch_size: int, *, corrupted: bool
    ) -> None:
        width = max(len(pair.clean_ids) for pair in pairs)
        references: list[Tensor] = []
        self._row: dict[Pair, int] = {}
        self._tokens: list[Tensor] = []  # of each pair, its rows of the reference
        self._activations: Activations | None = None
        for batch in iterate_batches(pairs, batch_size):
            reference, activations = model.run_pair(batch.to(model.device), corrupted=corrupted)
            start, length = len(self._tokens), batch.clean_ids.shape[1]
            rows = slice(start, start + len(batch.pairs))
            if activations is not None:
                self._keep(activations.stacked(), len(pairs), width, rows, length)
            first = sum(len(r) for r in references)
            for row, pair in enumerate(batch.pairs):
                self._row[pair] = start + row
                self._tokens.append(torch.arange(first, first + len(pair.target_ids)))
                first += len(pair.target_ids)
            references.append(reference)
        self._reference = torch.cat(references)

    def _keep(
        self, activations: Activations, num_pairs: int, width: int, rows: slice, length: int
    ) -> None:
        if self._activations is None:
            self._activations = activations.map(
                lambda x: x.new_zeros(*x.shape[:-3], num_pairs, width, x.shape[-1])
            )
        self._activations.map(lambda kept, new: kept[..., rows, :length, :].copy_(new), activations)

    @classmethod
    def where_they_fit(
        cls, model: CircuitModel, pairs: Sequence[Pair], batch_size: int, *, corrupted: bool
    ) -> Callable[[Batch], tuple[Tensor, Activations | None]]:
        """A `run_pair`: the model's own where `MAX_KEPT` is too little."""
        if cls.size(model, pairs, corrupted=corrupted) > MAX_KEPT:
            return partial(model.run_pair, corrupted=corrupted)
        return cls(model, pairs, batch_size, corrupted=corrupted).run_pair

    @staticmethod
    def size(model: CircuitModel, pairs: Sequence[Pair], *, corrupted: bool) -> int:
        """Bytes that keeping takes."""
        config, graph = model.architecture.body.config, model.graph
        d_heads = model.architecture.blocks[0].d_head * graph.num_heads
        sites = 2 * graph.num_layers + 1
        of_position = (
            len(model.architecture.embedding_writers) + graph.num_layers + sites
        ) * config.hidden_size + graph.num_layers * d_heads
        width = max(len(pair.clean_ids) for pair in pairs)
        predicted = sum(len(pair.target_ids) for pair in pairs)
        numbers = predicted * config.vocab_size
        if corrupted:
            numbers += len(pairs) * width * of_position
        return numbers * model.architecture.body.get_input_embeddings().weight.element_size()

    def run_pair(self, batch: Batch) -> tuple[Tensor, Activations | None]:
        """See `CircuitModel.run_pair`."""
        device = self._reference.device
        rows = [self._row[pair] for pair in batch.pairs]
        tokens = torch.cat([self._tokens[row] for row in rows]).to(device, non_blocking=True)
        reference = self._reference[tokens]
        if self._activations is None:
            return reference, None
        index = torch.tensor(rows).to(device, non_blocking=True)
        length = batch.clean_ids.shape[1]
        return reference, self._activations.map(
            lambda x: x[..., :length, :].index_select(x.dim() - 3, index)
        )
