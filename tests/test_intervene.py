"""Reading and changing activations by name, against hooks written by hand on the stock model."""

from contextlib import ExitStack

import pytest
import torch
from conftest import random_gpt2
from test_llama import FAMILIES, random_llama

from edgeprune.errors import ConfigError, DataError
from edgeprune.models.load import load_model, wrap_model

NAMES = ["gpt2", *FAMILIES]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
OTHER = torch.tensor([[5, 5, 7, 2, 1, 9, 9, 4], [3, 2, 1, 0, 6, 6, 7, 8]])
LAYER, HEAD = 1, 1


def stock_model(name: str):
    if name == "gpt2":
        return random_gpt2(attn_implementation="eager")
    return random_llama(FAMILIES[name], "eager")


class Stock:
    """The parts of a loaded model, named by hand."""

    def __init__(self, hf_model):
        self.hf_model, config = hf_model, hf_model.config
        self.is_gpt2 = config.model_type == "gpt2"
        self.body = hf_model.transformer if self.is_gpt2 else hf_model.model
        self.layer = (self.body.h if self.is_gpt2 else self.body.layers)[LAYER]
        self.attention = self.layer.attn if self.is_gpt2 else self.layer.self_attn
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", self.num_heads)
        self.d_head = self.attention.head_dim
        normed = getattr(self.layer, "post_feedforward_layernorm", None)
        self.mlp = normed or self.layer.mlp
        self.heads_norm = self.layer.post_attention_layernorm if normed is not None else None
        self.output = self.attention.c_proj if self.is_gpt2 else self.attention.o_proj

    def logits(self, ids, *hooks):
        """Logits with (module, kind of hook, function)s in place."""
        with torch.no_grad(), ExitStack() as stack:
            for module, kind, function in hooks:
                stack.enter_context(getattr(module, f"register_forward_{kind}")(function))
            return self.hf_model(ids, use_cache=False).logits

    def capture(self, ids, module, of_input=False):
        kept = []
        kind, hook = "hook", lambda m, args, out: kept.append(out)
        if of_input:
            kind, hook = "pre_hook", lambda m, args: kept.append(args[0])
        self.logits(ids, (module, kind, hook))
        return kept[0].detach()

    def projection(self, part):
        """(module, how to change the part in its output): before rotation, which is linear."""
        head = HEAD if part == "q" else 0
        a, d = self.attention, self.d_head
        place = slice(head * d, (head + 1) * d)
        if self.is_gpt2:
            start = "qkv".index(part) * self.num_heads * d
            return a.c_attn, lambda x: x[..., start + place.start : start + place.stop]
        if part != "v" and hasattr(a, f"{part}_norm"):
            # [batch, pos, head, d_head] in Qwen 3, [batch, head, pos, d_head] in Gemma 3
            return getattr(a, f"{part}_norm"), lambda x: x.select(2 if x.shape[1] == 8 else 1, head)
        return getattr(a, f"{part}_proj"), lambda x: x[..., place]


@pytest.fixture(params=NAMES)
def pair(request):
    hf_model = stock_model(request.param)
    return wrap_model(hf_model), Stock(hf_model)


def changed(model, changes, ids=IDS):
    with torch.no_grad(), model.intervene(changes) as run:
        return run(ids)[0]


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def assert_matters(stock, logits):
    assert (logits - stock.logits(IDS)).abs().max() > 1e-3


def test_reading_changes_nothing(pair):
    model, stock = pair
    names = [*model.graph.writers, "a1.resid", "m1.resid", "resid_post", "a1.h1.q", "a1.h0.k",
             "a1.h0.v", "a1.h1.pattern"]  # fmt: skip
    with model.intervene() as run:
        logits, activations = run(IDS, names)
        assert [*activations] == names
    assert_close(logits.detach(), stock.logits(IDS))
    total = sum(activations[name] for name in model.graph.writers)
    assert_close(total.detach(), activations["resid_post"].detach())  # the outputs add up
    assert_close(activations["a1.resid"].detach(), stock.capture(IDS, stock.layer, of_input=True))
    assert_close(activations["m1"].detach(), stock.capture(IDS, stock.mlp))
    pattern = activations["a1.h1.pattern"]
    assert_close(pattern.sum(-1), torch.ones(2, 8))
    assert_close(logits.detach(), stock.logits(IDS))  # no hook is left behind
    assert not any(module._forward_hooks for module in stock.hf_model.modules())


def test_patterns_are_the_library_s(pair):
    model, stock = pair
    stock.hf_model.config.output_attentions = True
    wanted = stock.body(IDS, use_cache=False, output_attentions=True).attentions[LAYER][:, HEAD]
    with torch.no_grad(), model.intervene() as run:
        got = run(IDS, ["a1.h1.pattern"])[1]["a1.h1.pattern"]
    assert_close(got, wanted.detach())


def test_a_head_is_removed(pair):
    """Zero its values, and its share of the bias; for normed sums, keep the norm's factor."""
    model, stock = pair
    place = slice(HEAD * stock.d_head, (HEAD + 1) * stock.d_head)

    def zero(module, args):
        x = args[0].clone()
        x[..., place] = 0
        return (x,)

    if stock.heads_norm is None:
        share = 0 if stock.output.bias is None else stock.output.bias / stock.num_heads
        hooks = [(stock.output, "pre_hook", zero),
                 (stock.output, "hook", lambda m, args, out: out - share)]  # fmt: skip
    else:
        norm, weight = stock.heads_norm, stock.output.weight[:, place]
        values = stock.capture(IDS, stock.output, of_input=True)[..., place]

        def without(module, args, out):
            whole = args[0]
            factor = torch.rsqrt(whole.square().mean(-1, keepdim=True) + norm.eps)
            return out - factor * (values @ weight.T) * (1 + norm.weight)

        hooks = [(norm, "hook", without)]
    wanted = stock.logits(IDS, *hooks)
    assert_matters(stock, wanted)
    assert_close(changed(model, {"a1.h1": 0}), wanted)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_queries_keys_and_values(pair, part):
    """Doubled, and taken from another prompt."""
    model, stock = pair
    name = f"a1.h{HEAD if part == 'q' else 0}.{part}"
    module, select = stock.projection(part)
    other = select(stock.capture(OTHER, module))

    def put(new):
        def hook(module, args, out):
            out = out.clone()
            select(out).copy_(new(select(out)))
            return out

        return (module, "hook", hook)

    wanted = stock.logits(IDS, put(lambda x: 2 * x))
    assert_matters(stock, wanted)
    assert_close(changed(model, {name: lambda x: 2 * x}), wanted)
    assert_close(changed(model, {name: OTHER}), stock.logits(IDS, put(lambda x: other)))


def test_mlps_and_the_residual_stream(pair):
    model, stock = pair
    other = stock.capture(OTHER, stock.mlp)
    wanted = stock.logits(IDS, (stock.mlp, "hook", lambda m, args, out: other))
    assert_matters(stock, wanted)
    assert_close(changed(model, {"m1": OTHER}), wanted)
    assert_close(changed(model, {"m1": other}), wanted)
    half = stock.logits(IDS, (stock.layer, "pre_hook", lambda m, args: (args[0] / 2, *args[1:])))
    assert_close(changed(model, {"a1.resid": lambda x: x / 2}), half)
    stream = {}
    heads = stock.output if stock.heads_norm is None else stock.heads_norm
    mid = (
        (stock.layer, "pre_hook", lambda m, args: stream.update(x=args[0])),
        (heads, "hook", lambda m, args, out: (out + stream["x"]) / 2 - stream["x"]),
    )
    assert_close(changed(model, {"m1.resid": lambda x: x / 2}), stock.logits(IDS, *mid))
    norm = stock.body.ln_f if stock.is_gpt2 else stock.body.norm
    kept = torch.arange(8) == 2  # a norm would undo a factor
    end = stock.logits(IDS, (norm, "pre_hook", lambda m, args: (args[0] * kept[:, None],)))
    assert_close(changed(model, {"resid_post": lambda x: x * kept[:, None]}), end)


def test_embeddings(pair):
    model, stock = pair
    tokens = stock.body.wte if stock.is_gpt2 else stock.body.embed_tokens
    other = stock.capture(OTHER, tokens)
    wanted = stock.logits(IDS, (tokens, "hook", lambda m, args, out: other))
    assert_matters(stock, wanted)
    assert_close(changed(model, {model.architecture.embeddings[0]: OTHER}), wanted)
    if stock.is_gpt2:
        wanted = stock.logits(IDS, (stock.body.wpe, "hook", lambda m, args, out: 0 * out))
        assert_matters(stock, wanted)
        assert_close(changed(model, {"pos_embeds": 0}), wanted)


def test_a_pattern_of_the_first_token_copies_its_value(pair):
    model, stock = pair
    first = torch.zeros(8, 8)
    first[:, 0] = 1
    place = slice(HEAD * stock.d_head, (HEAD + 1) * stock.d_head)
    with torch.no_grad(), model.intervene() as run:
        value = run(IDS, ["a1.h0.v"])[1]["a1.h0.v"]
    kv_head = HEAD * stock.num_kv_heads // stock.num_heads
    if kv_head:  # then head 1 has a value head of its own
        with torch.no_grad(), model.intervene() as run:
            value = run(IDS, ["a1.h1.v"])[1]["a1.h1.v"]

    def put(module, args):
        x = args[0].clone()
        x[..., place] = value[:, :1]
        return (x,)

    wanted = stock.logits(IDS, (stock.output, "pre_hook", put))
    assert_matters(stock, wanted)
    assert_close(changed(model, {"a1.h1.pattern": first}), wanted)


def test_gradients_flow_to_what_is_read_and_what_is_given(pair):
    model, _ = pair
    names = ["a0.h1", "m1", "a1.h1.pattern", "a1.h0.v"]
    with model.intervene() as run:
        logits, activations = run(IDS, names)
        gradients = torch.autograd.grad(logits[:, -1, 7].sum(), list(activations.values()))
    given = torch.zeros(2, 8, model.d_model, requires_grad=True)
    with model.intervene({"a0.h1": lambda x: x + given}) as run:
        (added,) = torch.autograd.grad(run(IDS)[0][:, -1, 7].sum(), given)
    assert_close(added, gradients[0])
    step = 1e-2 * gradients[1] / gradients[1].norm()  # a finite difference along the gradient
    up, down = (
        changed(model, {"m1": lambda x, sign=sign: x + sign * step})[:, -1, 7].sum()
        for sign in (1, -1)
    )
    torch.testing.assert_close((up - down) / 2e-2, gradients[1].norm(), rtol=1e-2, atol=1e-3)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_several_changes_act_together_and_the_stock_model_sees_them(pair):
    model, stock = pair
    changes = {"a0.h0": 0, "a0.h3": OTHER, "m0": lambda x: -x, "a2.h1.pattern": 0}
    one_by_one = [changed(model, {name: change}) for name, change in changes.items()]
    together = changed(model, changes)
    assert all((together - single).abs().max() > 1e-4 for single in one_by_one)
    with model.intervene(changes):
        assert_close(stock.logits(IDS), together)


def test_compiled_programs():
    model = load_model("tracr/reverse", device="cpu")
    ids = torch.tensor([[0, 1, 2, 3]]) if model.max_length < 5 else torch.tensor([[0, 1, 2, 3, 1]])
    with torch.no_grad(), model.intervene() as run:
        outputs, activations = run(ids, [*model.graph.writers, "resid_post", "a0.h0.pattern"])
        total = sum(activations[name] for name in model.graph.writers)
        assert_close(total, activations["resid_post"])
        assert_close(activations["a0.h0.pattern"].sum(-1), torch.ones(1, ids.shape[1]))
        states = model.run_full(ids, slice(None))[0]
    assert_close(outputs, model.architecture.logits(states))
    changes = {"pos_embeds": 0, "tok_embeds": ids.flip(1)}
    arch = model.architecture
    with torch.no_grad():
        x = arch.tok_embed(ids.flip(1))
        for layer in arch.layers:
            x = layer(x)
        assert_close(changed(model, changes, ids), arch.unembed(x))


def test_split_readers_name_query_heads():
    hf_model = stock_model("llama")
    shared, split = (wrap_model(hf_model, split_kv_readers=choice) for choice in (False, True))
    both = changed(split, {"a1.h0.v": 0, "a1.h1.v": 0})
    assert_close(both, changed(shared, {"a1.h0.v": 0}))
    assert (changed(split, {"a1.h0.v": 0}) - both).abs().max() > 1e-3


def test_prompts_may_be_text():
    model = load_model("embedded", device="cpu")
    text, other = "Then, Mary and John went", "Then, John and Mary went"
    with torch.no_grad(), model.intervene({"tok_embeds": other}) as run:
        swapped = run(text)[0]
    with torch.no_grad(), model.intervene() as run:
        assert_close(swapped, run(other)[0])
        with pytest.raises(DataError, match="tokens"):
            run(["Mary", "Mary and John"])


@pytest.mark.parametrize("name", ["a3.h0", "a0.h4", "a0.h2.k", "m3", "b0", "a0.h1.z", "embed"])
def test_unknown_names_are_refused(name):
    model = wrap_model(random_llama(FAMILIES["llama"]))
    with pytest.raises(ConfigError, match=name), model.intervene({name: 0}):
        pass
    with model.intervene() as run, pytest.raises(ConfigError, match=name):
        run(IDS, [name])


def test_wrong_shapes_are_refused():
    model = wrap_model(random_gpt2())
    with pytest.raises(ConfigError, match=r"\[2, 8, 31\]"):
        changed(model, {"m1": torch.zeros(2, 8, 31)})
