"""RelP and GIM: the same outputs, and what is passed back by hand and by conservation."""

import pytest
import torch
from conftest import random_gpt2, random_pairs
from test_llama import FAMILIES
from transformers import AutoModelForCausalLM

from edgeprune.api.attribute import score_edges
from edgeprune.engine.backward_rules import RULES, backward_rules
from edgeprune.engine.heads import attend
from edgeprune.errors import ConfigError
from edgeprune.models.load import load_model, wrap_model
from edgeprune.prompts import collate

NAMES = ("gpt2", "llama", "qwen3", "gemma2", "gemma3")
GRAPH = {"embedding_writers": "tokens", "split_kv_readers": True}


def make(name: str, *, biases: bool = True, **settings):
    if name == "gpt2":
        network = random_gpt2()
    else:
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(FAMILIES[name])
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for key, parameter in network.named_parameters():
        if key.endswith("bias") and not biases:
            parameter.data.zero_()
    return wrap_model(network.eval(), **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rules", RULES)
def test_values_stay_the_same_and_gradients_afterwards(name, rules):
    model, pairs = make(name, **GRAPH), random_pairs(3, length=9)
    before = score_edges(model, pairs, "eap", metric="logit_difference").values
    batch, gates = collate(pairs), torch.ones(model.graph.num_edges)
    expected = model.run_circuit(batch, gates, None)
    with backward_rules(model, rules):
        torch.testing.assert_close(model.run_circuit(batch, gates, None), expected)
    changed = score_edges(model, pairs, rules, metric="logit_difference").values
    after = score_edges(model, pairs, "eap", metric="logit_difference").values
    assert torch.equal(before, after)
    assert not torch.allclose(before, changed, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_relevance_is_conserved_in_mlps(name):
    """Without biases, the norm and the MLP are one linear map, and x * relevance sums to output."""
    model = make(name, biases=False)
    block = model.architecture.blocks[1]
    x = torch.randn(2, 5, model.d_model)
    x = (x - x.mean(-1, keepdim=True)).requires_grad_()  # as the stream of a LayerNorm is kept
    with backward_rules(model, "relp"):
        y = block.mlp(block.mlp_norm(x))
        (y * torch.arange(1.0, model.d_model + 1)).sum().backward()
    by_input = (x * x.grad).sum(-1)
    torch.testing.assert_close(by_input, y @ torch.arange(1.0, model.d_model + 1), rtol=1e-3,
                               atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_norms_of_heads_pass_back_a_linear_map(name):
    """Values are a linear function of the inputs' values where scales and patterns are fixed."""
    model = make(name, biases=False)
    block, graph = model.architecture.blocks[0], model.graph
    x = torch.randn(1, 4, model.d_model)
    x = (x - x.mean(-1, keepdim=True)).expand(len(graph.sites[0].readers), 1, 4, -1).clone()
    x.requires_grad_()
    with backward_rules(model, "relp"):
        inputs = model.architecture.attention_inputs(x[0])
        values = block.attend(x, inputs)
        values.sum().backward()
    is_value = torch.tensor([reader.endswith(".v") for reader in graph.sites[0].readers])
    total = (x * x.grad).sum((1, 2, 3))[is_value].sum()
    torch.testing.assert_close(total, values.sum(), rtol=1e-3, atol=1e-3)


def test_parts_by_hand():
    model = make("llama")
    block, rms = model.architecture.blocks[0], model.architecture.final_norm
    x = torch.tensor([3.0, -4.0] + [0.0] * 30).requires_grad_()
    with backward_rules(model, "relp"):
        rms(x)[0].backward()
        scale = (25 / 32 + rms.variance_epsilon) ** -0.5
        assert x.grad[0] == pytest.approx(rms.weight[0].item() * scale, rel=1e-5)
        assert not x.grad[1:].any()
        y = torch.tensor([2.0, 0.0, -1.0]).requires_grad_()
        block.mlp.act_fn(y).sum().backward()
    sigmoid = torch.tensor([2.0, -1.0]).sigmoid().tolist()  # silu(x) = x sigmoid(x)
    assert y.grad.tolist() == pytest.approx([sigmoid[0], 0.0, sigmoid[1]])


def test_attention_in_gim_by_hand():
    """One head, two positions: shares of queries, keys and values, and the softmax at T = 2."""
    model = make("llama-no-groups")
    attention = model.architecture.blocks[0].attention
    q, k, v = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    with backward_rules(model, "gim"):
        values, _ = attend(attention, q, k, v, mask, scaling=0.7)
        values[0, 1, 0].sum().backward()  # of the second position
    scores = 0.7 * q[0, 0, 1] @ k[0, 0].T  # [key]
    pattern, soft = scores.softmax(0), (scores / 2).softmax(0)
    grad_pattern = v[0, 0].sum(-1)
    grad_scores = soft * (grad_pattern - (grad_pattern * soft).sum())
    for got, wanted in (
        (q.grad[0, 0, 1], 0.25 * 0.7 * grad_scores @ k[0, 0]),
        (k.grad[0, 0], 0.25 * 0.7 * grad_scores[:, None] * q[0, 0, 1]),
        (v.grad[0, 0], 0.5 * pattern[:, None].expand(-1, 3)),
    ):
        torch.testing.assert_close(got, wanted)


def test_kl_is_refused_and_programs_stay_as_they_are():
    for rules in RULES:
        with pytest.raises(ConfigError, match="no gradient"):
            score_edges(make("gpt2"), random_pairs(2), rules, metric="kl")
        program = load_model("tracr/neighbours")
        with backward_rules(program, rules):
            pass
