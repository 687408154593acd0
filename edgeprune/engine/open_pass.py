"""The clean prompts with all gates open, differentiated for the gate of every edge at once.

With open gates, all readers of a site read the residual stream. So the forward pass keeps one
stream, as the full model does, and mixes nothing. Backward, each reader has a gradient of its own,

    grad_gates[reader, writer] = sum over tokens and d_model of delta[writer] * grad_inputs[reader],

and the stream's gradient is the sum of theirs. The deltas (clean minus ablation values) are those
of the clean prompts, also where the gradient is taken elsewhere: with one node's output fixed
between its ablation value and its clean value. So this is attribution patching (Syed et al. 2023,
arXiv:2310.10348) and its integrated forms (Hanna et al. 2024, arXiv:2403.17806), with the opposite
sign.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.engine.gradient import Gradient
from edgeprune.metrics import Objective
from edgeprune.prompts import Batch


class Point(NamedTuple):
    """Where a gradient is taken: on the clean prompts, or with one node's output fixed.

    Attributes:
        node: None for the clean prompts; 0 for the embeddings, 2 l + 1 for the heads of layer l
            together, 2 l + 2 for its MLP.
        fraction: where the output is fixed: 0 is its ablation value, 1 its clean value.
    """

    node: int | None = None
    fraction: float = 1.0


class OpenPass:
    """Runs one batch with all gates open.

    Args:
        ablation_values: what an edge with gate 0 would carry; None: zeros.

    Raises ValueError if the model attends to the batch's padding.
    """

    def __init__(
        self, model: CircuitModel, batch: Batch, ablation_values: Activations | None
    ) -> None:
        model.check_padding(batch)
        self.model, self.batch, self.ablation_values = model, batch, ablation_values
        self._clean: list[Tensor] = []  # per node, its output on the clean prompts
        self._grad_inputs: dict[int, Tensor] = {}  # per site, [reader, ..., d_model]
        self._grad_gates = torch.zeros(model.graph.num_edges, device=model.device)

    def differentiate(self, objective: Objective, points: Sequence[Point]) -> Gradient:
        """The objective and its gradient with respect to all gates, as means over some points.

        Args:
            points: one or more; if the clean prompts are among them, they are the first.
        """
        with torch.set_grad_enabled(points[0].node is None):
            outputs = self._run(Point())  # [predicted, vocabulary]
        reference = outputs.detach()
        self._deltas, self._last_deltas = self._compute_deltas()
        total = torch.zeros((), device=reference.device)
        for number, point in enumerate(points, 1):
            self._is_last_point = number == len(points)
            with torch.enable_grad():
                outputs = outputs if point.node is None else self._run(point)
                value = objective(self.batch, reference, outputs)
                value.backward()
            total += value.detach()
        for site, grad in self._grad_inputs.items():  # had no gradient at the last point
            self._multiply(site, grad)
        return total / len(points), self._grad_gates / len(points)

    def _run(self, point: Point) -> Tensor:
        """Run the model at a point; returns [predicted, vocabulary]."""
        arch, batch = self.model.architecture, self.batch
        at, last = (batch.rows, batch.cols), len(arch.blocks) - 1
        fixed = None if point.node is None else self._between(*point)
        outputs: list[Tensor] = []

        def output(value: Tensor) -> Tensor:
            """A node's output, or what it is fixed at."""
            outputs.append(fixed if len(outputs) == point.node else value)
            return outputs[-1]

        stream = output(arch.embed(batch.clean_ids)).sum(0)  # [batch, pos, d_model]
        stream.requires_grad_(torch.is_grad_enabled())  # so that the first readers get gradients
        inputs = arch.attention_inputs(stream)
        for layer, block in enumerate(arch.blocks):
            # The stream has a gradient even where a fixed output cuts the layer's own off.
            self.model.begin_layer(block.layer, stream)
            values = block.attend(self._read(stream, 2 * layer), inputs)
            if layer == last:  # from here on, only the predicted tokens matter
                values, stream = values[at], stream[at]  # [predicted, ...]
            stream = stream + block.sum_heads(output(values))
            x = self._read(stream, 2 * layer + 1)[0]
            stream = stream + output(block.mlp(block.mlp_norm(x)))
            self.model.end_layer(block.layer, stream)
        x = self._read(stream, 2 * last + 2)[0]  # [predicted, d_model]
        if not self._clean:
            self._clean = [value.detach() for value in outputs]
        return arch.logits(arch.final_norm(x))

    def _read(self, stream: Tensor, site: int) -> Tensor:
        """The input of a site's readers, [reader, ..., d_model]: the stream."""
        return _Read.apply(self.model.centre(stream), self, site)

    def add_gradient(self, site: int, grad: Tensor) -> None:
        """Take the gradient of a site's inputs at a point, [reader, ..., d_model].

        Gradients are summed, and multiplied by the deltas only at the last point.
        """
        if site in self._grad_inputs:
            grad = self._grad_inputs.pop(site).add_(grad)
        if self._is_last_point:
            self._multiply(site, grad)
        else:
            self._grad_inputs[site] = grad

    def _multiply(self, site: int, grad: Tensor) -> None:
        """Multiply the gradient of a site's inputs by the deltas of its writers."""
        graph = self.model.graph
        num_writers, is_last = graph.sites[site].num_writers, site >= len(graph.sites) - 2
        deltas = (self._last_deltas if is_last else self._deltas)[:num_writers]
        product = deltas.flatten(1) @ grad.flatten(1).T  # [writer, reader]
        self._grad_gates[graph.sites[site].place] = product.T.flatten().float()

    @torch.no_grad()
    def _compute_deltas(self) -> tuple[Tensor, Tensor]:
        """The deltas of the writers below the last layer's, [writer, batch, pos, d_model], and of
        all writers at the predicted tokens, [writer, predicted, d_model]."""
        model, graph, clean = self.model, self.model.graph, self._clean
        num_below = graph.num_writers - graph.num_heads - 1
        below = model.workspace.take("open deltas", (num_below, *clean[0].shape[1:]), clean[0])
        written = len(graph.embedding_writers)
        below[:written] = model.centre(_minus(clean[0][:written], self._ablated(0), written))
        for layer, block in enumerate(model.architecture.blocks):
            nodes = (2 * layer + 1, 2 * layer + 2)
            ablated = self._ablated(nodes[0])
            model.begin_layer(block.layer, clean[nodes[0]])
            heads = block.head_delta(clean[nodes[0]], ablated, centred=model.is_centred)
            model.end_layer(block.layer, heads)
            mlp = model.centre(_minus(clean[nodes[1]], self._ablated(nodes[1])))
            if written < num_below:
                below[written : written + len(heads)] = heads
                below[written + len(heads)] = mlp
            written += len(heads) + 1
        return below, torch.cat([below[:, self.batch.rows, self.batch.cols], heads, mlp[None]])

    def _between(self, node: int, fraction: float) -> Tensor:
        clean, ablated = self._clean[node], self._ablated(node)
        return fraction * clean if ablated is None else torch.lerp(ablated, clean, fraction)

    def _ablated(self, node: int) -> Tensor | None:
        """A node's ablation value, in the shape of its output; None: zeros."""
        values, layer = self.ablation_values, (node - 1) // 2
        if values is None:
            return None
        if node == 0:
            return values.embeddings  # [embedding, batch, pos, d_model]
        value = (values.head_values if node % 2 else values.mlp_outputs)[layer]
        is_last = layer == len(self.model.architecture.blocks) - 1
        return value[self.batch.rows, self.batch.cols] if is_last else value


class _Read(torch.autograd.Function):
    """[..., d_model] -> [reader, ..., d_model], the same for all readers of a site."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, open_pass: OpenPass, site: int) -> Tensor:
        ctx.open_pass, ctx.site = open_pass, site
        num_readers = len(open_pass.model.graph.sites[site].readers)
        return stream.expand(num_readers, *stream.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        summed = None if ctx.site == 0 else grad.sum(0)  # nothing is read before the first site
        ctx.open_pass.add_gradient(ctx.site, grad)  # which may change it
        return summed, None, None


def _minus(clean: Tensor, ablated: Tensor | None, count: int | None = None) -> Tensor:
    return clean if ablated is None else clean - ablated[:count]
