"""The clean-up: known answers, and what holds for every circuit."""

import pytest
import torch
from conftest import random_gpt2, random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_micro_model import CIRCUIT, induction_pairs, micro_model

from edgeprune.circuit import Circuit
from edgeprune.engine import cache
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation import cleanup
from edgeprune.evaluation.cleanup import clean_up
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.models.load import load_model, wrap_model
from edgeprune.prompts import encode_records
from edgeprune.prompts.tasks.tracr import make_records
from edgeprune.scores import EdgeScores


def full_circuit(model) -> Circuit:
    return Circuit.from_mask(model.graph, [True] * model.graph.num_edges)


def in_order(model) -> EdgeScores:
    """Scores that rank the edges in the graph's order."""
    return EdgeScores(model.graph, -torch.arange(model.graph.num_edges))


def kl(model, circuit, pairs, ablation="interchange") -> float:
    return evaluate(model, circuit, pairs, ablation=ablation).circuit.kl


def test_edges_that_are_not_needed_are_removed():
    model, pairs = micro_model(), induction_pairs(60, seed=3)
    true = Circuit.from_edges(model.graph, CIRCUIT)
    noise = [("tok_embeds", "a0.h0.v"), ("a0.h0", "m0"), ("m0", "resid_post"), ("m0", "a1.h1.q")]
    noisy = Circuit(model.graph, true.edge_set | set(noise))
    result = clean_up(model, noisy, pairs, tolerance=0.01, scores=in_order(model))
    assert result.circuit == true
    assert (result.num_edges_before, result.num_edges_after) == (9, 5)
    assert result.distance_before == pytest.approx(kl(model, noisy, pairs), rel=1e-4)
    assert result.distance_after == pytest.approx(kl(model, true, pairs), rel=1e-4)


def test_good_scores_save_passes():
    model, pairs = micro_model(), induction_pairs(40, seed=3)
    scores = EdgeScores(model.graph, torch.tensor([edge in CIRCUIT for edge in model.graph.edges]))
    result = clean_up(model, full_circuit(model), pairs, tolerance=0.01, scores=scores)
    assert result.circuit.edge_set == CIRCUIT
    assert result.passes < model.graph.num_edges / 2


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.1, 1),
    tolerance=st.sampled_from([0.0, 0.01, 0.3]),
    kind=st.sampled_from(["interchange", "zero", "mean"]),
)
def test_the_result_is_a_subset_within_the_limit_from_which_no_edge_can_be_removed(
    seed, share, tolerance, kind
):
    model = wrap_model(random_gpt2(n_layer=1, n_head=1, n_embd=16))
    pairs = random_pairs(6, length=4, seed=seed)
    graph = model.graph
    given = Circuit.random(graph, round(share * graph.num_edges), seed)
    ablation = Ablation(model, kind, pairs)
    scores = EdgeScores(
        graph, torch.rand(graph.num_edges, generator=torch.Generator().manual_seed(seed))
    )
    result = clean_up(model, given, pairs, tolerance=tolerance, scores=scores, ablation=ablation)
    limit = kl(model, given, pairs, ablation) + tolerance
    slack = 1e-5 * (1 + limit)
    assert result.circuit.edge_set <= given.edge_set
    assert kl(model, result.circuit, pairs, ablation) <= limit + slack
    for edge in result.circuit.edge_set:
        smaller = Circuit(graph, result.circuit.edge_set - {edge})
        assert kl(model, smaller, pairs, ablation) > limit - slack


def test_a_large_circuit_is_tried_in_parts(monkeypatch):
    """Every part of a random model matters, so each part is tried once."""
    monkeypatch.setattr(cleanup, "SMALL", 16)
    model, pairs = wrap_model(random_gpt2()), random_pairs(4)
    result = clean_up(model, full_circuit(model), pairs, tolerance=0.0, scores=in_order(model))
    parts = -(-model.graph.num_edges // (model.graph.num_edges // 16))
    assert len(result.circuit) > 0.9 * model.graph.num_edges > 16
    assert result.passes <= parts + 10


def test_a_distance_that_is_not_finite_is_an_error():
    model, pairs = wrap_model(random_gpt2()), random_pairs(2)
    model.architecture.blocks[0].layer.mlp.c_fc.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        clean_up(model, full_circuit(model), pairs, tolerance=0.1, scores=in_order(model))


def test_edges_are_added_to_a_circuit_that_lacks_some():
    model = load_model("tracr/reverse")
    folder, config = model.tokenizer.folder, model.tokenizer.config
    pairs = encode_records(make_records(folder, config), model.tokenizer)
    empty = Circuit(model.graph, frozenset())
    result = clean_up(model, empty, pairs, tolerance=1e-3, scores=in_order(model))
    assert result.circuit.edges == [("tok_embeds", "a2.h0.v"), ("a2.h0", "resid_post")]
    assert result.distance_before > 0.5 > 1e-3 >= result.distance_after


def test_activations_that_do_not_fit_into_memory_are_recomputed(monkeypatch):
    model, pairs = micro_model(), induction_pairs(40, seed=3)
    given, scores = full_circuit(model), in_order(model)
    one = clean_up(model, given, pairs, tolerance=0.01, scores=scores)
    monkeypatch.setattr(cache, "MAX_KEPT", 0)
    assert clean_up(model, given, pairs, tolerance=0.01, scores=scores) == one
