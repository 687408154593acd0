"""Ablating nodes: against hooks by hand, controls, generation, and statistics by hand."""

import random

import pytest
import torch
from conftest import random_gpt2, random_pairs
from test_llama import FAMILIES, random_llama

from edgeprune.engine.node_ablation import AblatedModel, NodeMeans
from edgeprune.errors import ConfigError
from edgeprune.evaluation.ablate import (
    ablate,
    ablation_tables,
    equal_lengths,
    in_words,
    layer_matched,
)
from edgeprune.evaluation.statistics import mcnemar, paired_bootstrap, rank_p_values
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import kl_per_token
from edgeprune.models.load import load_model, wrap_model
from edgeprune.prompts import Pair, encode_pair
from edgeprune.prompts.tasks import whereabouts

NODES = ("a0.h1", "a1.h3", "m1")


def family(name: str):
    return random_gpt2() if name == "gpt2" else random_llama(FAMILIES[name], "eager")


# ---------------------------------------------------------------------------------- the statistics


def test_mcnemar_by_hand():
    """Textbook case: 1 against 7 discordant pairs, p = 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256."""
    a = torch.tensor([1.0] + 7 * [0] + 5 * [1] + 3 * [0])
    b = torch.tensor([0.0] + 7 * [1] + 5 * [1] + 3 * [0])
    assert mcnemar(a, b) == pytest.approx((1, 7, 18 / 256))
    assert mcnemar(b, a) == pytest.approx((7, 1, 18 / 256))
    assert mcnemar(a, a) == (0, 0, 1.0)
    assert mcnemar(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).p == 1.0


def test_bootstrap_by_hand():
    """Of differences that are all the same, of none, and of a coin with a known deviation."""
    ones = torch.ones(7)
    assert paired_bootstrap(ones, 0 * ones) == (1, 1, 1)
    assert paired_bootstrap(ones, ones) == (0, 0, 0)
    a = torch.tensor([0.0, 1.0] * 200)  # mean .5, standard error .5 / 20
    found = paired_bootstrap(a, 0 * a)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    # Pairing removes what both share.
    shared = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 100
    paired = paired_bootstrap(shared + a, shared)
    assert paired.high - paired.low < 0.11


def test_rank_among_random_sets():
    value, lower = torch.tensor([3.0]), torch.tensor([1.0, 2.0, 2.5, 0.0])
    others = torch.tensor([1.0, 3.0, 4.0, 0.0])
    assert rank_p_values(value, lower) == 1 / 5
    assert rank_p_values(value, others) == 3 / 5
    assert rank_p_values(-value, -others) == 4 / 5


# ------------------------------------------------------------------------------------- the controls


def test_controls_are_matched_by_layer():
    graph = CircuitGraph(3, 4, 4, ("embeds",))
    nodes = ["a0.h1", "a1.h0", "a1.h2", "m1"]
    order = [f"a{layer}.h{head}" for layer in range(3) for head in (3, 2, 1, 0)]
    assert layer_matched(graph, nodes, order) == ("a0.h3", "a1.h2", "a1.h3", "m1")
    assert layer_matched(graph, ["a2.h0", "m0"], order[::-1]) == ("m0", "a2.h0")


def test_batches_need_no_padding():
    pairs = random_pairs(5, 8) + random_pairs(4, 6) + random_pairs(3, 8, predicted=2)
    batches = equal_lengths(pairs, 3)
    assert [len(batch.pairs) for batch in batches] == [3, 1, 3, 2, 3]
    for batch in batches:
        assert len({len(pair.clean_ids) for pair in batch.pairs}) == 1


# --------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "qwen3-windows"])
@pytest.mark.parametrize("kind", ["zero", "mean", "interchange"])
def test_ablation_is_an_intervention(name, kind):
    model = wrap_model(family(name))
    pairs = random_pairs(4)
    result = ablate(model, NODES, pairs, kind=kind, num_random=2, per_position=True)
    (batch,) = equal_lengths(pairs, 9)
    with torch.no_grad():
        with model.intervene() as run:
            reference, clean = run(batch.clean_ids, NODES)
            _, corrupted = run(batch.corrupted_ids, NODES)
        values = {
            "zero": dict.fromkeys(NODES, 0.0),
            "mean": {node: x.mean(0, keepdim=True) for node, x in clean.items()},
            "interchange": corrupted,
        }[kind]
        with model.intervene(values) as run:
            logits, _ = run(batch.clean_ids)
    wanted = kl_per_token(reference[:, -1], logits[:, -1])
    assert wanted.min() > 1e-4
    torch.testing.assert_close(result.ablated.measures["kl"].float(), wanted, atol=1e-5, rtol=1e-3)
    assert result.full.measures["kl"].abs().max() == 0
    assert result.full.measures["accuracy"].tolist() == [
        float(row.argmax() == pair.target_ids[0])
        for row, pair in zip(reference[:, -1], batch.pairs, strict=True)
    ]


def greedy(model, values, clean, corrupted, count):
    """Generate without a cache: the whole text anew for every token."""
    for _ in range(count):
        with torch.no_grad():
            with model.intervene() as run:
                _, other = run(corrupted, NODES)
            with model.intervene(values or other) as run:
                token = run(clean)[0][:, -1:].argmax(-1)
        clean, corrupted = (torch.cat([ids, token], 1) for ids in (clean, corrupted))
    return clean[:, -count:]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gemma2", "mistral"])
@pytest.mark.parametrize("kind", ["zero", "interchange"])
def test_a_cache_gives_the_text_that_whole_passes_give(name, kind):
    """Also in windows shorter than the text."""
    model = wrap_model(family(name))
    (batch,) = equal_lengths(random_pairs(6), 9)
    ablated = AblatedModel(model, NODES, kind, None)
    with ablated.ready():
        caches = {}
        states = ablated.states(batch.clean_ids, batch.corrupted_ids, caches)
        tokens = ablated.generate(states[:, -1], caches, 5)
    values = dict.fromkeys(NODES, 0.0) if kind == "zero" else None
    wanted = greedy(model, values, batch.clean_ids, batch.corrupted_ids, 5)
    assert torch.equal(tokens, wanted)


def test_means_by_hand():
    model = wrap_model(random_gpt2())
    means = [NodeMeans(model, ["m1"], per_position=choice) for choice in (True, False)]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8]])
    activations = []
    for part in ids:
        for each in means:
            each.add(part)
        with torch.no_grad(), model.intervene() as run:
            activations.append(run(part, ["m1"])[1]["m1"])
    first = torch.cat([x[:, 1] for x in activations]).mean(0)
    every = torch.cat([x.flatten(0, 1) for x in activations]).mean(0)
    torch.testing.assert_close(means[0].get("m1", 1, 1), first[None])
    torch.testing.assert_close(means[0].get("m1", 3, 1), every[None])  # beyond the prompts
    torch.testing.assert_close(means[1].get("m1", 1, 1), every[None])


def test_free_text_is_right_if_it_contains_an_answer(tokenizer):
    model = load_model("embedded", device="cpu")
    text = "Then, {0} and {1} went to the park. {1} gave a ring to<predict> {0}</predict>"
    record = {"clean": text.format("Mary", "John"), "corrupted": text.format("Anna", "Luke")}
    pair = encode_pair(tokenizer, record)
    result = ablate(model, ["a0.h0"], [pair, pair], generate=3, num_random=0)
    assert result.full.texts[0].startswith(" Mary")
    assert result.full.measures["answers"].tolist() == [1, 1]
    answers = {record["clean"]: [" Luke", "nobody"]}
    wrong = ablate(model, ["a0.h0"], [pair], generate=3, num_random=0, answers=answers)
    assert wrong.full.measures["answers"].tolist() == [0]
    # Of a prediction of several tokens, only the prompt is given.
    two = Pair(pair.clean_ids + (5,), pair.corrupted_ids + (5,), (pair.target_ids[0], 5))
    texts = ablate(model, ["a0.h0"], [two], generate=3, num_random=0).full.texts
    assert texts[0] == result.full.texts[0]


def test_what_is_known_to_matter_stands_out():
    """A head whose output alone decides, among heads that write nothing."""
    hf_model = random_gpt2(n_layer=2)
    for block in hf_model.transformer.h:
        block.attn.c_proj.bias.data.zero_()
        block.attn.c_proj.weight.data[:, :] *= 0
    weight = hf_model.transformer.h[1].attn.c_proj.weight.data
    weight[8:16] = torch.randn(8, 32)  # head 1
    model = wrap_model(hf_model)
    pairs = random_pairs(30)
    scores = {f"a{layer}.h{head}": float(head == 1) for layer in range(2) for head in range(4)}
    result = ablate(model, ["a1.h1"], pairs, scores=scores, num_random=20)
    assert result.low_scoring.mean("kl") == 0
    assert result.low_scoring.nodes != ("a1.h1",)
    same = [outcome.nodes == ("a1.h1",) for outcome in result.random]  # of four heads
    assert 0 < sum(same) < 12
    assert [outcome.mean("kl") > 0 for outcome in result.random] == same
    by = {(c.measure, c.other): c for c in result.comparisons()}
    assert by["kl", "random"].p_random == pytest.approx((1 + sum(same)) / 21)
    assert by["kl", "low-scoring"].difference.low > 0
    other = ablate(model, ["a1.h0"], pairs, scores=scores, num_random=20)
    assert other.ablated.mean("kl") == 0
    assert f"{(1 + sum(same)) / 21:.3f}" in in_words(result)
    for each in (result, other):
        assert len(ablation_tables(each, "title")[0].rows) == 6
        assert each.to_dict()["num_prompts"] == 30


def test_what_cannot_be_ablated_is_refused():
    model = wrap_model(random_gpt2())
    with pytest.raises(ConfigError, match=r"a9\.h0"):
        ablate(model, ["a9.h0"], random_pairs(2))
    with pytest.raises(ConfigError, match="tok_embeds"):
        ablate(model, ["tok_embeds"], random_pairs(2))
    program = load_model("tracr/reverse", device="cpu")
    pair = Pair((3, 0, 1), (3, 1, 0), (0, 0, 0))
    with pytest.raises(ConfigError, match="text"):
        ablate(program, ["a0.h0"], [pair], generate=2)
    assert ablate(program, ["m0"], [pair, pair]).ablated.measures["error"].shape == (2,)


# ------------------------------------------------------------------------------------ the questions


def test_whereabouts_by_hand():
    """The answer is where the last move of the person led; the corrupted story leads elsewhere."""
    lengths = set()
    for seed in range(200):
        record = whereabouts.sample(random.Random(seed), num_facts=(2, 6))
        answers = {}
        for side in ("clean", "corrupted"):
            prompt, answer = record[side].removesuffix("</predict>").split("<predict>")
            story, question = prompt.split("\n\n")[-1].split("\nQuestion: Where is ")
            facts = [fact.split() for fact in story.removeprefix("Story: ").split(".") if fact]
            name = question.split("?")[0]
            places = {who: where for who, *_, where in facts}
            assert places[name] == answer.strip()
            assert len(places) > 1
            answers[side] = answer
            lengths.add(len(facts))
        visited = {fact[-1] for fact in facts} | {answers["clean"].strip()}
        assert record["distractor"].strip() in visited - {answers["clean"].strip()}
        assert answers["corrupted"].strip() not in record["clean"].split("\n\n")[-1]
    assert lengths == {2, 3, 4, 5, 6}
