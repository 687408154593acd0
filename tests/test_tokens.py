"""Attributions to tokens: known answers, parity with the library, and what adds up to what."""

import base64
import json

import pytest
import torch
from conftest import call, random_gpt2, random_pairs, run_cli, write_jsonl
from safetensors.torch import load
from test_llama import FAMILIES, random_llama

from edgeprune.circuit import Circuit
from edgeprune.drawing.tokens import scores_text
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError, DataError
from edgeprune.evaluation.tokens import STEPS, attribute_tokens
from edgeprune.formats.inseq import inseq_json
from edgeprune.models.load import load_model, wrap_model
from edgeprune.prompts import Pair, collate
from edgeprune.prompts.encode import encode_pair
from edgeprune.scores import EdgeScores

MODELS = {
    "gpt2": random_gpt2,
    "llama": lambda: random_llama(FAMILIES["llama"]),
    "gemma3": lambda: random_llama(FAMILIES["gemma3"]),
}


def random_circuit(model: CircuitModel, share: float = 0.6) -> Circuit:
    noise = torch.Generator().manual_seed(1)
    scores = EdgeScores(model.graph, torch.randn(model.graph.num_edges, generator=noise))
    return scores.circuit(num_edges=round(share * model.graph.num_edges))


def scores_by_hand(pair: Pair, logits: torch.Tensor) -> dict[str, float]:
    """Of a pair without further answers; [vocabulary]."""
    answer, wrong = pair.target_ids[0], pair.distractor_ids[0]
    probability = logits.softmax(-1)[answer].item()
    contrast = (logits[answer] - logits[wrong]).item()
    return {"logit": logits[answer].item(), "probability": probability, "contrast": contrast}


@pytest.mark.parametrize(
    ("name", "target"),
    [("gpt2", "logit"), ("gpt2", "probability"), ("llama", "contrast"), ("gemma3", "contrast")],
)
def test_they_are_the_integrated_gradients_of_the_library_s_model(name, target):
    """With its own scaling of embeddings (Gemma); and they add up to its own change."""
    hf_model, steps = MODELS[name](), 16
    pairs = random_pairs(3)
    result = attribute_tokens(wrap_model(hf_model), pairs, target=target, steps=steps)
    embed = hf_model.get_input_embeddings()
    for pair, answer in zip(pairs, result.answers, strict=True):
        ids = torch.tensor([pair.clean_ids, pair.corrupted_ids])
        end, start = embed(ids).detach()
        expected = 0.0
        for step in range(steps):
            x = torch.lerp(start, end, (step + 0.5) / steps)[None].requires_grad_()
            logits = hf_model(inputs_embeds=x).logits[0, -1]
            values = {"logit": logits, "probability": logits.softmax(-1),
                      "contrast": logits - logits[pair.distractor_ids[0]]}  # fmt: skip
            (grad,) = torch.autograd.grad(values[target][pair.target_ids[0]], x)
            expected = expected + (grad[0] * (end - start)).sum(-1) / steps
        found = answer.through["full model"]
        torch.testing.assert_close(found.tokens, expected, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            clean, corrupted = (scores_by_hand(pair, z) for z in hf_model(ids).logits[:, -1])
        assert found.clean == pytest.approx(clean, abs=1e-5)
        assert found.corrupted == pytest.approx(corrupted, abs=1e-5)
        assert found.effect == pytest.approx(clean[target] - corrupted[target], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "ablation"),
    [("gpt2", "interchange"), ("gpt2", "zero"), ("gpt2", "mean"), ("llama", "zero"),
     ("gemma3", "interchange")],
)  # fmt: skip
def test_they_add_up_to_the_effect_within_one_percent(name, ablation):
    """Through the full model, and through a circuit with any ablation, by the default steps."""
    model, pairs = wrap_model(MODELS[name]()), random_pairs(2)
    circuit, ablation = random_circuit(model), Ablation(model, ablation, pairs)
    result = attribute_tokens(model, pairs, circuit, ablation=ablation, batch_size=2)
    assert result.target == "contrast"
    batch, gates = collate(pairs), torch.tensor(circuit.mask()).float()
    with torch.no_grad():
        values = ablation.values(batch, model.run_pair(batch)[1])
        ends = [
            model.run_circuit(batch, gates, values, embeddings=model.architecture.embed(ids))
            for ids in (batch.clean_ids, batch.corrupted_ids)
        ]
        reference = model.run_pair(batch)[0]
    for i, (pair, answer) in enumerate(zip(pairs, result.answers, strict=True)):
        for one in answer.through.values():
            assert one.error <= 0.01 and one.steps in STEPS
            assert one.tokens.sum().item() == pytest.approx(one.effect, rel=0.0101)
        clean, corrupted = (scores_by_hand(pair, logits[i])["contrast"] for logits in ends)
        assert answer.through["circuit"].effect == pytest.approx(clean - corrupted, abs=1e-4)
        full = answer.through["full model"].clean["contrast"]
        assert full == pytest.approx(scores_by_hand(pair, reference[i])["contrast"], abs=1e-4)


def test_the_only_token_that_is_attended_to_gets_everything():
    """One head, which attends to position 1 whatever the tokens, and no MLP."""
    width, chosen = 32, 1
    hf_model = random_gpt2(n_layer=1, n_head=1)
    block, wpe = hf_model.transformer.h[0], hf_model.transformer.wpe.weight.data
    wpe.zero_()
    wpe[chosen, 0] = 30.0  # by far the largest number of its stream
    hf_model.transformer.wte.weight.data[:, 0] = 0
    block.ln_1.weight.data.fill_(1)
    block.ln_1.bias.data.zero_()
    attention = block.attn.c_attn
    attention.weight.data[:, : 2 * width] = 0
    attention.bias.data[: 2 * width] = 0
    attention.bias.data[0] = 400.0  # every query asks for number 0
    attention.weight.data[0, width] = 1.0
    block.mlp.c_proj.weight.data.zero_()
    pairs = [
        Pair((*pair.clean_ids[:-1], 7), (*pair.corrupted_ids[:-1], 7), *pair_rest(pair))
        for pair in random_pairs(4)
    ]
    result = attribute_tokens(wrap_model(hf_model), pairs)
    for answer in result.answers:
        one = answer.through["full model"]
        assert one.tokens[chosen].item() == pytest.approx(one.effect, rel=0.01)
        others = [i for i in range(8) if i != chosen]
        assert abs(one.effect) > 0.01 > 1e-4 * one.tokens[others].abs().max()
        assert one.tokens[others].abs().max() < 1e-5
        head = one.nodes[result.nodes.index("a0.h0")]
        assert head[-1].item() == pytest.approx(one.effect, rel=0.02)  # written at the last token
        assert head[:-1].abs().max() == 0


def pair_rest(pair: Pair) -> tuple:
    return pair.target_ids, pair.answer_ids, pair.distractor_ids, pair.contrast, pair.text


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_conductances_of_nodes_on_every_path_add_up(name):
    """Embeddings -> the heads of layer 0 -> MLP 1 -> output: each of these three is a cut."""
    model, pairs = wrap_model(MODELS[name]()), random_pairs(2)
    graph, first = model.graph, model.graph.embedding_writers[0]
    edges = [(first, reader) for reader in graph.sites[0].readers]
    edges += [(f"a0.h{head}", "m1") for head in range(graph.num_heads)] + [("m1", "resid_post")]
    circuit = Circuit.from_edges(graph, edges)
    for answer in attribute_tokens(model, pairs, circuit, steps=32).answers:
        one = answer.through["circuit"]
        rows = dict(zip(graph.writers, one.nodes, strict=True))
        torch.testing.assert_close(rows[first], one.tokens, atol=1e-5, rtol=1e-3)
        heads = sum(rows[f"a0.h{head}"].sum().item() for head in range(graph.num_heads))
        assert heads == pytest.approx(one.effect, rel=0.02, abs=1e-4)
        assert rows["m1"].sum().item() == pytest.approx(one.effect, rel=0.02, abs=1e-4)
        assert rows["m1"][:-1].abs().max() == 0  # nothing reads it elsewhere
        assert rows["m0"].abs().max() == rows["a1.h0"].abs().max() == 0


@pytest.mark.parametrize("writers", ["tokens", "none"])
def test_embeddings_without_edges_are_attributed_as_well(writers):
    """They always flow; through the full model this makes no difference."""
    pairs = random_pairs(3)
    whole = attribute_tokens(wrap_model(random_gpt2()), pairs)
    model = wrap_model(random_gpt2(), embedding_writers=writers)
    result = attribute_tokens(model, pairs, random_circuit(model))
    for answer, other in zip(result.answers, whole.answers, strict=True):
        wanted = other.through["full model"].tokens
        torch.testing.assert_close(
            answer.through["full model"].tokens, wanted, atol=1e-5, rtol=1e-3
        )
        assert answer.through["circuit"].error <= 0.01


def test_every_predicted_token_is_an_answer():
    """Each as if it alone were predicted; a contrast only where answer and distractor differ."""
    model = wrap_model(random_gpt2())
    pair = Pair((1, 2, 3, 4, 5), (1, 6, 3, 8, 5), (4, 5, 9), (5,), (11,), 1)
    result = attribute_tokens(model, [pair], target="logit")
    assert [answer.step for answer in result.answers] == [0, 1, 2]
    assert [len(answer.tokens) for answer in result.answers] == [3, 4, 5]
    alone = attribute_tokens(model, [Pair((1, 2, 3, 4), (1, 6, 3, 8), (5,), (5,), (11,))])
    (contrast,) = attribute_tokens(model, [pair], target="contrast").answers
    assert contrast.step == 1
    torch.testing.assert_close(
        contrast.through["full model"].tokens, alone.answers[0].through["full model"].tokens
    )
    one = result.answers[0].through["full model"]
    assert one.clean["contrast"] != one.clean["contrast"]  # there is none
    of_two = alone.to_dict()["answers"][0]
    for target, order in (("logit", "lpc"), ("contrast", "cp"), ("probability", "pc")):
        shown = scores_text(of_two, "full model", target).split(", ")
        assert [part[0] for part in shown] == [*order]  # the target, then always in this order
    # In Inseq's form it is one sequence with a column per predicted token.
    sequences = inseq_json(result.to_dict(), "m")["attributes"]["sequence_attributions"]
    fields = sequences[0]["attributes"]
    values = load(base64.b64decode(fields["target_attributions"]))["attribution"]
    assert len(sequences) == 1 and values.shape == (6, 3)
    assert [token["attributes"]["id"] for token in fields["target"]] == [1, 2, 3, 4, 5, 9]
    for column, answer in enumerate(result.answers):
        stop = len(answer.tokens)
        assert torch.equal(values[:stop, column], answer.through["full model"].tokens)
        assert values[stop:, column].isnan().all()


def test_inseq_has_one_sequence_per_prompt_even_if_one_prompt_continues_another():
    model = wrap_model(random_gpt2())
    first = Pair((1, 2, 3), (1, 6, 3), (4,), (4,), (11,))
    second = Pair((1, 2, 3, 4), (1, 6, 3, 4), (4, 5), (5,), (11,), 1)  # differs at its second token
    result = attribute_tokens(model, [first, second], steps=2).to_dict()
    assert [answer["step"] for answer in result["answers"]] == [0, 1]
    sequences = inseq_json(result, "m")["attributes"]["sequence_attributions"]
    assert [len(each["attributes"]["target"]) for each in sequences] == [4, 5]


def test_prompts_of_different_lengths_do_not_disturb_each_other():
    model = wrap_model(random_gpt2())
    pairs = [*random_pairs(2, length=5), *random_pairs(2, length=9, seed=3)]
    together = attribute_tokens(model, pairs, steps=4).answers
    for pair, answer in zip(pairs, together, strict=True):
        (alone,) = attribute_tokens(model, [pair], steps=4).answers
        for name in ("tokens", "nodes"):
            found, wanted = (getattr(x.through["full model"], name) for x in (answer, alone))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_several_answers_count_together():
    """log-sum-exp of their logits, sum of their probabilities."""
    model = wrap_model(random_gpt2())
    pair = Pair((1, 2, 3), (1, 4, 3), (5,), (5, 6), (7, 8))
    (answer,) = attribute_tokens(model, [pair]).answers
    logits = model.run_pair(collate([pair]))[0][0]
    wanted = {
        "logit": logits[[5, 6]].logsumexp(0).item(),
        "probability": logits.softmax(-1)[[5, 6]].sum().item(),
        "contrast": (logits[[5, 6]].logsumexp(0) - logits[[7, 8]].logsumexp(0)).item(),
    }
    assert answer.through["full model"].clean == pytest.approx(wanted, abs=1e-5)
    assert (answer.text, answer.distractor) == ("5/6", "7/8")


def test_bad_input_is_one_clear_error(tokenizer):
    model, pairs = wrap_model(random_gpt2()), random_pairs(2)
    with pytest.raises(ConfigError, match="chance.*logit, probability, contrast"):
        attribute_tokens(model, pairs, target="chance")
    plain = Pair((1, 2), (1, 3), (4,))
    with pytest.raises(ConfigError, match="distractor"):
        attribute_tokens(model, [*pairs, plain], target="contrast")
    assert attribute_tokens(model, [*pairs, plain]).target == "logit"
    with pytest.raises(DataError, match="known token"):
        attribute_tokens(model, [Pair((1, 2), (1, 3), (-1,))])
    with pytest.raises(DataError, match="equal their clean"):
        attribute_tokens(model, [Pair((1, 2), (1, 2), (4,))], ablation="zero")
    with pytest.raises(DataError, match="no prompts"):
        attribute_tokens(model, [])
    with pytest.raises(ConfigError, match="outputs values"):
        attribute_tokens(load_model("tracr/reverse", device="cpu"), [plain])
    with pytest.raises(ValueError, match="Graph"):
        attribute_tokens(model, pairs, random_circuit(wrap_model(random_gpt2(n_layer=2))))


# ----------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The command on ioi, without a run."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    done = run_cli("tokens", "model=embedded", "task=ioi", "prompts=3", f"output={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_on_ioi_the_names_lead(found):
    folder, shown = found
    record = json.loads((folder / "tokens.json").read_text())
    assert record["target"] == "contrast" and len(record["answers"]) == 3
    sums = {"IO": 0.0, "S1": 0.0, "S2": 0.0}
    for answer in record["answers"]:
        one = answer["through"]["full model"]
        labels = {int(i): name for i, name in answer["labels"].items()}
        for i, value in enumerate(one["tokens"]):
            if value:
                sums[labels[i]] += value  # every token that counts is a name
        assert sum(one["tokens"]) == pytest.approx(one["effect"], rel=0.01)
        top = max(range(len(one["tokens"])), key=one["tokens"].__getitem__)
        assert labels[top] in ("IO", "S2")
    assert sums["IO"] > 0 > sums["S1"]
    assert "IO" in shown and "full model" in shown and "circuit" not in shown.split("->")[0]
    html = (folder / "tokens.html").read_text()
    assert html.count("<h2>") == 3 and "src=" not in html


def test_inseq_loads_the_file(found):
    inseq = pytest.importorskip("inseq")
    out = inseq.FeatureAttributionOutput.load(found[0] / "tokens-inseq.json")
    record = json.loads((found[0] / "tokens.json").read_text())
    assert len(out) == 3
    for sequence, answer in zip(out, record["answers"], strict=True):
        one = answer["through"]["full model"]
        assert [token.token for token in sequence.target[:-1]] == answer["tokens"]
        assert sequence.target_attributions[:-1, 0].tolist() == pytest.approx(one["tokens"])
        assert sequence.step_scores["contrast_logits_diff"].item() == pytest.approx(
            one["clean"]["contrast"]
        )
    assert out.show(display=False, return_html=True)


def test_html_shows_text_as_text(tmp_path, tokenizer):
    """Tokens, which are anybody's text, never become markup."""
    model = load_model("embedded", device="cpu")
    record = {"clean": "<b>&amp; Mary</b> gave<predict> a</predict>",
              "corrupted": "<b>&amp; John</b> gave<predict> a</predict>"}  # fmt: skip
    html = attribute_tokens(model, [encode_pair(tokenizer, record)], steps=2)._repr_html_()
    assert "<b>" not in html and "Mary" in html


def test_the_command_refuses_bad_input(tmp_path, capsys, monkeypatch):
    data = write_jsonl(tmp_path / "plain.jsonl", {
        "clean": "Then Mary<predict> and</predict>", "corrupted": "Then John<predict> and</predict>"
    })  # fmt: skip
    few = ["model=embedded", f"task.path={data}", "split=train", f"output={tmp_path / 'out'}"]
    for arguments, wanted in [
        (["tokens"], "give a run directory"),
        (["tokens", *few, "target=chance"], "target=chance"),
        (["tokens", *few, "steps=0"], "steps=0"),
        (["tokens", *few, "target=contrast"], "distractor"),
        (["tokens", *few, "launcher.shard=true"], "several processes"),
        (["tokens", *few, "launcher.shard=true", "model.bits=8"], "model.bits="),
        (["tokens", *few, "launcher.processes=2"], "launcher.shard=true"),
        (["tokens", tmp_path / "nothing"], "no such file"),
    ]:
        code, _, errors = call(capsys, monkeypatch, *arguments)
        assert code == 2 and wanted in errors.splitlines()[-1], errors
        assert not (tmp_path / "out").exists()
