"""The clean-up: answers known by hand, and what holds whatever it is given."""

import pytest
import torch
from conftest import random_gpt2, random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_micro_model import CIRCUIT, induction_pairs, micro_model

from edgeprune import clean_up, evaluate, prune
from edgeprune.circuit import Circuit
from edgeprune.config import AblationConfig, AblationKind
from edgeprune.engine import cache as kept
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import ConfigError
from edgeprune.evaluation import cleanup
from edgeprune.models import load_model, wrap_model
from edgeprune.prompts import encode_records
from edgeprune.prompts.tasks.tracr import make_records


def whole(model) -> Circuit:
    return Circuit.from_mask(model.graph, [True] * model.graph.num_edges)


def kl(model, circuit, pairs, ablation="interchange") -> float:
    return evaluate(model, circuit, pairs, ablation=ablation).circuit.kl


def test_what_a_known_circuit_can_do_without_goes():
    model, pairs = micro_model(), induction_pairs(60, seed=3)
    true = Circuit.from_edges(model.graph, CIRCUIT)
    noise = [("tok_embeds", "a0.h0.v"), ("a0.h0", "m0"), ("m0", "resid_post"), ("m0", "a1.h1.q")]
    given = Circuit(model.graph, true.edge_set | set(noise))
    ranking = list(range(model.graph.num_edges))
    result = clean_up(model, given, pairs, tolerance=0.01, ranking=ranking)
    assert result.circuit == true
    assert (result.num_edges_before, result.num_edges_after) == (9, 5)
    assert result.distance_before == pytest.approx(kl(model, given, pairs), rel=1e-4)
    assert result.distance_after == pytest.approx(kl(model, true, pairs), rel=1e-4)


def test_edges_go_together_where_that_goes_well():
    model, pairs = micro_model(), induction_pairs(40, seed=3)
    ranking = sorted(
        range(model.graph.num_edges), key=lambda n: model.graph.edges[n] not in CIRCUIT
    )
    result = clean_up(model, whole(model), pairs, tolerance=0.01, ranking=ranking)
    assert result.circuit.edge_set == CIRCUIT
    edges = model.graph.num_edges
    assert result.passes < edges / 2, (result.passes, edges)


def test_where_everything_is_needed_nothing_goes():
    model, pairs = micro_model(), induction_pairs(40, seed=3)
    true = Circuit.from_edges(model.graph, CIRCUIT)
    result = clean_up(
        model, true, pairs, tolerance=0.01, ranking=list(range(model.graph.num_edges))
    )
    assert result.circuit == true
    assert result.passes <= 2 + len(true) + 2


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.1, 1),
    tolerance=st.sampled_from([0.0, 0.01, 0.3]),
    kind=st.sampled_from(list(AblationKind)),
)
def test_never_too_far_always_a_part_and_nothing_more_can_go(seed, share, tolerance, kind):
    model = wrap_model(random_gpt2(n_layer=1, n_head=1, n_embd=16))
    pairs = random_pairs(6, length=4, seed=seed)
    graph = model.graph
    given = Circuit.random(graph, round(share * graph.num_edges), seed)
    ablation = Ablation(model, AblationConfig(kind), pairs)
    ranking = torch.randperm(graph.num_edges, generator=torch.Generator().manual_seed(seed))
    result = clean_up(
        model, given, pairs, tolerance=tolerance, ranking=ranking.tolist(), ablation=ablation
    )
    limit = kl(model, given, pairs, ablation) + tolerance
    slack = 1e-5 * (1 + limit)
    assert result.circuit.edge_set <= given.edge_set
    assert kl(model, result.circuit, pairs, ablation) <= limit + slack
    for edge in result.circuit.edge_set:
        less = Circuit(graph, result.circuit.edge_set - {edge})
        assert kl(model, less, pairs, ablation) > limit - slack


def test_a_large_circuit_is_tried_in_parts(monkeypatch):
    """Every part of a random model matters: each is tried once, however many edges there are."""
    monkeypatch.setattr(cleanup, "SMALL", 16)
    model, pairs = wrap_model(random_gpt2()), random_pairs(4)
    result = clean_up(
        model, whole(model), pairs, tolerance=0.0, ranking=list(range(model.graph.num_edges))
    )
    parts = -(-model.graph.num_edges // (model.graph.num_edges // 16))
    assert len(result.circuit) > 0.9 * model.graph.num_edges > 16
    assert result.passes <= parts + 10


def test_a_distance_that_is_no_number_is_refused():
    model, pairs = wrap_model(random_gpt2()), random_pairs(2)
    model.architecture.blocks[0].layer.mlp.c_fc.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not a finite number"):
        clean_up(model, whole(model), pairs, tolerance=0.1, ranking=range(model.graph.num_edges))


@pytest.mark.parametrize("ranking", [[], [1, 2, 3], [0] * 302, range(1, 303), range(303)])
def test_a_ranking_of_other_than_all_edges_is_refused(model, ranking):
    with pytest.raises(ValueError, match=rf"of {len(ranking)} numbers.* expected each of 0 to 301"):
        clean_up(model, whole(model), random_pairs(2), tolerance=0.1, ranking=ranking)


def test_a_circuit_that_misses_something_is_completed():
    model = load_model("tracr/reverse")
    folder, config = model.tokenizer.folder, model.tokenizer.config
    pairs, _ = encode_records(make_records(folder, config), model.tokenizer)
    nothing = Circuit(model.graph, frozenset())
    ranking = list(range(model.graph.num_edges))
    result = clean_up(model, nothing, pairs, tolerance=1e-3, ranking=ranking)
    assert result.circuit.edges == [("tok_embeds", "a2.h0.v"), ("a2.h0", "resid_post")]
    assert result.distance_before > 0.5 > 1e-3 >= result.distance_after


def test_activations_that_do_not_fit_are_computed_anew(monkeypatch):
    model, pairs = micro_model(), induction_pairs(40, seed=3)
    ranking = list(range(model.graph.num_edges))
    one = clean_up(model, whole(model), pairs, tolerance=0.01, ranking=ranking)
    monkeypatch.setattr("edgeprune.evaluation.cleanup.MAX_KEPT", 0)
    other = clean_up(model, whole(model), pairs, tolerance=0.01, ranking=ranking)
    assert kept.MAX_KEPT > 0
    assert one == other


def test_pruning_cleans_up_when_asked():
    model, pairs = micro_model(), induction_pairs(100, seed=1)
    quick = {"steps": 20, "init_mean": 0.0, "progress": False, "num_edges": 20}
    rough = prune(model, pairs, **quick).circuit
    cleaned = prune(model, pairs, cleanup=0.01, **quick).circuit
    assert cleaned.edge_set < rough.edge_set
    with pytest.raises(ConfigError, match="cleanup=-0.1"):
        prune(model, pairs, cleanup=-0.1, **quick)
