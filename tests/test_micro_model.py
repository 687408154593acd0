"""The known circuit of a GPT-2 with hand-made weights is recovered edge for edge.

The model does induction on eight tokens. The residual stream has five parts: the token (A), the
previous token (B), the answer (C), the position (P) and noise (N), in that order:

    a0.h1  attends from each position to the previous one (by P alone) and copies A there to B here;
    a1.h0  looks (q: A) for a position whose previous token (k: B) is the current token, and copies
           its token (v: A) to C;
    the unembedding reads C.

Positions are the same in the clean and the corrupted prompt, so under interchange ablation an edge
matters only if tokens flow through it: the five edges of CIRCUIT. The other heads and the MLPs
write noise into N, which nothing reads.
"""

import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from edgeprune import prune
from edgeprune.circuit import Circuit
from edgeprune.config import TrainerConfig
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.methods.paper import Lagrangian
from edgeprune.models.load import wrap_model
from edgeprune.prompts import Pair, collate
from edgeprune.training.trainer import Trainer, train

TOKENS = 8
A, B, C, P, N = (slice(start, start + 8) for start in range(0, 40, 8))
D_MODEL, D_HEAD = 40, 20
SHARP = 2.0

CIRCUIT = {
    ("tok_embeds", "a0.h1.v"),
    ("a0.h1", "a1.h0.k"),
    ("tok_embeds", "a1.h0.q"),
    ("tok_embeds", "a1.h0.v"),
    ("a1.h0", "resid_post"),
}


def micro_model():
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=8, n_embd=D_MODEL, n_layer=2, n_head=2, n_inner=16,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data.zero_()
    eye = torch.eye(8)
    transformer = model.transformer
    transformer.wte.weight.data[:, A] = eye
    transformer.wpe.weight.data[:, P] = eye
    model.lm_head.weight.data[:, C] = 5 * eye

    def head(layer: int, head: int, q, k, v, out) -> None:
        """Each of q, k, v and out is (part of the stream, 8 x 8 matrix)."""
        attention = transformer.h[layer].attn
        for part, (place, matrix) in enumerate((q, k, v)):
            start = part * D_MODEL + head * D_HEAD
            attention.c_attn.weight.data[place, start : start + 8] = matrix
        place, matrix = out
        attention.c_proj.weight.data[head * D_HEAD : head * D_HEAD + 8, place] = matrix

    shift = torch.diag(torch.ones(7), 1)  # position s -> s + 1
    noise = lambda: torch.randn(8, 8)  # noqa: E731
    head(0, 1, q=(P, SHARP * eye), k=(P, SHARP * shift), v=(A, eye), out=(B, eye))
    head(1, 0, q=(A, SHARP * eye), k=(B, SHARP * eye), v=(A, eye), out=(C, eye))
    for layer, other in ((0, 0), (1, 1)):
        head(layer, other, *((A, noise()) for _ in range(3)), out=(N, 0.02 * noise()))
        mlp = transformer.h[layer].mlp
        mlp.c_fc.weight.data[A] = torch.randn(8, 16)
        mlp.c_proj.weight.data[:, N] = 0.02 * torch.randn(16, 8)
    return wrap_model(model)


def induction_pairs(count: int, seed: int) -> list[Pair]:
    """x0 ... x6 xj -> x(j+1), all x distinct."""
    rng = random.Random(seed)

    def prompt() -> tuple[tuple[int, ...], int]:
        x = rng.sample(range(TOKENS), 7)
        j = rng.randrange(1, 6)  # x0 has no previous token
        return (*x, x[j]), x[j + 1]

    pairs = []
    for _ in range(count):
        (clean, answer), (corrupted, _) = prompt(), prompt()
        distractor = next(t for t in clean[:7] if t != answer)
        pairs.append(Pair(clean, corrupted, (answer,), (answer,), (distractor,), 0, str(clean)))
    return pairs


def test_the_model_does_induction():
    model = micro_model()
    batch = collate(induction_pairs(200, seed=9))
    reference, _ = model.run_pair(batch)
    assert (reference.argmax(-1) == batch.target_ids).all()
    assert reference.softmax(-1).max(-1).values.min() > 0.9


def test_the_circuit_suffices_and_every_edge_of_it_is_needed():
    model = micro_model()
    pairs = induction_pairs(100, seed=1)
    whole = evaluate(model, Circuit.from_edges(model.graph, CIRCUIT), pairs)
    assert whole.circuit.kl < 0.01
    for edge in CIRCUIT:
        without = evaluate(model, Circuit.from_edges(model.graph, CIRCUIT - {edge}), pairs)
        assert without.circuit.kl > 0.5, edge


@pytest.mark.parametrize("seed", range(5))
def test_scores_for_every_size_rank_the_circuit_above_all_other_edges(seed):
    model, pairs = micro_model(), induction_pairs(200, seed)
    found = prune(model, pairs, num_edges=len(CIRCUIT), seed=seed, progress=False)
    assert found.circuit.edge_set == CIRCUIT


@pytest.mark.parametrize("seed", range(3))
def test_the_published_method_finds_the_circuit(seed):
    model = micro_model()
    pairs, graph = induction_pairs(200, seed), model.graph
    method = Lagrangian(
        graph, seed=seed, device=model.device, steps=600, learning_rate=0.1, weight_decay=0.0,
        adam_epsilon=1e-8, lambda_learning_rate=1.0, lr_warmup_steps=10, start_sparsity=0.5,
        target_sparsity=1 - len(CIRCUIT) / graph.num_edges + 0.07, sparsity_warmup_steps=400,
        warmup="linear", node_gates=False, start_node_sparsity=0.0, target_node_sparsity=0.0,
        init_mean=0.0, init_std=0.01,
    )  # fmt: skip
    ablation, settings = Ablation(model, "interchange", pairs), TrainerConfig(batch_size=32)
    trainer = Trainer(model, pairs, method, settings, seed, ablation)
    train(trainer)
    assert trainer.scores().circuit(num_edges=len(CIRCUIT)).edge_set == CIRCUIT
