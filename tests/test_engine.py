"""The engine against a naive one and against Hugging Face."""

import gc
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import random_gpt2, random_pairs
from naive import run_gpt2
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from edgeprune.engine import circuit_model, outbox
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.heads import project_to_heads
from edgeprune.errors import ConfigError, DataError, ModelError
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import kl_per_token
from edgeprune.models.load import load_meta_model, load_model, pick_device, wrap_model
from edgeprune.models.parity import verify_parity
from edgeprune.paths import EMBEDDED_MODEL
from edgeprune.prompts import collate


def random_gates(graph, seed=0) -> torch.Tensor:
    """[edge] in [0, 1]; many are exactly 0 or 1."""
    noise = torch.rand(graph.num_edges, generator=torch.Generator().manual_seed(seed))
    return (noise * 2 - 0.5).clamp(0, 1).requires_grad_()


def mixed_lengths() -> list:
    return random_pairs(2, 9) + random_pairs(2, 5, seed=1, predicted=3) + random_pairs(1, 7, seed=2)


def gate_gradient(model, batch, gates, **settings) -> torch.Tensor:
    reference, corrupted = model.run_pair(batch)
    logits = model.run_circuit(batch, gates, corrupted, **settings)
    return torch.autograd.grad(kl_per_token(reference, logits).mean(), gates)[0]


def assert_close(got, expected, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def check_against_naive(run_naive, hf_model, model, ablation: str) -> None:
    """Compare logits and gradients for random gates."""
    graph, batch = model.graph, collate(mixed_lengths())
    at, gates = (batch.rows, batch.cols), random_gates(graph)
    with torch.no_grad():
        naive_reference, _ = run_naive(hf_model, graph, batch.clean_ids)
        _, outboxes = run_naive(hf_model, graph, batch.corrupted_ids)
    ablated = outboxes if ablation == "interchange" else None
    naive = run_naive(hf_model, graph, batch.clean_ids, gates, ablated)[0][at]
    (expected,) = torch.autograd.grad(kl_per_token(naive_reference[at], naive).mean(), gates)

    reference, corrupted = model.run_pair(batch)
    logits = model.run_circuit(batch, gates, corrupted if ablation == "interchange" else None)
    (got,) = torch.autograd.grad(kl_per_token(reference, logits).mean(), gates)
    assert_close(logits, naive)
    assert expected.abs().max() > 1e-3  # not a comparison of zeros
    assert_close(got, expected, atol=1e-6)


def check_ends(hf_model, model) -> None:
    """Gates of 1 give Hugging Face's logits, gates of 0 those of the corrupted prompt."""
    batch = collate(mixed_lengths())
    _, corrupted = model.run_pair(batch)
    for gate, ids in ((1.0, batch.clean_ids), (0.0, batch.corrupted_ids)):
        gates = torch.full((model.graph.num_edges,), gate)
        with torch.no_grad():
            expected = hf_model(ids).logits[batch.rows, batch.cols]
            assert_close(model.run_circuit(batch, gates, corrupted), expected)


@pytest.mark.parametrize("embedding_writers", ["all", "tokens", "none"])
@pytest.mark.parametrize("ablation", ["interchange", "zero"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"n_layer": 1, "n_head": 2}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=str,
)
def test_logits_and_gradients_equal_the_naive_engine(embedding_writers, ablation, settings):
    hf_model = random_gpt2(**settings)
    model = wrap_model(hf_model, embedding_writers=embedding_writers)
    check_against_naive(run_gpt2, hf_model, model, ablation)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("embedding_writers", ["all", "tokens"])
def test_gates_of_1_give_the_full_model_and_gates_of_0_the_corrupted_prompt(
    attention, embedding_writers
):
    hf_model = random_gpt2()
    hf_model.set_attn_implementation(attention)
    check_ends(hf_model, wrap_model(hf_model, embedding_writers=embedding_writers))


def test_an_unknown_choice_of_embedding_writers_is_refused():
    for load in (
        lambda **kw: wrap_model(random_gpt2(), **kw),
        partial(load_model, "tracr/reverse"),
    ):
        with pytest.raises(ModelError, match="'positions'.*all, tokens, none"):
            load(embedding_writers="positions")


def test_padding_changes_nothing(model):
    pairs = mixed_lengths()
    gates = random_gates(model.graph).detach()

    def run(pairs: list) -> torch.Tensor:
        batch = collate(pairs)
        _, corrupted = model.run_pair(batch)
        with torch.no_grad():
            return model.run_circuit(batch, gates, corrupted)

    torch.testing.assert_close(run(pairs), torch.cat([run([pair]) for pair in pairs]))


def test_a_smaller_batch_after_a_larger_one_reuses_the_buffers(model):
    """Values of the larger pass must not leak into the smaller one's gradients."""
    gates = random_gates(model.graph)
    small, large = collate(random_pairs(1, 5)), collate(random_pairs(4, 9, seed=3))
    before = gate_gradient(model, small, gates)
    gate_gradient(model, large, gates)
    assert torch.equal(before, gate_gradient(model, small, gates))


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_circuits_that_differ_in_later_layers_alone_share_the_first_ones(ablation):
    model = wrap_model(random_gpt2(n_layer=6))
    graph, batch = model.graph, collate(mixed_lengths())
    _, corrupted = model.run_pair(batch)
    values = corrupted if ablation == "interchange" else None
    gates = [random_gates(graph).detach()]
    changed = ["a0", "a3", "m3", "a5", "m5", "resid_post", None]  # the site of one other gate
    for name in changed:
        gates.append(gates[-1].clone())
        for site in graph.sites:
            if site.name == name:
                gates[-1][site.offset] = 1 - gates[-1][site.offset]
    expected = [model.run_circuit(batch, each, values).detach() for each in gates]
    assert not torch.equal(expected[0], expected[1])
    layers = []
    model.begin_layer = lambda layer, x: layers.append(layer)
    for got, logits in zip(model.run_circuits(batch, gates, values), expected, strict=True):
        assert_close(got, logits)
    assert len(layers) == 6 + 6 + 3 + 3 + 1 + 1 + 1 + 1
    # Whatever runs in between overwrites what could be shared.
    for got, logits in zip(model.run_circuits(batch, gates, values), expected, strict=True):
        assert_close(got, logits)
        model.run_circuit(collate(random_pairs(3)), 1 - gates[0], None)


def test_backward_after_a_later_forward_is_refused(model):
    batch = collate(random_pairs(2))
    gates = random_gates(model.graph)
    _, corrupted = model.run_pair(batch)
    first = model.run_circuit(batch, gates, corrupted).sum()
    model.run_circuit(batch, gates, corrupted)
    with pytest.raises(AssertionError):
        first.backward()


@pytest.mark.parametrize("per_position", [True, False])
def test_mean_ablation_uses_the_mean_outboxes(per_position):
    """If all gates are 0, every writer carries its mean, so the stream is the mean stream."""
    hf_model = random_gpt2()
    model = wrap_model(hf_model)
    pairs = random_pairs(5, 6)
    ablation = Ablation(model, "mean", pairs, per_position=per_position, batch_size=2)
    batch = collate(pairs[:2])
    stream = model.run_full(collate(pairs).clean_ids, slice(None))[1].residuals[-1]
    mean = stream.mean(0)[-1] if per_position else stream.mean((0, 1))
    with torch.no_grad():
        expected = hf_model.lm_head(hf_model.transformer.ln_f(mean)).expand(2, -1)
        gates = torch.zeros(model.graph.num_edges)
        got = model.run_circuit(batch, gates, ablation.values(batch, None))
    assert_close(got, expected)


def test_mean_ablation_leaves_padding_out_of_the_mean(model):
    short, long = random_pairs(1, 4), random_pairs(1, 9, seed=1)

    def mean_stream(pairs: list) -> torch.Tensor:
        return Ablation(model, "mean", pairs, batch_size=2).means.residuals[0]

    torch.testing.assert_close(mean_stream(short + long)[:, 4:], mean_stream(long)[:, 4:])
    with pytest.raises(ValueError, match="9 tokens"):
        Ablation(model, "mean", short).values(collate(long), None)


def test_ablations_that_cannot_work_are_refused(model):
    with pytest.raises(ConfigError, match="'mode'"):
        Ablation(model, "mode", random_pairs(1))
    pair = random_pairs(1)[0]
    same = type(pair)(pair.clean_ids, pair.clean_ids, pair.target_ids)
    with pytest.raises(DataError):
        Ablation(model, "interchange", [same])
    assert not Ablation(model, "zero", [same]).needs_corrupted


def test_gates_of_the_wrong_number_are_refused(model):
    with pytest.raises(ValueError, match=r"\[7\].*\[302\]"):
        model.run_circuit(collate(random_pairs(1)), torch.ones(7), None)


@pytest.mark.parametrize("factor", [1.01, torch.nan])
def test_parity_check_catches_a_model_that_computes_something_else(model, factor):
    verify_parity(model)
    block = model.architecture.blocks[1]
    head_delta = block.head_delta
    block.head_delta = lambda *args, **settings: factor * head_delta(*args, **settings)
    with pytest.raises(ModelError, match="parity"):
        verify_parity(model)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", "cpu:x", "cuda:-1"])
def test_missing_devices_are_refused_by_name(device):
    with pytest.raises(ModelError, match=device):
        pick_device(device)
    assert pick_device("cpu") == pick_device("cpu:0") == "cpu"


@pytest.mark.parametrize("load", [load_model, load_meta_model])
@pytest.mark.parametrize("path", ["embedded", "tracr/reverse"])
def test_other_dtypes_are_refused_by_name(load, path):
    with pytest.raises(ModelError, match="float64"):
        load(path, dtype="float64")


# --------------------------------------------------------------------------- look-ahead, layouts


@pytest.fixture
def deep_model():
    return wrap_model(random_gpt2(n_layer=7))


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("recompute", [True, False])
def test_neither_look_ahead_nor_recomputing_changes_gradients(
    deep_model, length, recompute, monkeypatch
):
    batch, gates = collate(mixed_lengths()), random_gates(deep_model.graph)
    expected = gate_gradient(deep_model, batch, gates)
    layers = range(7)
    parts = [layers[start : start + length] for start in layers[::length]]
    monkeypatch.setattr(circuit_model, "lookaheads", lambda graph: parts)
    assert_close(gate_gradient(deep_model, batch, gates, recompute=recompute), expected, 1e-6)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "length"),
    [
        (12, 12, 12, 3),  # GPT-2 small
        (30, 9, 3, 6),  # SmolLM2-135M
        (32, 32, 8, 8),  # Llama 3.1 8B
        # 5 writers and 13 readers per layer, one embedding. Length 2: 1 + 11 writers, two layers
        # that add once; 3: 1 + 16, and 1 + 1; 4: 1, and 1 + 1 + 2: 38, 43, 53.
        (4, 4, 4, 2),
    ],
)
def test_look_aheads_move_the_least_memory(layers, heads, kv_heads, length):
    graph = CircuitGraph(layers, heads, kv_heads, ("embeds",))
    assert len(circuit_model.lookaheads(graph)[0]) == length


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("writer_major", "pads"), [(True, False), (False, True)])
def test_all_layouts_give_the_same(deep_model, recompute, writer_major, pads, monkeypatch):
    """As in 16 bits on a CPU, and on a GPU. All buffers hold NaN at first."""
    batch, gates = collate(mixed_lengths()), random_gates(deep_model.graph)
    expected = gate_gradient(deep_model, batch, gates)
    monkeypatch.setattr(outbox, "_prefers_writer_major", lambda x: writer_major)
    monkeypatch.setattr(outbox, "_pads_writers", lambda x: pads)
    monkeypatch.setattr(outbox, "_prefers_whole_buffers", lambda x: False)
    deep_model.release()
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(outbox.torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
        got = gate_gradient(deep_model, batch, gates, recompute=recompute)
    assert_close(got, expected, atol=1e-6)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_step_leaves_no_outboxes_behind(deep_model, recompute):
    def count() -> int:
        gc.collect()
        return sum(type(thing) is outbox.Outboxes for thing in gc.get_objects())

    before = count()
    gates = random_gates(deep_model.graph)
    gate_gradient(deep_model, collate(mixed_lengths()), gates, recompute=recompute)
    assert count() == before


@pytest.mark.parametrize("writer_major", [True, False])
def test_bfloat16_gradients_point_where_float32_ones_do(writer_major, monkeypatch):
    """In the layouts of a CPU and of a GPU."""
    monkeypatch.setattr(outbox, "_prefers_writer_major", lambda x: writer_major)
    batch = collate(mixed_lengths())
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap_model(random_gpt2().to(dtype))
        gradients.append(gate_gradient(model, batch, random_gates(model.graph)))
        assert gradients[-1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_folding_a_norm_into_a_projection_equals_calling_it():
    """For inputs with zero mean if the norm subtracts the mean."""
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    layer_norm, rms_norm = torch.nn.LayerNorm(16), LlamaRMSNorm(16)
    layer_norm.weight.data, layer_norm.bias.data = draw(16), draw(16)
    rms_norm.weight.data = draw(16)
    for norm in (layer_norm, rms_norm):
        norm.requires_grad_(False)
        x, weight, bias = 3 * draw(2, 3, 5, 16) + 2, draw(2, 4, 16), draw(2, 4)
        if norm is layer_norm:
            x -= x.mean(-1, keepdim=True)
        x.requires_grad_()
        out = project_to_heads(x.clone(), norm, weight.split(1), bias)
        plain = torch.einsum("hbpd,hed->hbpe", norm(x), weight) + bias[:, None, None]
        assert_close(out, plain)
        direction = draw(*out.shape)
        got, expected = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (out, plain))
        if norm is layer_norm:  # whatever computes x has zero mean, so only this part matters
            got, expected = (grad - grad.mean(-1, keepdim=True) for grad in (got, expected))
        assert_close(got, expected)


# ------------------------------------------------------------------------------- the fingerprint


def change_one_bit(weight):
    weight.view(torch.int32)[7, 9] ^= 1


EDITS = {
    "zero": lambda weight: weight[:, 17:31].zero_(),
    "swap rows": lambda weight: weight.copy_(weight[[1, 0, *range(2, len(weight))]]),
    "swap columns": lambda weight: weight.copy_(weight[:, [1, 0, *range(2, weight.shape[1])]]),
    "one bit": change_one_bit,
    "negate": torch.neg_,
}


@pytest.mark.parametrize("name", EDITS)
def test_fingerprint_changes_with_any_edit_of_a_weight(name):
    same, again, other = (wrap_model(random_gpt2(seed=seed)).fingerprint() for seed in (0, 0, 1))
    assert same == again != other
    edited = random_gpt2(seed=0)
    with torch.no_grad():
        EDITS[name](edited.transformer.h[1].attn.c_attn.weight)
    assert wrap_model(edited).fingerprint() != same


def test_fingerprint_depends_on_dtype_configuration_and_tokenizer(tmp_path):
    """But not on where and by what the model was saved, nor on how the tokenizer was used."""
    expected = load_model("embedded").fingerprint()
    used = load_model("embedded")
    used.tokenizer.pad_token = used.tokenizer.eos_token
    used.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert used.fingerprint() == expected
    assert load_model("embedded", dtype="bfloat16").fingerprint() != expected

    folder = shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())

    def fingerprint(**changes) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return load_model(folder).fingerprint()

    assert fingerprint(transformers_version="5.0.0") == expected
    assert fingerprint(activation_function="relu") != expected
    ids = tokenizer["model"]["vocab"]
    one, other = list(ids)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fingerprint() != expected
