"""Edge pruning computed in the published way, for comparison: the benchmark's engine `naive`.

One array holds the outboxes of all writers. A write multiplies the new outboxes into an array of
the same size and adds it. Queries, keys and values are read one after another, each with two
products over all writers: the clean outboxes with the gates, and the corrupted outboxes with one
minus the gates; the gates of later writers are masked. The input of every reader is normed, and
logits are computed at all positions. The same engine with all gates 1 gives the reference and the
corrupted outboxes. The published code additionally has node gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.graph import Site
from edgeprune.prompts import Batch


def run_pair(model: CircuitModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return reference logits, [batch, pos, vocabulary], and corrupted outboxes (see `run`)."""
    all_open = torch.ones(model.graph.num_edges, device=model.device)
    with torch.no_grad():
        reference, _ = run(model, batch.clean_ids, all_open, None)
        _, corrupted = run(model, batch.corrupted_ids, all_open, None)
    return reference, corrupted


def run(
    model: CircuitModel, ids: Tensor, gates: Tensor, corrupted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a model whose embeddings are writers, with a gate on every edge.

    Args:
        model: the model.
        ids: [batch, pos].
        gates: [edge] in [0, 1]; 1 = clean.
        corrupted: [writer, batch, pos, d_model]; None: edges with gate 0 carry zeros.

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
        site_gates = gates[site.place].view(shape).to(clean.dtype)

        def mix(values: Tensor, shares: Tensor) -> Tensor:
            shares = nn.functional.pad(shares, (0, graph.num_writers - site.num_writers))
            return torch.einsum("wbpd,rw->rbpd", values, shares)

        def mix_both(shares: Tensor) -> Tensor:
            mixed = mix(clean, shares)
            return mixed if corrupted is None else mixed + mix(corrupted, 1 - shares)

        return torch.cat([mix_both(shares) for shares in site_gates.split(site.groups)])

    write(embeddings)
    for layer, block in enumerate(architecture.blocks):
        values = attend(block, read(graph.sites[2 * layer]), inputs)
        write(block.head_delta(values, None, centred=False))
        x = read(graph.sites[2 * layer + 1])
        write(block.mlp(block.mlp_norm(x)))
    return architecture.logits(architecture.final_norm(read(graph.sites[-1])[0])), clean


def attend(block: Any, x: Tensor, inputs: Any) -> Tensor:
    """Run attention with the norm applied to every reader instead of folded into the weights."""
    norm, block.attention_norm = block.attention_norm, nn.Sequential(block.attention_norm)
    try:
        return block.attend(x, inputs)
    finally:
        block.attention_norm = norm
