"""Curves of circuits of many sizes, and choosing one of them: by hand, and as properties."""

import json
import math

import pytest
import torch
from conftest import random_gpt2, random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_micro_model import CIRCUIT, induction_pairs, micro_model

from edgeprune import prune
from edgeprune.engine.ablation import Ablation
from edgeprune.errors import ConfigError
from edgeprune.evaluation.curve import (
    Curve,
    curve_panels,
    curve_table,
    default_sizes,
    log_sizes,
    measure_curve,
    refine,
)
from edgeprune.evaluation.evaluate import evaluate
from edgeprune.metrics import METRICS, Metrics
from edgeprune.models.load import load_model, wrap_model
from edgeprune.prompts import encode_records
from edgeprune.prompts.tasks.tracr import make_records
from edgeprune.scores import EdgeScores


def metrics(kl: float, exact_match: float = 0.5, **more: float) -> Metrics:
    values = {"kl": kl, "exact_match": exact_match, "accuracy": exact_match, **more}
    return Metrics(dict.fromkeys(METRICS, math.nan) | values)


def curve(kl: dict[int, float], empty: float = 9.0) -> Curve:
    return Curve({size: metrics(value) for size, value in {0: empty, **kl}.items()}, 7, "test")


def at_most(limit: float):
    return lambda circuit, empty: circuit.kl <= limit


def random_scores(model, seed: int = 0) -> EdgeScores:
    noise = torch.Generator().manual_seed(seed)
    return EdgeScores(model.graph, torch.randn(model.graph.num_edges, generator=noise))


def program(name: str):
    """A compiled transformer, and all its prompts."""
    model = load_model(f"tracr/{name}")
    records = make_records(model.tokenizer.folder, model.tokenizer.config)
    return model, encode_records(records, model.tokenizer)


# ------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("kl", "smallest"),
    [
        ({1: 3, 4: 2, 9: 0.5, 20: 0.4, 60: 0}, 9),
        ({1: 3, 4: 0.1, 9: 2, 20: 0.4, 60: 0}, 20),  # 4 edges are good by chance
        ({1: 0.1, 4: 0.1, 9: 0.1, 20: 2, 60: 0}, 60),
        ({1: 3, 4: 3, 9: 3, 20: 3, 60: 0}, 60),
        ({1: 0.5, 4: 0.5, 9: 0.5, 20: 0.2, 60: 0}, 1),
        ({1: 3, 4: math.nan, 9: 0.5, 60: 0}, 9),
        ({60: 0}, 60),
        ({1: 0.1, 60: 0}, 1),
    ],
)
def test_the_smallest_good_size_from_which_all_larger_ones_are_good(kl, smallest):
    assert curve(kl).smallest(at_most(0.5)) == smallest
    assert curve(dict(reversed(kl.items()))).smallest(at_most(0.5)) == smallest


def test_a_rule_knows_the_empty_circuit():
    one = curve({1: 8.0, 4: 5.0, 9: 0.5, 60: 0.0}, empty=10.0)
    for share, size in ((0.9, 1), (0.5, 4), (0.1, 9), (0.01, 60)):
        assert one.smallest(lambda circuit, empty, s=share: circuit.kl <= s * empty.kl) == size


@given(
    low=st.integers(1, 50), more=st.integers(0, 100_000), count=st.integers(1, 30),
)  # fmt: skip
def test_logarithmic_sizes_go_from_low_to_high(low, more, count):
    high = low + more
    sizes = log_sizes(low, high, count)
    assert sizes == sorted(set(sizes)) and len(sizes) <= count
    assert sizes[0] == low
    if count > 1:
        assert sizes[-1] == high
    ratio = (high / low) ** (1 / max(1, count - 1))
    for one, other in zip(sizes, sizes[1:], strict=False):  # as spaced, up to rounding
        assert other - 0.5 <= (one + 0.5) * ratio * (1 + 1e-9)
        assert other + 0.5 >= (one - 0.5) * ratio * (1 - 1e-9)


def test_logarithmic_sizes_by_hand():
    assert log_sizes(1, 1000, 4) == [1, 10, 100, 1000]
    assert log_sizes(1, 4, 30) == [1, 2, 3, 4]
    assert log_sizes(5, 5, 12) == [5]


def refined(sizes, total: int, needed: int) -> tuple[Curve, list[int]]:
    """A curve that is good from `needed` edges on, refined; and the sizes measured for that."""
    kl = lambda size: 0.0 if size >= needed else 1.0  # noqa: E731
    asked = []

    def measure(more):
        asked.extend(more)
        return curve({size: kl(size) for size in (*more, total)})

    return refine(curve({s: kl(s) for s in (*sizes, total)}), at_most(0.5), measure), asked


def test_sizes_are_added_between_the_smallest_good_one_and_the_next_smaller():
    found, asked = refined((10, 100, 1000), 5000, needed=300)
    assert asked and all(100 < size < 1000 for size in asked)
    assert {*found.points} == {0, 10, 100, 1000, 5000, *asked}
    assert [*found.points] == sorted(found.points)
    assert found.smallest(at_most(0.5)) == min(size for size in asked if size >= 300)
    assert (found.num_edges, found.empty.kl, found.num_examples) == (5000, 9, 7)


def test_sizes_are_added_below_all_edges_and_below_the_smallest_size():
    found, asked = refined((10, 100), 5000, needed=4000)
    assert asked and all(100 < size < 5000 for size in asked)
    assert found.smallest(at_most(0.5)) == min([5000, *(size for size in asked if size >= 4000)])
    found, asked = refined((10, 100), 5000, needed=1)
    assert asked and all(1 <= size < 10 for size in asked)
    assert found.smallest(at_most(0.5)) == 1


def test_nothing_is_measured_where_no_size_lies_between():
    found, asked = refined((4, 5, 9), 60, needed=5)
    assert asked == [] and found.smallest(at_most(0.5)) == 5
    found, asked = refined((1, 9), 60, needed=1)
    assert asked == [] and found.smallest(at_most(0.5)) == 1


@settings(max_examples=100)
@given(
    sizes=st.sets(st.integers(1, 10**6), max_size=8),
    total=st.integers(1, 10**6),
    share=st.floats(0, 1),
)
def test_the_edge_of_a_monotone_condition_is_found_to_a_tenth_and_exactly_if_small(
    sizes, total, share
):
    needed = max(1, round(total**share))
    found, asked = refined([size for size in sizes if size < total], total, needed)
    size = found.smallest(at_most(0.5))
    assert needed <= size < max(needed + 1, 1.1 * needed)
    assert size == needed or needed > 10
    assert len(asked) == len(set(asked)) <= 60


# --------------------------------------------------------------------------------------- measuring


def test_json_keeps_everything_and_has_no_nan():
    one = curve({3: 0.5, 60: 0.0})
    text = json.dumps(one.to_dict(), allow_nan=False)
    again = Curve.from_dict(json.loads(text))
    assert again.to_dict() == one.to_dict()
    assert [*again.points] == [0, 3, 60]
    assert (again.points[3].kl, again.empty.kl, again.num_examples) == (0.5, 9, 7)
    assert again.prompts == "test"
    assert math.isnan(again.points[3].error)
    assert again.num_edges == 60


@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean"])
def test_a_curve_agrees_with_an_evaluation_of_each_circuit(model, ablation):
    pairs = random_pairs(11, length=5) + random_pairs(6, length=8, seed=1, predicted=2)
    scores, total = random_scores(model), model.graph.num_edges
    done = []
    found = measure_curve(
        model, scores, pairs, ablation=ablation, batch_size=4, sizes=[200, 30, 30, total],
        listener=done.append,
    )  # fmt: skip
    assert [*found.points] == [0, 30, 200, total]
    assert (found.num_edges, found.num_examples) == (total, 17)
    assert done == [4, 8, 12, 16, 17]
    own = Ablation.of(model, ablation, pairs, 4)
    for size in (30, 200):
        alone = evaluate(model, scores.circuit(num_edges=size), pairs, ablation=own, batch_size=4)
        for name in METRICS:
            got = found.points[size][name], found.empty[name]
            wanted = alone.circuit[name], alone.empty[name]
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7, nan_ok=True), name
    full = found.points[total]
    assert (full.kl, full.exact_match, full.logit_difference_recovered) == (0, 1, 1)
    assert found.empty.logit_difference_recovered == 0


def test_sizes_go_from_few_edges_to_all(model):
    found = measure_curve(model, random_scores(model), random_pairs(2))
    empty, *sizes = found.points
    total = model.graph.num_edges
    assert sizes == sorted(set(sizes)) and (empty, sizes[-1]) == (0, total)
    assert 1 <= sizes[0] <= total / 100
    assert max(b / a for a, b in zip(sizes, sizes[1:], strict=False)) < 2.5
    tiny = wrap_model(random_gpt2(n_layer=1, n_head=1, n_embd=8))
    assert [*measure_curve(tiny, random_scores(tiny), random_pairs(2)).points][:2] == [0, 1]


def test_the_size_asked_for_is_among_those_measured():
    assert {0, 110} < {0, *default_sizes(5000, 110)}
    few = default_sizes(1_000_000, 40)
    assert min(few) == 40 and max(few) == 1_000_000 and len(few) <= 13


def test_an_empty_circuit_may_be_good_enough():
    assert curve({1: 0.1, 60: 0}, empty=0.2).smallest(at_most(0.5)) == 0


def test_a_curve_of_a_model_that_outputs_values():
    model, pairs = program("reverse")
    found = measure_curve(model, random_scores(model), pairs)
    full = found.points[model.graph.num_edges]
    assert (full.error, full.exact_match) == (0, 1)
    assert found.empty.error > 0.5
    assert all(math.isnan(metrics.kl) for metrics in (*found.points.values(), found.empty))
    assert Curve.from_dict(found.to_dict()).to_dict() == found.to_dict()
    assert {panel.label for panel in curve_panels({"": [found]})} == {
        METRICS[name].description for name in ("error", "exact_match", "accuracy")
    }


def test_bad_arguments_are_refused(model):
    scores = random_scores(model)
    with pytest.raises(ValueError):
        measure_curve(model, scores, [])
    with pytest.raises(ConfigError):
        measure_curve(model, scores, random_pairs(2), sizes=[3, model.graph.num_edges + 1])
    other = wrap_model(random_gpt2(n_layer=2))
    with pytest.raises(ValueError):
        measure_curve(other, scores, random_pairs(2))


# ------------------------------------------------------------------------------- tables and panels


def test_a_table_has_a_row_per_size_between_the_full_model_and_the_empty_circuit():
    table = curve_table(curve({15: 0.5, 3: 2.0, 60: 0.0}), "title", chosen=15)
    assert [row[1] for row in table.rows] == ["60", "15", "3", "0"]
    assert [row[2] for row in table.rows] == ["0.00%", "75.00%", "95.00%", "100.00%"]
    marked = [bool(row[0]) for row in table.rows]
    assert marked == [True, True, False, True]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert METRICS["error"].label not in table.columns


def test_a_line_goes_through_the_means_at_shared_sizes_in_a_band_from_lowest_to_highest():
    seeds = [
        curve({3: 2.0, 10: 1.0, 60: 0.0}),
        curve({3: 4.0, 10: 0.2, 12: 0.1, 60: 0.0}),
        curve({3: 3.0, 10: 0.3, 14: 0.1, 60: 0.0}),
    ]
    panels = curve_panels({"a": seeds, "b": seeds[1:2]})
    labels = [METRICS[name].description for name in ("kl", "exact_match", "accuracy")]
    assert [panel.label for panel in panels] == labels
    several, one = panels[0].lines
    assert (several.name, one.name) == ("a", "b")
    by_size = dict(zip(several.num_edges, zip(*several[2:], strict=True), strict=True))
    assert by_size == {10: pytest.approx((0.5, 0.2, 1.0)), 3: pytest.approx((3.0, 2.0, 4.0))}
    assert {*one.num_edges} == {3, 10, 12}
    assert one.mid == one.low == one.high
    assert [level for _, level in panels[0].levels] == [9]  # the full model's KL is 0
    assert len(panels[1].levels) == 2


# ------------------------------------------------------------------------------------- from Python

QUICK = {"steps": 2, "batch_size": 4, "progress": False}


def test_a_circuit_of_a_size_has_exactly_that_size(model):
    pairs, total = random_pairs(6), model.graph.num_edges
    for choice, size in (({"num_edges": 37}, 37), ({"sparsity": 0.75}, round(total / 4)),
                         ({"num_edges": 0}, 0), ({"sparsity": 0.0}, total)):  # fmt: skip
        found = prune(model, pairs, **choice, **QUICK)
        assert len(found.circuit) == size
        assert found.circuit == found.scores.circuit(num_edges=size)
        assert found.curve.num_edges == total


@pytest.mark.parametrize("choice", [{"max_kl": 3.0}, {"min_exact_match": 0.6}, {}], ids=str)
def test_the_chosen_circuit_is_the_smallest_that_is_good_on_the_validation_prompts(choice):
    model, pairs, validation = micro_model(), induction_pairs(40, 1), induction_pairs(25, 2)
    found = prune(model, pairs, validation, **choice, **{**QUICK, "steps": 60})
    result = evaluate(model, found.circuit, validation, ablation=found.ablation)

    def is_good(metrics) -> bool:
        if "min_exact_match" in choice:
            return metrics.exact_match >= choice["min_exact_match"]
        return metrics.kl <= choice.get("max_kl", 0.05 * result.empty.kl)

    assert is_good(result.circuit)
    assert 0 < len(found.circuit) < model.graph.num_edges
    assert found.curve.num_examples == 25
    assert len(found.circuit) in found.curve.points
    below = [size for size in found.curve.points if size < len(found.circuit)]
    assert not is_good(found.curve.points[max(below)])
    assert all(is_good(m) for size, m in found.curve.points.items() if size >= len(found.circuit))


def test_prompts_are_the_training_prompts_unless_others_are_given(model):
    pairs = random_pairs(6)
    one, other = (prune(model, pairs, *more, num_edges=9, **QUICK) for more in ((), (pairs,)))
    assert one.curve.to_dict()["points"] == other.curve.to_dict()["points"]
    assert (one.curve.prompts, other.curve.prompts) == ("training", "validation")
    with pytest.raises(ValueError):
        prune(model, pairs, [], **QUICK)


def test_choices_that_exclude_each_other_or_cannot_be_are_refused(model):
    pairs = random_pairs(4)
    with pytest.raises(ConfigError, match=r"max_kl.*min_exact_match|min_exact_match.*max_kl"):
        prune(model, pairs, max_kl=0.1, min_exact_match=0.9, **QUICK)
    for bad in ({"max_kl": 0.0}, {"max_kl": -1.0}, {"min_exact_match": 1.1},
                {"min_exact_match": 0.0}, {"num_edges": 10**6}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(bad))):
            prune(model, pairs, **bad, **QUICK)
    with pytest.raises(ConfigError, match="target_sparsity"):
        prune(model, pairs, trainer="paper", **QUICK, lr_warmup_steps=0, sparsity_warmup_steps=0)
    values, prompts = program("neighbours")
    with pytest.raises(ConfigError, match="max_kl"):
        prune(values, prompts, max_kl=0.1, **QUICK)
    assert prune(values, prompts, **QUICK).circuit.graph == values.graph


@pytest.mark.parametrize(
    "objective", ["kl", "logit_difference", "max_logit_difference", "cross_entropy"]
)
def test_every_objective_can_be_minimised(model, objective):
    pairs = random_pairs(6)
    found = prune(model, pairs, objective=objective, num_edges=9, **QUICK)
    assert [metrics.objective for metrics in found.history] == [objective] * 2
    assert all(math.isfinite(metrics.value) for metrics in found.history)
    values = found.scores.values
    assert values.isfinite().all() and len(values.unique()) > 0.9 * len(values)


def test_the_default_finds_the_circuit_of_the_micro_model_with_few_edges_too_many():
    model = micro_model()
    found = prune(model, induction_pairs(200, 1), induction_pairs(100, 9), seed=1, progress=False)
    assert found.circuit.edge_set >= CIRCUIT
    assert len(found.circuit) <= 8
