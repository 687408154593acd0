"""Kinds of heads: known ones are found, random weights have none, and chance levels by hand."""

from statistics import NormalDist

import pytest
import torch
from conftest import random_gpt2
from test_llama import FAMILIES, random_llama

from edgeprune.circuit import Circuit
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.heads import circuit_tables, score_heads
from edgeprune.models.load import load_model, wrap_model
from edgeprune.models.tracr import Tracr
from edgeprune.prompts import Pair, encode_pair, marked_tokens
from edgeprune.prompts.tasks import MARKS

VOCABULARY, LENGTH = 12, 24
PROMPTS = (
    ("When Mary and John got to the park, John gave a ring to<predict> Mary</predict>", " John"),
    ("John and Mary left. John gave a ring to<predict> Mary</predict>", " John"),  # S comes first
)


def induction_model() -> CircuitModel:
    """Two layers of two heads: a0.h0 writes the previous token, a1.h0 looks for it.

    The residual stream is the token, the position and the previous token, one-hot each. The other
    heads have no weights, so they attend equally to everything.
    """
    config = {
        "n_layers": 2, "n_heads": 2, "d_model": 2 * VOCABULARY + LENGTH, "d_head": LENGTH,
        "d_mlp": 1, "d_vocab": VOCABULARY, "n_ctx": LENGTH, "d_out": VOCABULARY, "causal": True,
        "output_type": "categorical", "attn_scale": 1.0,
    }  # fmt: skip
    model = Tracr(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    token = torch.arange(VOCABULARY)
    position, previous = VOCABULARY + torch.arange(LENGTH), VOCABULARY + LENGTH + token
    model.tok_embed.weight.data[token, token] = 1
    model.pos_embed.data[torch.arange(LENGTH), position] = 1
    first, second = (layer.qkv_weight.data for layer in model.layers)  # [q0 q1 k0 k1 v0 v1, ...]
    sharp = 50.0
    first[0, torch.arange(LENGTH - 1), position[1:]] = sharp  # the query of position i: i - 1
    first[2, torch.arange(LENGTH), position] = 1
    first[4, token, token] = 1
    model.layers[0].attention_output.weight.data[previous, token] = 1
    second[0, token, token] = sharp
    second[2, token, previous] = 1
    second[4, token, token] = 1
    model.layers[1].attention_output.weight.data[token, token] = 1
    model.requires_grad_(False)
    return CircuitModel(model, model.graph(2, 2, 2), None, "induction", config)


def test_induction_heads_are_found_and_nothing_else():
    scores = score_heads(induction_model())
    assert scores.labels == {"a0.h0": ["previous token"], "a1.h0": ["induction"]}
    induction = scores.score("induction")
    assert induction.ranked()[0] == "a1.h0"
    # Position 0 can only read itself, so the first token's repetition attends equally to 0 and 1.
    assert induction.value[1, 0] == pytest.approx(1 - 0.5 / VOCABULARY, abs=1e-4)
    assert scores.score("previous_token").value[0, 0] > 0.99


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.3])
def test_random_weights_have_no_kind(scale):
    """The stated rate of false alarms is one model in 1,000 per kind."""
    models = [wrap_model(random_gpt2(seed, n_positions=64)) for seed in range(3)]
    models.append(wrap_model(random_llama(FAMILIES["llama"])))
    for model in models:
        for parameter in model.architecture.body.parameters():
            parameter.data += scale * torch.randn_like(parameter)
        assert score_heads(model, num_random=20, length=20).labels == {}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_uniform_attention_scores_chance(name):
    """Without queries attention is uniform over the past; also in windows longer than prompts."""
    hf_model = random_gpt2() if name == "gpt2" else random_llama(FAMILIES[name])
    model = wrap_model(hf_model)
    model.architecture.body.config.sliding_window = 1000
    for block in model.architecture.blocks:
        if name == "gpt2":
            block.attention.c_attn.weight.data[:, :32] = 0
            block.attention.c_attn.bias.data[:32] = 0
        else:
            block.attention.q_proj.weight.data.zero_()
            block.attention.sliding_window = 1000
    pair = Pair((1, 2, 3, 2, 5), (1, 2, 3, 4, 5), (7,))
    scores = score_heads(model, [pair], marks={pair: {"IO": 1, "S2": 3}}, num_random=3, length=6)
    for score in scores.scores:
        if score.name != "copying":
            wanted = torch.full_like(score.value, score.chance)
            torch.testing.assert_close(score.value, wanted, atol=1e-5, rtol=1e-4)
    chance = {s.name: s.chance for s in scores.scores if s.prompts == "task"}
    assert chance["previous token"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert chance["duplicate token"] == pytest.approx(1 / 4)  # from the second 2
    assert chance["induction"] == pytest.approx(1 / 4)  # from it to the 3
    assert chance["first token"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert chance["name mover"] == chance["S-inhibition"] == pytest.approx(1 / 5)
    random = {s.name: s.chance for s in scores.scores if s.prompts != "task"}
    assert random["duplicate token"] == pytest.approx(sum(1 / n for n in range(8, 13)) / 5)
    assert random["copying"] == pytest.approx(1 / 6)


def test_thresholds_by_hand():
    """A head that attends to one of n tokens needs more than one that attends to all alike."""
    pair = Pair((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 7), (7,))
    scores = score_heads(induction_model(), [pair], marks={pair: {"IO": 2}}, task="t")
    threshold = next(s.threshold for s in scores.scores if s.name == "name mover")
    z, n = NormalDist().inv_cdf(1 - 0.001 / 4), 6
    assert threshold[0, 0] == pytest.approx(1 / n + z * (1 / n * (1 - 1 / n)) ** 0.5, abs=1e-4)
    assert threshold[0, 1] == pytest.approx(1 / n + 0.3 * (1 - 1 / n))


def test_copying_is_found_by_construction():
    """Values that pass embeddings on, and an unembedding that reads them."""
    hf_model = random_gpt2(n_layer=1, n_head=1, n_embd=64, vocab_size=60, tie_word_embeddings=True)
    block = hf_model.transformer.h[0]
    hf_model.transformer.wpe.weight.data.zero_()
    for norm in (block.ln_1, hf_model.transformer.ln_f):
        norm.weight.data.fill_(1)
        norm.bias.data.zero_()
    hf_model.transformer.wte.weight.data = torch.linalg.qr(torch.randn(64, 64))[0][:60]
    attention = block.attn
    attention.c_attn.weight.data[:, 128:] = torch.eye(64)
    attention.c_proj.weight.data = torch.eye(64)
    assert score_heads(wrap_model(hf_model)).labels["a0.h0"] == ["copying"]
    attention.c_proj.weight.data *= -1
    assert score_heads(wrap_model(hf_model)).labels == {}


@pytest.mark.parametrize(("clean", "subject"), PROMPTS)
def test_names_are_found_in_the_prompt(tokenizer, clean, subject):
    record = {"clean": clean, "corrupted": clean, "distractor": subject}
    pair = encode_pair(tokenizer, record)
    at = marked_tokens(tokenizer, record, pair, MARKS["ioi"](record))
    words = {name: tokenizer.decode([pair.clean_ids[i]]).strip() for name, i in at.items()}
    assert words == {"IO": "Mary", "S1": "John", "S2": "John"}
    assert at["S1"] < at["S2"]


def test_marked_words_and_padding():
    """Prompts of different lengths in a batch score as they do one by one."""
    model = wrap_model(random_gpt2())
    pairs = [Pair((1, 2, 3, 2, 5, 9, 9), (0,) * 7, (4,)), Pair((8, 2, 8), (0,) * 3, (4,))]
    marks = {pairs[0]: {"IO": 1, "S2": 3}, pairs[1]: {"IO": 0, "S2": 2}}
    together, apart = (
        score_heads(model, pairs, marks=marks, num_random=2, length=5, batch_size=size)
        for size in (16, 1)
    )
    for a, b in zip(together.scores, apart.scores, strict=True):
        assert (a.name, a.prompts) == (b.name, b.prompts)
        torch.testing.assert_close(a.value, b.value, atol=1e-5, rtol=1e-4)
        assert a.chance == pytest.approx(b.chance)


def test_prompts_without_a_kind_s_targets_do_not_count():
    """Padding is no repeated token, and the only token of a prompt attends to nothing else."""
    model = wrap_model(random_gpt2())
    long, short = Pair((1, 2, 3, 4, 5, 6), (0,) * 6, (7,)), Pair((1,), (0,), (7,))
    one, two = (score_heads(model, pairs, num_random=2, length=5)
                for pairs in ([long], [long, short]))  # fmt: skip
    assert [s.name for s in two.scores if s.prompts == "task"] == [
        "previous token", "first token", "entropy",
    ]  # fmt: skip
    for a, b in zip(one.scores, two.scores, strict=True):
        torch.testing.assert_close(a.value, b.value, atol=1e-5, rtol=1e-4)
        assert a.chance == pytest.approx(b.chance)


def test_bidirectional_programs_can_be_scored():
    model = load_model("tracr/neighbours", device="cpu")
    scores = score_heads(model, num_random=3)
    assert scores.score("previous_token").value.shape == (1, 2)
    with pytest.raises(ConfigError, match="inductoin.*induction"):
        scores.score("inductoin")


def test_kinds_in_a_circuit():
    graph = induction_model().graph
    edges = [("tok_embeds", "a0.h0.v"), ("a0.h0", "a1.h0.k"), ("a1.h0", "resid_post"),
             ("a0.h1", "a1.h1.v")]  # fmt: skip
    circuit = Circuit.from_edges(graph, edges)
    labels = {"a0.h0": ["previous token"], "a1.h0": ["induction", "copying"],
              "a0.h1": ["induction"]}  # fmt: skip
    assert circuit_tables({}, circuit) == []
    kinds, between = circuit_tables(labels, circuit)
    assert ["induction", "2", "1"] in kinds.rows  # a0.h1 dangles
    assert ["previous token", "1", "1"] in kinds.rows
    assert sorted(between.rows) == [["induction", "output", "1"],
                                    ["previous token", "induction, k", "1"]]  # fmt: skip
