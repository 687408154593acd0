"""Gates, and the circuits of saved states: known answers and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.errors import CheckpointError
from edgeprune.graph import CircuitGraph
from edgeprune.methods import METHODS, hard_concrete
from edgeprune.methods.every_size import EverySize, grad_scores, soft_top_k
from edgeprune.methods.hard_concrete import HardConcrete
from edgeprune.methods.paper import circuit_by_threshold
from edgeprune.scores import EdgeScores

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=noise).clamp(1e-6, 1 - 1e-6)


def normal(count: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def read(saved: dict[str, torch.Tensor]) -> EdgeScores:
    return EdgeScores(GRAPH, HardConcrete.scores(GRAPH, saved))


def state(edge: torch.Tensor, node: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    return {"edge_log_alpha": edge} | ({} if node is None else {"node_log_alpha": node})


# ------------------------------------------------------------------------------ the distribution


def test_sample_by_hand():
    """u = 1/2 means no noise: sigmoid(1.5 log alpha), stretched to [-0.1, 1.1] and clamped."""
    log_alpha = torch.tensor([0.0, 1.0, -9.0, 9.0])
    gates = hard_concrete.sample(log_alpha, torch.full((4,), 0.5))
    middle = 1.2 / (1 + math.exp(-1.5)) - 0.1
    torch.testing.assert_close(gates, torch.tensor([0.5, middle, 0.0, 1.0]))


def test_noise_depends_on_seed_and_step_alone():
    first = hard_concrete.uniform_noise(3, 5, (50, 10))
    other_step, other_seed = (hard_concrete.uniform_noise(*x, (50, 10)) for x in ((3, 6), (4, 5)))
    torch.rand(10)
    again = hard_concrete.uniform_noise(3, 5, (50, 10))
    for kind in range(2):
        assert torch.equal(first[kind], again[kind])
        assert not torch.equal(first[kind], other_step[kind])
        assert not torch.equal(first[kind], other_seed[kind])


def test_probability_open_is_the_frequency_of_open_samples():
    log_alpha = torch.tensor([-3.0, -1.5, 0.0, 2.0])
    frequency = (hard_concrete.sample(log_alpha, uniform(200_000, 4)) > 0).float().mean(0)
    expected = hard_concrete.probability_open(log_alpha)
    torch.testing.assert_close(expected, frequency, atol=0.004, rtol=0.0)


def test_deterministic_gates_by_hand():
    """P(open) is 0.83 at 0, near 1 at 10 and near 0 at -10: each pair's sum rounds to its zeros."""
    log_alpha = torch.tensor([10.0, -10.0, -10.0, 10.0, 0.0, 0.0])
    groups = [slice(0, 2), slice(2, 4), slice(4, 6)]
    gates = hard_concrete.deterministic(log_alpha, groups)
    high = 1 / (1 + math.exp(-12.0))
    torch.testing.assert_close(gates, torch.tensor([high, 0.0, 0.0, high, 0.5, 0.5]))


def test_deterministic_gates_close_the_later_of_equal_ones():
    log_alpha = torch.full((10,), -1.0)  # P(open) = 0.646: four of ten are expected to be closed
    gates = hard_concrete.deterministic(log_alpha, [slice(0, 10)])
    assert (gates > 0).tolist() == [True] * 6 + [False] * 4


# --------------------------------------------------------------------------------- the soft top k


def some_scores(kind: str, count: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    values = normal(count, seed, dtype)
    return {"normal": values, "equal": 0 * values + 3, "near": 0.01 * values, "far": 10 * values,
            "two kinds": 20.0 * (values > 0) - 10}[kind]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["normal", "equal", "near", "far", "two kinds"]),
    count=st.sampled_from([1, 2, 7, 500]),
    seed=st.integers(0, 99),
    share=st.sampled_from([1e-5, 0.001, 0.3, 0.5, 0.97, 1.0]),
    temperature=st.sampled_from([0.05, 0.3, 1.0, 10.0]),
)
def test_soft_gates_sum_to_k_in_the_order_of_their_scores(kind, count, seed, share, temperature):
    scores = some_scores(kind, count, seed)
    gates = soft_top_k(scores, share * count, temperature)
    assert gates.sum().item() == pytest.approx(share * count, rel=2e-3)
    assert gates.min() >= 0 and gates.max() <= 1
    in_order = gates[scores.argsort()]
    assert (in_order[1:] >= in_order[:-1] * (1 - 1e-5)).all()  # equal up to rounding
    if kind == "equal":
        torch.testing.assert_close(gates, torch.full_like(gates, share), rtol=2e-3, atol=0)


def test_soft_gates_by_hand():
    """At tau = 1: sigmoid(-1), sigmoid(0) and sigmoid(1) sum to 1.5; also with both doubled."""
    scores, wanted = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, -1.0, 0.0]).sigmoid()
    torch.testing.assert_close(soft_top_k(scores, 1.5, 1.0), wanted)
    torch.testing.assert_close(soft_top_k(2 * scores + 7, 1.5, 2.0), wanted)


@pytest.mark.parametrize("k", [1, 2, 13, 49, 50])
def test_at_a_low_temperature_the_k_highest_scores_are_open(k):
    scores = torch.randperm(50, generator=torch.Generator().manual_seed(k)) / 10
    hard = torch.zeros(50).index_fill(0, scores.topk(k).indices, 1)
    torch.testing.assert_close(soft_top_k(scores, k, 0.004), hard, atol=1e-3, rtol=0)


def test_gradients_for_scores_by_hand():
    """Equal gates have equal slopes of 1/4: an edge is worth what it gives beyond the mean."""
    gradient = grad_scores(torch.tensor([1.0, 2.0, 6.0]), torch.full((3,), 0.5))
    torch.testing.assert_close(gradient, torch.tensor([-2.0, -1.0, 3.0]) / 4)
    for gates in (torch.ones(3), torch.tensor([1.0, 0.0, 0.0])):  # no gate can move
        gradient = grad_scores(torch.tensor([1.0, 2.0, 6.0]), gates)
        assert torch.equal(gradient, torch.zeros(3))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("k", [0.3, 4, 20, 39.5])
def test_gradients_for_scores_are_those_of_the_gates_whose_sum_stays_k(k, temperature):
    """Against finite differences of a loss that is not linear in the gates."""
    scores, weights = (normal(40, seed, torch.float64) for seed in (0, 1))

    def loss(gates: torch.Tensor) -> torch.Tensor:
        return (weights * gates).sum() + (gates[::2] * gates[1::2]).sum().square()

    gates = soft_top_k(scores, k, temperature).requires_grad_()
    (grad_gates,) = torch.autograd.grad(loss(gates), gates)
    gradient = grad_scores(grad_gates, gates.detach())
    nudges = 1e-3 * torch.eye(40, dtype=torch.float64)
    differences = [
        loss(soft_top_k(scores + e, k, temperature)) - loss(soft_top_k(scores - e, k, temperature))
        for e in nudges
    ]
    expected = torch.stack(differences) / 2e-3
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient / temperature, expected, atol=1e-5, rtol=1e-3)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def every_size(seed: int = 0, **changes) -> EverySize:
    given = {"steps": 400, "learning_rate": 0.2, "smallest": 0.01, "temperature": 1.0, **changes}
    return EverySize(GRAPH, seed=seed, device="cpu", **given)


def test_sizes_depend_on_seed_and_step_alone():
    sizes = [every_size().size(step) for step in range(20)]
    torch.rand(5)
    other = every_size(steps=7, learning_rate=3.0, temperature=0.1)
    assert [other.size(step) for step in reversed(range(20))] == sizes[::-1]
    assert len({*sizes, *(every_size(seed=1).size(step) for step in range(20))}) == 40


@pytest.mark.parametrize("smallest", [0.0001, 0.05, 0.4, 1.0])
def test_sizes_are_log_uniform_from_the_smallest_and_at_least_one_edge_to_all(smallest):
    method, total = every_size(smallest=smallest), GRAPH.num_edges
    sizes = torch.tensor([method.size(step) for step in range(2000)]).sort().values
    low = max(1, smallest * total)
    assert low * 0.9999 <= sizes[0] and sizes[-1] <= total * 1.0001
    quantiles = low * (total / low) ** torch.linspace(0, 1, 2000)
    assert (sizes / quantiles).log().abs().max() <= 0.04 * math.log(total / low) + 1e-4


def test_initial_scores_depend_on_the_seed_and_only_break_ties():
    one, same, other = (every_size(seed).gates(0) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    gates = every_size().gates(5)
    assert len(gates.unique()) > 0.9 * GRAPH.num_edges
    assert gates.max() < 1.2 * gates.min()


# ------------------------------------------------------------------------------- saved log alphas


def test_scores_are_log_odds():
    edge, node = normal(GRAPH.num_edges), normal(GRAPH.num_writers, 1)
    assert torch.equal(read(state(edge)).values, edge.double())
    p = torch.sigmoid(edge.double()) * torch.sigmoid(node.double())[GRAPH.edge_writers()]
    torch.testing.assert_close(read(state(edge, node)).values, torch.logit(p))
    far = torch.linspace(30, 60, GRAPH.num_edges)  # p is 1 in float32; the order is kept
    values = read(state(far, torch.full((GRAPH.num_writers,), 700.0))).values
    torch.testing.assert_close(values, far.double())


def test_edges_of_closed_writers_come_last():
    from_closed = [i for i, (writer, _) in enumerate(GRAPH.edges) if writer == "a0.h0"]
    edge, node = torch.zeros(GRAPH.num_edges), torch.full((GRAPH.num_writers,), 5.0)
    edge[from_closed] = 9.0
    node[GRAPH.writers.index("a0.h0")] = -5.0
    saved = state(edge, node)
    by_size = read(saved).circuit(num_edges=GRAPH.num_edges - len(from_closed))
    by_threshold, _ = circuit_by_threshold(GRAPH, saved)
    for circuit in (by_size, by_threshold):
        assert all(writer != "a0.h0" for writer, _ in circuit.edges)


def test_circuit_by_threshold_by_hand():
    """Half the edges far open, half far closed: the threshold keeps exactly the open half."""
    log_alpha = torch.where(torch.arange(GRAPH.num_edges) % 2 == 0, 10.0, -10.0)
    circuit, thresholds = circuit_by_threshold(GRAPH, state(log_alpha))
    assert circuit == Circuit.from_mask(GRAPH, (log_alpha > 0).tolist())
    assert 0 < thresholds["edge"] < 1
    assert "node" not in thresholds


def test_a_state_of_another_graph_is_refused():
    with pytest.raises(CheckpointError, match="edge_log_alpha"):
        read(state(torch.zeros(3)))
    for method in METHODS.values():
        with pytest.raises(CheckpointError):
            method.scores(GRAPH, {"scores": torch.zeros(3), "edge_log_alpha": torch.zeros(3)})
        with pytest.raises(CheckpointError):
            method.scores(GRAPH, {})


def test_scores_of_every_size_are_read_from_its_state():
    method = every_size()
    method.gates(0)
    method.update(0, torch.tensor(1.0), normal(GRAPH.num_edges, 5))
    values = EverySize.scores(GRAPH, method.state_dict())
    again = every_size(seed=9)
    again.load_state_dict(method.state_dict())
    for step in (1, 2):
        torch.testing.assert_close(again.gates(step).argsort(), values.argsort())
