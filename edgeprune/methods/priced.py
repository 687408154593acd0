"""A price per open edge, where the size of the circuit is to be found too (trainer=tracr)."""

from dataclasses import dataclass

from torch import Tensor

from edgeprune.methods import hard_concrete
from edgeprune.methods.hard_concrete import HardConcrete
from edgeprune.methods.method import read_finite


@dataclass(kw_only=True, eq=False)
class Priced(HardConcrete):
    """loss = objective + edge_price * (expected number of open edges); no target sparsity.

    Attributes:
        edge_price: what an open edge adds to the loss.
    """

    edge_price: float

    def gates(self, step: int) -> Tensor:
        counts = (self.graph.num_edges,)
        (noise,) = hard_concrete.uniform_noise(self.seed, step, counts, self.log_alpha.device)
        self._sampled = hard_concrete.sample(self.log_alpha, noise)
        return self._sampled.detach()

    def update(self, step: int, objective: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        is_open = hard_concrete.probability_open(self.log_alpha)
        loss = objective + self.edge_price * is_open.sum()
        sparsity = hard_concrete.sparsity(self._sampled)
        read = read_finite(grad_gates, loss=loss, objective=objective, sparsity=sparsity)
        self._sampled.backward(grad_gates)
        loss.backward()
        rate = self.apply_gradients(step, self.lr_warmup_steps)
        return {**read, "learning_rate": rate}
