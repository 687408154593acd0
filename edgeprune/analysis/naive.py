"""Edge pruning as published, to be compared with: what a benchmark calls the naive engine.

All outboxes lie in one array over all writers, which every write copies. A read is two products
over all of them, one with the clean values and the gates, one with the corrupted values and what
the gates leave; gates of writers that are not there yet are masked. Every reader's input is normed.
Logits are taken everywhere.
(Bhaskar et al. 2024, arXiv:2406.16778.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.dataset import Batch
from edgeprune.graph import Site
from edgeprune.modeling import Activations, CircuitModel
from edgeprune.modeling.model import Block


def run_pair(model: CircuitModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Reference logits, [batch, pos, vocabulary], and the corrupted outboxes (see `run`)."""
    with torch.no_grad():
        reference, _ = model.run_full(batch.clean_ids, slice(0))
        _, activations = model.run_full(batch.corrupted_ids, slice(None))
        return model.architecture.logits(reference), outboxes(model, activations)


def outboxes(model: CircuitModel, activations: Activations) -> Tensor:
    """[writer, batch, pos, d_model] of a pass of the whole model."""
    written = list(activations.embeddings)
    for layer, block in enumerate(model.architecture.blocks):
        written += block.head_delta(activations.head_values[layer], None, centred=False)
        written.append(activations.mlp_outputs[layer])
    return torch.stack(written)


def run(model: CircuitModel, batch: Batch, gates: Tensor, corrupted: Tensor) -> Tensor:
    """Run the model with a gate on every edge; the embeddings have to be writers.

    Args:
        batch: the prompts; the clean ones are run.
        gates: [edge] in [0, 1].
        corrupted: [writer, batch, pos, d_model].

    Returns:
        Logits, [batch, pos, vocabulary].
    """
    architecture, graph = model.architecture, model.graph
    embeddings = architecture.embed(batch.clean_ids)
    inputs = architecture.attention_inputs(embeddings[0])
    clean = torch.zeros_like(corrupted)
    num_written = 0

    def write(new: Tensor) -> None:
        nonlocal clean, num_written
        after = num_written + len(new)
        clean = torch.cat([clean[:num_written], new, clean[after:]])
        num_written = after

    def read(site: Site) -> Tensor:
        shape = (len(site.readers), site.num_writers)
        there = gates[site.edges].view(shape).to(clean.dtype)
        open_part = torch.nn.functional.pad(there, (0, graph.num_writers - site.num_writers))
        closed = torch.nn.functional.pad(1 - there, (0, graph.num_writers - site.num_writers))
        return torch.einsum("rw,wbpd->rbpd", open_part, clean) + torch.einsum(
            "rw,wbpd->rbpd", closed, corrupted
        )

    write(embeddings)
    for layer, block in enumerate(architecture.blocks):
        values = _attend(block, read(graph.sites[2 * layer]), inputs)
        write(block.head_delta(values, None, centred=False))
        x = read(graph.sites[2 * layer + 1])
        write(block.mlp(block.mlp_norm(x)))
    return architecture.logits(architecture.final_norm(read(graph.sites[-1])[0]))


def _attend(block: Block, x: Tensor, inputs: Any) -> Tensor:
    """With a norm that is called for every reader, not folded into the projections."""
    norm, block.attention_norm = block.attention_norm, nn.Sequential(block.attention_norm)
    try:
        return block.attend(x, inputs)
    finally:
        block.attention_norm = norm
