"""A slow engine written from the definition, with which the fast one must agree.

Every reader sums gate * clean + (1 - gate) * corrupted over its writers, one at a time. A head's
outbox is its slice of the output projection plus an equal share of the bias.
"""

import torch
from torch import Tensor


def head_outboxes(attention, q_in: list[Tensor], k_in: list[Tensor], v_in: list[Tensor]):
    """The heads' outboxes of a GPT-2 layer, given the normed inputs of each head's q, k and v."""
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


def run_gpt2(model, graph, ids: Tensor, gates=None, ablated=None):
    """Run a GPT-2 with gates.

    Args:
        model: of Hugging Face.
        graph: its CircuitGraph.
        ids: [batch, pos].
        gates: [edge]; None: all 1.
        ablated: per writer, what an edge with gate 0 carries; None: zeros.

    Returns:
        Logits, [batch, pos, vocabulary], and the writers' outboxes, [batch, pos, d_model] each.
    """
    transformer = model.transformer
    tokens = transformer.wte(ids)
    positions = transformer.wpe(torch.arange(ids.shape[1])).expand_as(tokens)
    stream = Stream({"tok_embeds": tokens, "pos_embeds": positions}, graph, gates, ablated)
    for layer, block in enumerate(transformer.h):
        inputs = [
            [block.ln_1(stream.read(f"a{layer}.h{h}.{kind}")) for h in range(graph.num_heads)]
            for kind in "qkv"
        ]
        stream.write(head_outboxes(block.attn, *inputs))
        stream.write([block.mlp(block.ln_2(stream.read(f"m{layer}")))])
    return model.lm_head(transformer.ln_f(stream.read("resid_post"))), stream.outboxes


def run_llama(model, graph, ids: Tensor, gates=None, ablated=None):
    """Run a model of the Llama family; see `run_gpt2`.

    Each head's q, k and v are slices of the whole projection of its input.
    """
    body = model.model
    tokens = body.embed_tokens(ids)
    stream = Stream({"embeds": tokens}, graph, gates, ablated)
    pos = torch.arange(ids.shape[1])
    for layer, block in enumerate(body.layers):
        attention = block.self_attn
        own_type = [attention.layer_type] if hasattr(body.rotary_emb, "layer_types") else []
        cos_sin = body.rotary_emb(tokens, pos[None], *own_type)
        norms_output = hasattr(block, "pre_feedforward_layernorm")
        d_head = attention.head_dim
        seen = pos[:, None] >= pos
        if sliding(model.config, layer):
            seen = seen & (pos[:, None] - pos < model.config.sliding_window)

        def part(
            kind: str, reader: int, attention=attention, block=block, layer=layer, cos_sin=cos_sin
        ) -> Tensor:
            x = block.input_layernorm(stream.read(f"a{layer}.h{reader}.{kind}"))
            num_heads = graph.num_heads if kind == "q" else model.config.num_key_value_heads
            readers_per_head = (graph.num_heads if kind == "q" else graph.num_kv_heads) // num_heads
            head = reader // readers_per_head
            columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            projected = getattr(attention, f"{kind}_proj")(x)[..., columns]
            if kind != "v" and hasattr(attention, "q_norm"):
                projected = getattr(attention, f"{kind}_norm")(projected)
            return rotate(projected, *cos_sin) if kind != "v" else projected

        keys, values = ([part(kind, h) for h in range(graph.num_kv_heads)] for kind in "kv")
        outboxes = []
        for head in range(graph.num_heads):
            shared = head // graph.heads_per_kv_head
            scores = part("q", head) @ keys[shared].transpose(-1, -2) * attention.scaling
            cap = getattr(attention, "attn_logit_softcapping", None)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[shared]
            project = attention.o_proj
            outbox = mixed @ project.weight[:, head * d_head : (head + 1) * d_head].T
            bias = 0 if project.bias is None else project.bias / graph.num_heads
            outboxes.append(outbox + bias)
        if norms_output:
            norm = block.post_attention_layernorm
            size = (sum(outboxes).square().mean(-1, keepdim=True) + norm.eps).sqrt()
            outboxes = [(1 + norm.weight) * x / size for x in outboxes]
        stream.write(outboxes)
        x = stream.read(f"m{layer}")
        if norms_output:
            x = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
        else:
            x = block.mlp(block.post_attention_layernorm(x))
        stream.write([x])
    logits = model.lm_head(body.norm(stream.read("resid_post")))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap), stream.outboxes


def sliding(config, layer: int) -> bool:
    types = getattr(config, "layer_types", None)
    if types:
        return types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Stream:
    """The outboxes written so far."""

    def __init__(self, embeddings: dict[str, Tensor], graph, gates, ablated) -> None:
        gates = torch.ones(graph.num_edges) if gates is None else gates
        self.gate_of = dict(zip(graph.edges, gates, strict=True))
        self.graph, self.ablated = graph, ablated
        self.outboxes = [embeddings[name] for name in graph.embedding_writers]
        self.always_on = sum(x for name, x in embeddings.items() if name not in graph.writers)

    def write(self, values: list[Tensor]) -> None:
        self.outboxes += values

    def read(self, reader: str) -> Tensor:
        total = self.always_on
        for index, clean in enumerate(self.outboxes):
            gate = self.gate_of[self.graph.writers[index], reader]
            ablated = 0 if self.ablated is None else self.ablated[index]
            total = total + gate * clean + (1 - gate) * ablated
        return total
