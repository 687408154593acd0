"""Gates and masks: the formulas by hand, and exact sizes whatever the ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.circuit import Circuit
from edgeprune.errors import ConfigError
from edgeprune.evaluation.export import export_circuit
from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete
from edgeprune.methods.masks import CircuitMasks

GRAPH = CircuitGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))


def masks_with(log_alpha: torch.Tensor, node_log_alpha: torch.Tensor | None = None) -> CircuitMasks:
    masks = CircuitMasks(GRAPH, node_gates=node_log_alpha is not None)
    masks.edge_log_alpha.data = log_alpha
    if node_log_alpha is not None:
        masks.node_log_alpha.data = node_log_alpha
    return masks


def test_sample_by_hand():
    """u = 1/2 has no noise: sigmoid(1.5 log alpha), stretched to [-0.1, 1.1] and clamped."""
    log_alpha = torch.tensor([0.0, 1.0, -9.0, 9.0])
    got = hard_concrete.sample(log_alpha, torch.full((4,), 0.5))
    middle = 1.2 / (1 + math.exp(-1.5)) - 0.1
    torch.testing.assert_close(got, torch.tensor([0.5, middle, 0.0, 1.0]))


def noisy(count: int = 500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=noise).clamp(1e-6, 1 - 1e-6)
    return torch.randn(count, generator=noise), uniform


@pytest.mark.parametrize("target", [0.0, 0.02, 0.25, 0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("count", [1, 3, 500])
def test_a_shift_gives_the_sparsity_asked_for(count, target):
    for seed in range(10):
        log_alpha, uniform = noisy(count, seed)
        shift = hard_concrete.shift_to_sparsity(log_alpha, uniform, target)
        gates = hard_concrete.sample(log_alpha + shift, uniform)
        assert hard_concrete.sparsity(gates).item() == pytest.approx(target, abs=1e-5)
        smaller = hard_concrete.sample(log_alpha + shift - shift.sign() * 1e-3, uniform)
        needless = hard_concrete.sparsity(smaller) == hard_concrete.sparsity(gates)
        assert shift == 0 or not needless


def test_no_shift_where_the_sparsity_is_there():
    gates = torch.tensor([30.0, 30.0, -30.0, -30.0])
    assert hard_concrete.shift_to_sparsity(gates, torch.full((4,), 0.5), 0.5) == 0


def test_mean_slopes_are_the_mean_of_slopes():
    log_alpha = torch.tensor([-6.0, -2.0, 0.0, 1.0, 5.0], requires_grad=True)
    noise = torch.Generator().manual_seed(0)
    uniform = torch.rand(400_000, 5, generator=noise).clamp(1e-6, 1 - 1e-6)
    gates = hard_concrete.sample(log_alpha, uniform)
    (wanted,) = torch.autograd.grad(gates.mean(0).sum(), log_alpha)
    got = hard_concrete.mean_slope(log_alpha.detach())
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0.01)


def test_projected_gradients_by_hand():
    """Equal slopes: the price is the mean, 2; what is left, -1, 0 and 1, has a mean size of 2/3."""
    got = hard_concrete.project(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 0.7))
    torch.testing.assert_close(got, torch.tensor([-1.5, 0.0, 1.5]))
    slope = hard_concrete.mean_slope(torch.tensor(0.7)).item()
    got = hard_concrete.project(torch.tensor([1e-4, 2e-4, 3e-4]), torch.full((3,), 0.7))
    wanted = torch.tensor([-1.0, 0.0, 1.0]) * 1e-4 * slope * 3 / 0.01  # too faint for all of it
    torch.testing.assert_close(got, wanted)
    got = hard_concrete.project(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 300.0))
    assert torch.equal(got, torch.zeros(3))  # where no gate can move


def test_projected_gradients_are_those_of_shifted_expected_gates():
    """Where the loss is linear in the gates: its change when the rest makes room for one gate."""
    noise = torch.Generator().manual_seed(0)
    log_alpha = torch.randn(40, generator=noise, dtype=torch.float64)
    weights = torch.randn(40, generator=noise, dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros((), dtype=torch.float64)
        for _ in range(8):
            excess = (expected(values + shift) - expected(log_alpha)).sum()
            shift -= excess / hard_concrete.mean_slope(values + shift).sum()
        return (weights * expected(values + shift)).sum()

    def expected(values: torch.Tensor) -> torch.Tensor:
        """The integral of the slopes from far below, in small steps."""
        steps = torch.linspace(-25, 0, 20_001, dtype=torch.float64)[:, None]
        return hard_concrete.mean_slope(values + steps).sum(0) * (25 / 20_000)

    nudges = 1e-3 * torch.eye(40, dtype=torch.float64)[:4]
    wanted = torch.stack([(loss(log_alpha + e) - loss(log_alpha - e)) / 2e-3 for e in nudges])
    got = hard_concrete.project(weights, log_alpha)
    assert got.sum().item() == pytest.approx(0, abs=1e-9)
    assert got.abs().mean().item() == pytest.approx(1)
    torch.testing.assert_close(got[:4] / got[0], wanted / wanted[0], atol=1e-3, rtol=1e-3)


def test_probability_open_is_the_share_of_open_samples():
    log_alpha = torch.tensor([-3.0, -1.5, 0.0, 2.0])
    noise = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, 4, generator=noise).clamp(1e-6, 1 - 1e-6)
    share = (hard_concrete.sample(log_alpha, uniform) > 0).float().mean(0)
    torch.testing.assert_close(
        hard_concrete.probability_open(log_alpha), share, atol=0.004, rtol=0.0
    )


def test_deterministic_gates_by_hand():
    """P(open) is 0.83 at 0, near 1 at 10 and near 0 at -10: each pair's sum rounds to its zeros."""
    log_alpha = torch.tensor([10.0, -10.0, -10.0, 10.0, 0.0, 0.0])
    groups = [slice(0, 2), slice(2, 4), slice(4, 6)]
    got = hard_concrete.deterministic(log_alpha, groups)
    high = 1 / (1 + math.exp(-12.0))
    torch.testing.assert_close(got, torch.tensor([high, 0.0, 0.0, high, 0.5, 0.5]))


def test_deterministic_gates_close_the_later_of_equals():
    log_alpha = torch.full((10,), -1.0)  # P(open) = 0.646...: four of ten expected closed
    expected = 10 - round(hard_concrete.probability_open(log_alpha).sum().item())
    got = hard_concrete.deterministic(log_alpha, [slice(0, 10)])
    assert 0 < expected < 10
    assert (got[: 10 - expected] > 0).all()
    assert (got[10 - expected :] == 0).all()


def test_threshold_search_keeps_the_sparsity():
    gates = torch.linspace(0, 1, 101)
    threshold = hard_concrete.search_threshold(gates)
    kept = (gates > threshold).float().mean().item()
    assert abs(kept - 0.5) <= 1 / 101


def test_noise_depends_on_seed_and_step_alone():
    masks = CircuitMasks(GRAPH, node_gates=True, init_mean=0.0, seed=3)
    first = masks.sample(5)
    masks.sample(6)
    torch.rand(10)
    again = masks.sample(5)
    assert torch.equal(first.edge, again.edge)
    assert torch.equal(first.node, again.node)
    assert not torch.equal(first.edge, masks.sample(6).edge)
    other = CircuitMasks(GRAPH, init_mean=0.0, seed=4)
    assert not torch.equal(first.edge, other.sample(5).edge)


few_values = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])  # many ties
log_alphas = st.lists(few_values, min_size=GRAPH.num_edges, max_size=GRAPH.num_edges)


@settings(max_examples=60, deadline=None)
@given(log_alphas, st.integers(0, GRAPH.num_edges), st.booleans())
def test_every_size_is_hit_exactly(values, num_edges, node_gates):
    nodes = torch.tensor(values[: GRAPH.num_writers]) if node_gates else None
    masks = masks_with(torch.tensor(values), nodes)
    circuit = export_circuit(masks, num_edges=num_edges).circuit
    assert len(circuit) == num_edges
    if not node_gates:
        kept = torch.tensor(circuit.mask())
        log_alpha = masks.edge_log_alpha.detach()
        if 0 < num_edges < GRAPH.num_edges:  # nothing left out is larger than what is kept
            assert log_alpha[kept].min() >= log_alpha[~kept].max()
    scores = torch.tensor(masks.scores())
    largest = scores.sort(descending=True).values[:num_edges].sum()
    assert scores[torch.tensor(circuit.mask())].sum().item() == pytest.approx(largest.item())
    smaller = export_circuit(masks, num_edges=num_edges // 2).circuit
    assert smaller.edge_set <= circuit.edge_set


@settings(max_examples=60, deadline=None)
@given(log_alphas, st.floats(0, 1))
def test_every_sparsity_is_hit_to_the_nearest_edge(values, sparsity):
    circuit = export_circuit(masks_with(torch.tensor(values)), sparsity=sparsity).circuit
    assert abs(circuit.sparsity - sparsity) <= 0.5 / GRAPH.num_edges + 1e-12


def test_edges_of_closed_writers_come_last():
    node = torch.full((GRAPH.num_writers,), 5.0)
    node[GRAPH.writers.index("a0.h0")] = -5.0
    log_alpha = torch.zeros(GRAPH.num_edges)
    from_closed = [i for i, (writer, _) in enumerate(GRAPH.edges) if writer == "a0.h0"]
    log_alpha[from_closed] = 9.0
    masks = masks_with(log_alpha, node)
    circuit = export_circuit(masks, num_edges=GRAPH.num_edges - len(from_closed)).circuit
    assert not any(writer == "a0.h0" for writer, _ in circuit.edges)
    by_threshold = export_circuit(masks).circuit
    assert not any(writer == "a0.h0" for writer, _ in by_threshold.edges)


def test_impossible_sizes_are_refused():
    masks = masks_with(torch.zeros(GRAPH.num_edges))
    with pytest.raises(ValueError, match="num_edges=1000 is out of range"):
        export_circuit(masks, num_edges=1000)
    with pytest.raises(ConfigError, match=r"sparsity=1\.5 is out of range"):
        export_circuit(masks, sparsity=1.5)
    with pytest.raises(ConfigError, match="give only one.* add sparsity=null or num_edges="):
        export_circuit(masks, sparsity=0.5, num_edges=3)


def test_threshold_export_by_hand():
    """Half the edges far open, half far closed: the threshold keeps just the open half."""
    log_alpha = torch.where(torch.arange(GRAPH.num_edges) % 2 == 0, 10.0, -10.0)
    export = export_circuit(masks_with(log_alpha))
    wanted = Circuit.from_mask(GRAPH, (log_alpha > 0).tolist())
    assert export.circuit == wanted
    assert 0 < export.thresholds.edge < 1
