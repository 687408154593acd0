"""The engine written straight from the spec's equation, slowly: what the fast one must agree with.

Every reader sums gate * clean + (1 - gate) * corrupted over its writers, one at a time; outboxes of
heads are computed with the projection's slice and an equal share of its bias.
"""

import torch
from torch import Tensor

from edgeprune.masks import Gates


def head_outboxes(attention, q_in: list[Tensor], k_in: list[Tensor], v_in: list[Tensor]):
    """One outbox a head of a GPT-2 layer, from the normed input of each head's q, k and v."""
    num_heads, d_head = attention.num_heads, attention.head_dim
    weight, bias = attention.c_attn.weight, attention.c_attn.bias
    d_model = num_heads * d_head
    outboxes = []
    for head in range(num_heads):
        columns = slice(head * d_head, (head + 1) * d_head)
        q, k, v = (
            x[head] @ weight[:, part * d_model :][:, columns] + bias[part * d_model :][columns]
            for part, x in enumerate((q_in, k_in, v_in))
        )
        scores = q @ k.transpose(-1, -2) * attention.scaling
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        values = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        project = attention.c_proj
        outboxes.append(values @ project.weight[columns] + project.bias / num_heads)
    return outboxes


def run_gpt2(model, ids: Tensor, gates: Gates, graph, corrupted: list[Tensor] | None):
    """Returns (logits [batch, pos, vocabulary], outboxes of all writers)."""
    transformer = model.transformer
    gate_of = dict(zip(graph.edges(), gates.edge, strict=True))
    tokens = transformer.wte(ids)
    positions = transformer.wpe(torch.arange(ids.shape[1])).expand_as(tokens)
    embeddings = [tokens, positions]
    always_on = 0 if graph.embedding_writers else tokens + positions
    outboxes: list[Tensor] = []

    def write(values: list[Tensor]) -> None:
        for x in values:
            index = len(outboxes)
            if gates.node is not None:
                n = gates.node[index]
                x = n * x + (1 - n) * (0 if corrupted is None else corrupted[index])
            outboxes.append(x)

    def read(reader: str) -> Tensor:
        total = torch.zeros_like(tokens) + always_on
        for index, x in enumerate(outboxes):
            gate = gate_of[graph.writers[index], reader]
            total = total + gate * x + (1 - gate) * (0 if corrupted is None else corrupted[index])
        return total

    if graph.embedding_writers:
        write(embeddings)
    for layer, block in enumerate(transformer.h):
        inputs = [
            [block.ln_1(read(f"a{layer}.h{h}.{kind}")) for h in range(graph.num_heads)]
            for kind in "qkv"
        ]
        write(head_outboxes(block.attn, *inputs))
        write([block.mlp(block.ln_2(read(f"m{layer}")))])
    return model.lm_head(transformer.ln_f(read("resid_post"))), outboxes


def all_open(graph) -> Gates:
    return Gates(torch.ones(graph.num_edges), None)
