"""A price per open edge, where the size of the circuit is to be found too (trainer=tracr)."""

from dataclasses import dataclass

from torch import Tensor

from edgeprune.methods import hard_concrete
from edgeprune.methods.method import Method, read_finite


@dataclass(kw_only=True, eq=False)
class Priced(Method):
    """loss = distance + edge_price * (expected number of open edges); no target sparsity.

    Attributes:
        edge_price: what an open edge adds to the loss.
    """

    edge_price: float

    def gates(self, step: int) -> Tensor:
        self._sampled = hard_concrete.sample(self.log_alpha, self.noise(step))
        return self._sampled.detach()

    def update(self, step: int, distance: Tensor, grad_gates: Tensor) -> dict[str, float | None]:
        is_open = hard_concrete.probability_open(self.log_alpha)
        loss = distance + self.edge_price * is_open.sum()
        sparsity = hard_concrete.sparsity(self._sampled)
        read = read_finite(grad_gates, loss=loss, distance=distance, sparsity=sparsity)
        self._sampled.backward(grad_gates)
        loss.backward()
        return {**read, "learning_rate": self.apply_gradients(step)}
