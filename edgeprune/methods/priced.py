"""A price per open edge, where the size of the circuit is to be found too (trainer=tracr)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgeprune.graph import CircuitGraph
from edgeprune.methods import hard_concrete
from edgeprune.methods.learning import (
    initial_log_alpha,
    learning_rate_factor,
    load_state,
    read_finite,
    state_of,
)
from edgeprune.scores import EdgeScores


class Priced:
    """loss = distance + edge_price * (expected number of open edges); no target sparsity.

    Args:
        edge_price: what an open edge adds to the loss.

    The other arguments are those of `Lagrangian`.
    """

    def __init__(
        self,
        graph: CircuitGraph,
        *,
        seed: int,
        device: torch.device | str,
        steps: int,
        learning_rate: float,
        adam_epsilon: float,
        edge_price: float,
        lr_warmup_steps: int,
        init_mean: float,
        init_std: float,
    ) -> None:
        self.graph, self.seed = graph, seed
        self._steps, self._lr_warmup_steps = steps, lr_warmup_steps
        self._learning_rate, self._edge_price = learning_rate, edge_price
        generator = torch.Generator().manual_seed(seed)
        self._log_alpha = initial_log_alpha(graph.num_edges, init_mean, init_std, generator, device)
        self._optimizer = torch.optim.AdamW(
            [self._log_alpha], lr=learning_rate, eps=adam_epsilon, weight_decay=0.0
        )

    def gates(self, step: int) -> Tensor:
        """See `Method.gates`."""
        (noise,) = hard_concrete.uniform_noise(self.seed, step, (self.graph.num_edges,))
        noise = noise.to(self._log_alpha.device, non_blocking=True)
        self._sampled = hard_concrete.sample(self._log_alpha, noise)
        return self._sampled.detach()

    def update(self, step: int, distance: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        """See `Method.update`."""
        is_open = hard_concrete.probability_open(self._log_alpha)
        loss = distance + self._edge_price * is_open.sum()
        sparsity = hard_concrete.sparsity(self._sampled)
        read = read_finite(grad_gates, loss=loss, distance=distance, sparsity=sparsity)
        learning_rate = self._learning_rate * learning_rate_factor(
            step, self._steps, self._lr_warmup_steps
        )
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        self._sampled.backward(grad_gates)
        loss.backward()
        self._optimizer.step()
        return {**read, "learning_rate": learning_rate}

    def scores(self) -> EdgeScores:
        """Log alpha, the log odds of the gate."""
        return EdgeScores(self.graph, self._log_alpha, origin={"method": "priced"})

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method.state_dict`."""
        return state_of({"edge_log_alpha": self._log_alpha}, self._optimizer)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Method.load_state_dict`."""
        load_state({"edge_log_alpha": self._log_alpha}, self._optimizer, state)
