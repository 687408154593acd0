"""Hard-concrete gates (Louizos, Welling and Kingma 2018, arXiv:1712.01312).

A gate is a number in [0, 1]; 1 carries the clean value, 0 the corrupted one. One number, log alpha,
sets its distribution: a sigmoid of log alpha plus logistic noise, stretched slightly beyond [0, 1]
and clamped, so that exact zeros and ones have positive probability.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgeprune.graph import CircuitGraph
from edgeprune.methods.method import Method, check_shapes

BETA = 2 / 3  # temperature of the distribution
GAMMA, ZETA = -0.1, 1.1  # limits to which the sigmoid is stretched before clamping
EPSILON = 1e-6  # probabilities and noise are kept this far from 0 and 1
DETERMINISTIC_SCALE = 0.8  # steepness of deterministic gates, as published
SEARCH_TOLERANCE = 1e-5  # width at which the search for a threshold stops, as published


def uniform_noise(
    seed: int, step: int, counts: tuple[int, ...], device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """The noise of one training step: one tensor in [EPSILON, 1 - EPSILON] per count.

    It depends on seed and step alone, not on the device, the number of processes or earlier draws.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    low, high = EPSILON, 1 - EPSILON
    noise = (torch.rand(n, generator=generator) * (high - low) + low for n in counts)
    return tuple(x.to(device, non_blocking=True) for x in noise)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """clamp(sigmoid((log u - log(1 - u) + log alpha) / beta) * (zeta - gamma) + gamma, 0, 1)."""
    logistic = torch.log(uniform) - torch.log1p(-uniform)
    concrete = torch.sigmoid((logistic + log_alpha) / BETA)
    return torch.clamp(concrete * (ZETA - GAMMA) + GAMMA, 0, 1)


def probability_open(log_alpha: Tensor) -> Tensor:
    """The probability that a sampled gate is not zero."""
    below = torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha)
    return 1 - torch.clamp(below, EPSILON, 1 - EPSILON)


def deterministic(log_alpha: Tensor, groups: Sequence[slice]) -> Tensor:
    """Noise-free gates, [gate]: sigmoid(0.8 log alpha / beta), the smallest per group set to zero.

    The number of zeros in a group is its expected number, rounded: the group's size minus the sum
    of the probabilities of being open. Among equal gates the later ones are set to zero.
    """
    gates = torch.sigmoid(DETERMINISTIC_SCALE * log_alpha / BETA)
    for group in groups:
        values = log_alpha[group]
        num_zeros = round(len(values) - probability_open(values).sum().item())
        zeros = torch.argsort(values, descending=True, stable=True)[len(values) - num_zeros :]
        gates[group.start + zeros] = 0
    return gates


def sparsity(gates: Tensor) -> Tensor:
    """1 - mean gate."""
    return 1 - gates.mean()


def search_threshold(gates: Tensor) -> float:
    """The threshold at which binary gates (gate > threshold) are as sparse as the gates."""
    wanted = sparsity(gates).item()
    low, high = 0.0, 1.0
    while high - low > SEARCH_TOLERANCE:
        threshold = (low + high) / 2
        is_sparser = (gates <= threshold).float().mean().item() > wanted
        low, high = (low, threshold) if is_sparser else (threshold, high)
    return threshold


@dataclass(kw_only=True, eq=False)
class HardConcrete(Method):
    """A log alpha per edge, learned with AdamW from the gradients of sampled gates.

    Attributes:
        lr_warmup_steps: steps of linear warm-up of all learning rates, which then fall to 0.
        weight_decay, adam_epsilon: AdamW's.
        init_mean, init_std: log alphas start at N(init_mean, init_std).
    """

    lr_warmup_steps: int
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    init_mean: float
    init_std: float = 0.01

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.log_alpha = self.new_log_alpha(self.graph.num_edges)
        self.parameters = {"edge_log_alpha": self.log_alpha}
        settings = {"eps": self.adam_epsilon, "weight_decay": self.weight_decay}
        self.optimizer = torch.optim.AdamW([self.log_alpha], self.learning_rate, **settings)

    def new_log_alpha(self, count: int) -> Tensor:
        """[count], a leaf; drawn on the CPU and then moved to the device."""
        values = self.init_mean + self.init_std * torch.randn(count, generator=self._generator)
        return values.to(self.device).requires_grad_()

    @staticmethod
    def scores(graph: CircuitGraph, state: Mapping[str, Tensor]) -> Tensor:
        """The log odds of p = sigmoid(log alpha), i.e. log alpha.

        With node gates p is multiplied by sigmoid(log alpha of the writer).
        """
        log_alpha = log_alphas(graph, state)
        if "node" not in log_alpha:
            return log_alpha["edge"]
        edge, node = (logsigmoid(x.double()) for x in log_alpha.values())
        log_p = edge + node[torch.tensor(graph.edge_writers())]
        return log_p - torch.log(-torch.expm1(log_p))


def log_alphas(graph: CircuitGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`edge`, [edge], and with node gates `node`, [writer]; float32 on the CPU."""
    shapes = {"edge_log_alpha": (graph.num_edges,)}
    if "node_log_alpha" in state:
        shapes["node_log_alpha"] = (graph.num_writers,)
    check_shapes(state, shapes)
    return {name.removesuffix("_log_alpha"): state[name].detach().cpu() for name in shapes}
