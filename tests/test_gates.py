"""Hard-concrete gates and the circuits of saved log alphas: known answers and properties."""

import math

import pytest
import torch

from edgeprune.circuit import Circuit
from edgeprune.errors import CheckpointError
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete, held
from edgeprune.methods.method import scores_from_state
from edgeprune.methods.paper import circuit_by_threshold
from edgeprune.scores import EdgeScores

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=noise).clamp(1e-6, 1 - 1e-6)


def normal(count: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def read(saved: dict[str, torch.Tensor]) -> EdgeScores:
    return scores_from_state(GRAPH, saved, {})


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


# ------------------------------------------------------------------------- held at a sparsity


@pytest.mark.parametrize("target", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("count", [1, 3, 500])
def test_the_smallest_shift_gives_the_target_sparsity(count, target):
    def sparsity(shift):
        return hard_concrete.sparsity(hard_concrete.sample(log_alpha + shift, u))

    for seed in range(5):
        log_alpha, u = normal(count, seed), uniform(count, seed=seed + 100)
        shift = held.shift_to_sparsity(log_alpha, u, target)
        assert sparsity(shift).item() == pytest.approx(target, abs=1e-5)
        assert shift == 0 or sparsity(shift - shift.sign() * 1e-3) != sparsity(shift)


def test_mean_slope_is_the_mean_of_the_slopes_of_samples():
    log_alpha = torch.tensor([-6.0, -2.0, 0.0, 1.0, 5.0], requires_grad=True)
    gates = hard_concrete.sample(log_alpha, uniform(400_000, 5))
    (expected,) = torch.autograd.grad(gates.mean(0).sum(), log_alpha)
    slope = held.mean_slope(log_alpha.detach())
    torch.testing.assert_close(slope, expected, atol=1e-3, rtol=0.01)


def test_projected_gradient_by_hand():
    """Equal slopes: the price is the mean, 2; the rest, -1, 0 and 1, has a mean size of 2/3."""
    gradient = held.project(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 0.7))
    torch.testing.assert_close(gradient, torch.tensor([-1.5, 0.0, 1.5]))
    slope = held.mean_slope(torch.tensor(0.7)).item()
    gradient = held.project(torch.tensor([1e-4, 2e-4, 3e-4]), torch.full((3,), 0.7))
    expected = torch.tensor([-1.0, 0.0, 1.0]) * 1e-4 * slope * 3 / 0.01  # too small to be scaled up
    torch.testing.assert_close(gradient, expected)
    gradient = held.project(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 300.0))
    assert torch.equal(gradient, torch.zeros(3))  # no gate can move


def test_projected_gradient_is_that_of_shifted_expected_gates():
    """For a loss linear in the gates: its change if all others make room for one gate."""
    log_alpha, weights = (normal(40, seed, torch.float64) for seed in (0, 1))
    steps = torch.linspace(-25, 0, 20_001, dtype=torch.float64)[:, None]

    def expected_gates(values: torch.Tensor) -> torch.Tensor:
        return held.mean_slope(values + steps).sum(0) * (25 / 20_000)  # integral of the slopes

    def loss(values: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros((), dtype=torch.float64)
        for _ in range(8):  # Newton
            excess = (expected_gates(values + shift) - expected_gates(log_alpha)).sum()
            shift -= excess / held.mean_slope(values + shift).sum()
        return (weights * expected_gates(values + shift)).sum()

    nudges = 1e-3 * torch.eye(40, dtype=torch.float64)[:4]
    expected = torch.stack([(loss(log_alpha + e) - loss(log_alpha - e)) / 2e-3 for e in nudges])
    gradient = held.project(weights, log_alpha)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-9)
    assert gradient.abs().mean().item() == pytest.approx(1)
    scaled = gradient[:4] / gradient[0]
    torch.testing.assert_close(scaled, expected / expected[0], atol=1e-3, rtol=1e-3)


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
