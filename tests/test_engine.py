"""The fast engine against the naive one and against Hugging Face."""

import gc
import json
import shutil

import pytest
import torch
from conftest import random_gpt2, random_pairs
from naive import all_open, run_gpt2
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from edgeprune.config import AblationConfig, AblationKind
from edgeprune.engine import circuit_model as engine
from edgeprune.engine import outbox
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.heads import project_to_heads
from edgeprune.errors import ModelError
from edgeprune.graph import CircuitGraph
from edgeprune.methods.masks import CircuitMasks, Gates, combined_gates
from edgeprune.metrics import kl_per_token
from edgeprune.models import load, load_model, pick_device, verify_parity, wrap_model
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.prompts import collate


def random_gates(graph, seed=0, node=True) -> Gates:
    """Gates in [0, 1], many of them exactly 0 or 1."""
    noise = torch.Generator().manual_seed(seed)
    edge = (torch.rand(graph.num_edges, generator=noise) * 2 - 0.5).clamp(0, 1)
    nodes = (torch.rand(graph.num_writers, generator=noise) * 2 - 0.2).clamp(0, 1)
    return Gates(edge.requires_grad_(), nodes.requires_grad_() if node else None)


def mixed_lengths() -> list:
    return random_pairs(2, 9) + random_pairs(2, 5, seed=1, predicted=3) + random_pairs(1, 7, seed=2)


@pytest.mark.parametrize("embedding_writers", [True, False])
@pytest.mark.parametrize("ablation", ["interchange", "zero"])
@pytest.mark.parametrize("node", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"n_layer": 1, "n_head": 2}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=str,
)
def test_logits_and_gradients_equal_the_naive_engine(embedding_writers, ablation, node, settings):
    hf_model = random_gpt2(**settings)
    model = wrap_model(hf_model, embedding_writers=embedding_writers)
    graph = model.graph
    batch = collate(mixed_lengths())
    gates = random_gates(graph, node=node)
    inputs = [g for g in (gates.edge, gates.node) if g is not None]

    with torch.no_grad():
        naive_reference, _ = run_gpt2(hf_model, batch.clean_ids, all_open(graph), graph, None)
        _, outboxes = run_gpt2(hf_model, batch.corrupted_ids, all_open(graph), graph, None)
    closed = outboxes if ablation == "interchange" else None
    naive, _ = run_gpt2(hf_model, batch.clean_ids, gates, graph, closed)
    naive = naive[batch.rows, batch.cols]
    loss = kl_per_token(naive_reference[batch.rows, batch.cols], naive).mean()
    wanted = torch.autograd.grad(loss, inputs)

    reference, corrupted = model.run_pair(batch)
    writers = CircuitMasks(graph).edge_writers
    mixed = combined_gates(gates, writers)
    logits = model.run_circuit(batch, mixed, corrupted if ablation == "interchange" else None)
    got = torch.autograd.grad(kl_per_token(reference, logits).mean(), inputs)

    torch.testing.assert_close(logits, naive, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in wanted) > 1e-3  # the comparison is not one of zeros
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_open_gates_are_the_model_and_closed_gates_the_corrupted_prompt(attention):
    hf_model = random_gpt2()
    hf_model.set_attn_implementation(attention)
    model = wrap_model(hf_model)
    batch = collate(mixed_lengths())
    _, corrupted = model.run_pair(batch)
    at = (batch.rows, batch.cols)
    for gate, ids in ((1.0, batch.clean_ids), (0.0, batch.corrupted_ids)):
        gates = torch.full((model.graph.num_edges,), gate)
        with torch.no_grad():
            wanted = hf_model(ids).logits[at]
            got = model.run_circuit(batch, gates, corrupted)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing(model):
    pairs = mixed_lengths()
    gates = random_gates(model.graph, node=False).edge.detach()

    def run(some: list) -> torch.Tensor:
        batch = collate(some)
        _, corrupted = model.run_pair(batch)
        with torch.no_grad():
            return model.run_circuit(batch, gates, corrupted)

    torch.testing.assert_close(run(pairs), torch.cat([run([pair]) for pair in pairs]))


def test_a_smaller_batch_after_a_larger_one_reuses_the_buffers(model):
    """Stale values of the larger pass must not leak into the smaller one's gradients."""
    gates = random_gates(model.graph, node=False).edge
    small = collate(random_pairs(1, 5))

    def gradient() -> torch.Tensor:
        reference, corrupted = model.run_pair(small)
        loss = kl_per_token(reference, model.run_circuit(small, gates, corrupted)).mean()
        return torch.autograd.grad(loss, gates)[0]

    before = gradient()
    large = collate(random_pairs(4, 9, seed=3))
    reference, corrupted = model.run_pair(large)
    kl_per_token(reference, model.run_circuit(large, gates, corrupted)).mean().backward()
    assert torch.equal(before, gradient())


def test_backward_after_a_later_forward_is_refused(model):
    batch = collate(random_pairs(2))
    gates = random_gates(model.graph, node=False).edge
    _, corrupted = model.run_pair(batch)
    first = model.run_circuit(batch, gates, corrupted).sum()
    model.run_circuit(batch, gates, corrupted)
    with pytest.raises(AssertionError, match="overwritten by a later forward"):
        first.backward()


@pytest.mark.parametrize("per_position", [True, False])
def test_mean_ablation_uses_the_mean_outboxes(per_position):
    """All gates closed: every writer carries its mean, so the stream is the mean of the streams."""
    hf_model = random_gpt2()
    model = wrap_model(hf_model)
    pairs = random_pairs(5, 6)
    config = AblationConfig(AblationKind.mean, per_position=per_position)
    ablation = Ablation(model, config, pairs, batch_size=2)
    batch = collate(pairs[:2])
    with torch.no_grad():
        states = hf_model.transformer(
            collate(pairs).clean_ids, output_hidden_states=True
        ).hidden_states
        # the last hidden state is normed already, so take it before the final norm
        stream = model.run_full(collate(pairs).clean_ids, slice(None))[1].residuals[-1]
        assert len(states) == 4
        mean = stream.mean(0)[-1] if per_position else stream.mean((0, 1))
        wanted = hf_model.lm_head(hf_model.transformer.ln_f(mean)).expand(2, -1)
        gates = torch.zeros(model.graph.num_edges)
        got = model.run_circuit(batch, gates, ablation.values(batch, None))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_mean_ablation_leaves_padding_out_of_the_mean():
    model = wrap_model(random_gpt2())
    short, long = random_pairs(1, 4), random_pairs(1, 9, seed=1)
    together = model.mean_activations(short + long, 2, per_position=True).means.residuals[0]
    alone = model.mean_activations(long, 1, per_position=True).means.residuals[0]
    torch.testing.assert_close(together[:, 4:], alone[:, 4:])
    with pytest.raises(ValueError, match="9 tokens, but the reference set .* only 4"):
        model.mean_activations(short, 1, per_position=True).for_batch(collate(long))


def test_gates_of_the_wrong_number_are_refused(model):
    batch = collate(random_pairs(1))
    with pytest.raises(ValueError, match=r"gates are \[7\], expected \[302\]"):
        model.run_circuit(batch, torch.ones(7), None)


def test_parity_check_catches_a_model_that_computes_something_else():
    """Negative control: the second block's attention is scaled behind the check's back."""
    hf_model = random_gpt2()
    model = wrap_model(hf_model)
    verify_parity(model)
    block = model.architecture.blocks[1]
    honest = block.attend
    block.attend = lambda x, mask: 1.01 * honest(x, mask)
    with pytest.raises(ModelError, match="parity check failed.*all gates open"):
        verify_parity(model)


def test_parity_check_catches_nan():
    model = wrap_model(random_gpt2())
    model.architecture.blocks[0].head_delta = lambda values, closed, **_: torch.full(
        (4, *values.shape), float("nan")
    )
    with pytest.raises(ModelError, match="parity check failed"):
        verify_parity(model)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", "cpu:x", "cuda:-1"])
def test_devices_that_are_not_there_are_refused_by_name(device):
    with pytest.raises(ModelError, match=f"no device '{device}' on this machine"):
        pick_device(device)
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("read", [load.load_model, load.load_meta_model])
@pytest.mark.parametrize("path", ["embedded", "tracr/reverse"])
def test_other_dtypes_are_refused_by_name(read, path):
    with pytest.raises(ModelError, match="dtype='float64' is not .* float32, bfloat16, float16"):
        read(path, dtype="float64")


def test_unsupported_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ModelError, match="'gpt_neox'.*not supported; supported: .*gpt2"):
        load.load_model(tmp_path)


def test_nothing_of_the_model_is_trained(model):
    assert not any(p.requires_grad for p in model.architecture.body.parameters())
    assert not model.architecture.body.training


def gate_gradient(model, batch, gates, **settings) -> torch.Tensor:
    gates = gates.clone().requires_grad_()
    reference, corrupted = model.run_pair(batch)
    logits = model.run_circuit(batch, gates, corrupted, **settings)
    return torch.autograd.grad(kl_per_token(reference, logits).mean(), gates)[0]


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("recompute", [True, False])
def test_neither_look_ahead_nor_recomputing_changes_gradients(length, recompute, monkeypatch):
    """Look-aheads of one layer, of two, and of all seven, by halves."""
    model = wrap_model(random_gpt2(n_layer=7))
    batch = collate(mixed_lengths())
    gates = random_gates(model.graph, node=False).edge.detach()
    monkeypatch.setattr(engine, "lookahead_length", lambda graph: 3)
    wanted = gate_gradient(model, batch, gates)
    monkeypatch.setattr(engine, "lookahead_length", lambda graph: length)
    got = gate_gradient(model, batch, gates, recompute=recompute)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "length"),
    [
        (12, 12, 12, 3),  # GPT-2 small
        (30, 9, 3, 6),  # SmolLM2-135M
        (32, 32, 8, 8),  # Llama 3.1 8B
        # 5 writers and 13 readers a layer, one embedding. Lengths of 2: 1 + 11 writers, two layers
        # that add once; of 3: 1 + 16, and 1 + 1; of 4: 1, and 1 + 1 + 2: 38, 43, 53.
        (4, 4, 4, 2),
    ],
)
def test_look_aheads_are_as_long_as_moves_least(layers, heads, kv_heads, length):
    graph = CircuitGraph(layers, heads, kv_heads, ("embeds",))
    assert engine.lookahead_length(graph) == length


@pytest.mark.parametrize("recompute", [True, False])
def test_writer_by_writer_is_token_by_token(recompute, monkeypatch):
    model = wrap_model(random_gpt2(n_layer=7))
    batch = collate(mixed_lengths())
    gates = random_gates(model.graph, node=False).edge.detach()
    gradients = []
    for is_better_wide in (True, False):
        monkeypatch.setattr(outbox, "_is_better_wide", lambda like, wide=is_better_wide: wide)
        gradients.append(gate_gradient(model, batch, gates, recompute=recompute))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
def test_products_with_more_writers_than_there_are_change_nothing(recompute, monkeypatch):
    """As on a GPU in 16 bits; the buffers' spare places hold NaN at first."""
    model = wrap_model(random_gpt2(n_layer=7))
    batch = collate(mixed_lengths())
    gates = random_gates(model.graph, node=False).edge.detach()
    wanted = gate_gradient(model, batch, gates)
    for name in ("_wants_multiples", "_wants_whole_arrays"):
        monkeypatch.setattr(outbox, name, lambda x, name=name: name == "_wants_multiples")
    model.release()
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(outbox.torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
        got = gate_gradient(model, batch, gates, recompute=recompute)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_of_a_step_outlives_it(recompute, monkeypatch):
    monkeypatch.setattr(engine, "lookahead_length", lambda graph: 2)
    model = wrap_model(random_gpt2(n_layer=4))
    batch = collate(mixed_lengths())
    gates = random_gates(model.graph, node=False).edge.detach()

    def count() -> int:
        gc.collect()
        return sum(type(thing) is outbox.Outboxes for thing in gc.get_objects())

    before = count()
    gate_gradient(model, batch, gates, recompute=recompute)
    assert count() == before


@pytest.mark.parametrize("is_wide", [True, False])
def test_bfloat16_gradients_point_where_float32_ones_do(is_wide, monkeypatch):
    """In either layout: on a GPU they lie token by token."""
    monkeypatch.setattr(outbox, "_is_better_wide", lambda like: is_wide)
    batch = collate(mixed_lengths())
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap_model(random_gpt2().to(dtype))
        gates = random_gates(model.graph, node=False).edge.detach()
        gradients.append(gate_gradient(model, batch, gates))
        assert gradients[-1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_a_norm_folded_into_a_projection_is_that_norm():
    """Against calling the norm; of inputs without a mean where it takes the mean away."""
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    layer_norm = torch.nn.LayerNorm(16)
    layer_norm.weight.data, layer_norm.bias.data = draw(16), draw(16)
    rms_norm = LlamaRMSNorm(16)
    rms_norm.weight.data = draw(16)
    for norm in (layer_norm, rms_norm):
        norm.requires_grad_(False)
        x, weight, bias = 3 * draw(2, 3, 5, 16) + 2, draw(2, 4, 16), draw(2, 4)
        if norm is layer_norm:
            x -= x.mean(-1, keepdim=True)
        x.requires_grad_()
        out = project_to_heads(x.clone(), norm, weight.split(1), bias)
        plain = torch.einsum("hbpd,hed->hbpe", norm(x), weight) + bias[:, None, None]
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
        direction = draw(*out.shape)
        got, wanted = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (out, plain))
        if norm is layer_norm:  # what comes before has no mean, whatever it gets
            got, wanted = (grad - grad.mean(-1, keepdim=True) for grad in (got, wanted))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def zero_some_heads(weight):
    weight[:, 17:31] = 0


def swap_two_rows(weight):
    weight[[3, 5]] = weight[[5, 3]]


def swap_two_columns(weight):
    weight[:, [3, 5]] = weight[:, [5, 3]]


def change_one_bit(weight):
    bits = weight.view(torch.int32)
    bits[7, 9] ^= 1


@pytest.mark.parametrize(
    "edit", [zero_some_heads, swap_two_rows, swap_two_columns, change_one_bit, torch.neg_]
)
def test_a_fingerprint_tells_every_edit_of_a_weight(edit):
    names = []
    for seed in (0, 0, 1):
        names.append(wrap_model(random_gpt2(seed=seed)).fingerprint())
    assert names[0] == names[1] != names[2]
    edited = random_gpt2(seed=0)
    with torch.no_grad():
        edit(edited.transformer.h[1].attn.c_attn.weight)
    assert wrap_model(edited).fingerprint() != names[0]


def test_a_fingerprint_is_of_the_dtype_too():
    model = wrap_model(random_gpt2())
    half = wrap_model(random_gpt2())
    half.to(torch.bfloat16)
    assert model.fingerprint() != half.fingerprint()


def test_a_fingerprint_is_of_configuration_and_tokenizer_too(tmp_path):
    """But not of where the model lies and how it was saved."""
    copy = shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy")
    wanted = load_model("embedded").fingerprint()
    used = load_model("embedded")
    used.tokenizer.pad_token = used.tokenizer.eos_token
    used.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert used.fingerprint() == wanted
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    assert load_model(copy).fingerprint() == wanted
    (copy / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    assert load_model(copy).fingerprint() != wanted
    (copy / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    words = list(tokenizer["model"]["vocab"])
    ids = tokenizer["model"]["vocab"]
    ids[words[-1]], ids[words[-2]] = ids[words[-2]], ids[words[-1]]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_model(copy).fingerprint() != wanted
