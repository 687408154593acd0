"""Edge pruning as published, to be compared with: what a benchmark calls the naive engine.

All outboxes lie in one array over all writers. A write is a product that puts what is new in its
place of an array as large, which is added. Queries, keys and values are read one after another,
each by two products over all writers: one with the clean values and the gates, one with the
corrupted values and what the gates leave; gates of writers that are not there yet are masked. Every
reader's input is normed. Logits are taken everywhere. The reference and the corrupted outboxes come
from the same engine with all gates open. The published code has node gates besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.engine.circuit_model import Block
from edgeprune.graph import Site
from edgeprune.models import CircuitModel
from edgeprune.prompts import Batch


def run_pair(model: CircuitModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Reference logits, [batch, pos, vocabulary], and the corrupted outboxes (see `run`)."""
    everything = torch.ones(model.graph.num_edges, device=model.device)
    with torch.no_grad():
        reference, _ = run(model, batch.clean_ids, everything, None)
        _, corrupted = run(model, batch.corrupted_ids, everything, None)
    return reference, corrupted


def run(
    model: CircuitModel, ids: Tensor, gates: Tensor, corrupted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the model with a gate on every edge; the embeddings have to be writers.

    Args:
        ids: [batch, pos].
        gates: [edge] in [0, 1].
        corrupted: [writer, batch, pos, d_model]; None: closed edges carry nothing.

    Returns:
        Logits, [batch, pos, vocabulary], and the outboxes, [writer, batch, pos, d_model].
    """
    architecture, graph = model.architecture, model.graph
    embeddings = architecture.embed(ids)
    inputs = architecture.attention_inputs(embeddings[0])
    clean = embeddings.new_zeros(graph.num_writers, *embeddings.shape[1:])
    places = torch.eye(graph.num_writers, dtype=clean.dtype, device=clean.device)
    num_written = 0

    def write(new: Tensor) -> None:
        nonlocal clean, num_written
        first, num_written = num_written, num_written + len(new)
        clean = clean + torch.einsum("nbpd,nw->wbpd", new, places[first:num_written])

    def read(site: Site) -> Tensor:
        shape = (len(site.readers), site.num_writers)
        there = gates[site.place].view(shape).to(clean.dtype)

        def mix(values: Tensor, shares: Tensor) -> Tensor:
            shares = nn.functional.pad(shares, (0, graph.num_writers - site.num_writers))
            return torch.einsum("wbpd,rw->rbpd", values, shares)

        def mix_both(shares: Tensor) -> Tensor:
            mixed = mix(clean, shares)
            return mixed if corrupted is None else mixed + mix(corrupted, 1 - shares)

        return torch.cat([mix_both(shares) for shares in there.split(site.groups)])

    write(embeddings)
    for layer, block in enumerate(architecture.blocks):
        values = _attend(block, read(graph.sites[2 * layer]), inputs)
        write(block.head_delta(values, None, centred=False))
        x = read(graph.sites[2 * layer + 1])
        write(block.mlp(block.mlp_norm(x)))
    return architecture.logits(architecture.final_norm(read(graph.sites[-1])[0])), clean


def _attend(block: Block, x: Tensor, inputs: Any) -> Tensor:
    """With a norm that is called for every reader, not folded into the projections."""
    norm, block.attention_norm = block.attention_norm, nn.Sequential(block.attention_norm)
    try:
        return block.attend(x, inputs)
    finally:
        block.attention_norm = norm
