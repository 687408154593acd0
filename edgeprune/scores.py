"""EdgeScores: one number per edge, whichever method it came from, and the circuits cut from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import edgeprune
from edgeprune.circuit import Circuit
from edgeprune.errors import CircuitError
from edgeprune.files import write_atomically
from edgeprune.graph import CircuitGraph

MAX_LOG_ODDS = 8.0
"""Up to this number, its sigmoid in float32 determines it to about four decimals."""


@dataclass(frozen=True)
class EdgeScores:
    """A graph and one number per edge. Every method ends in one; sizes are chosen afterwards.

    Attributes:
        graph: the scored graph.
        values: [edge], float64 on the CPU, in the graph's order. Learned scores are log odds: the
            logarithm of p / (1 - p) with a p in (0, 1), or any numbers that grow with the
            importance of the edge.
        by_magnitude: whether edges are ranked by |value| (attribution) instead of by value.
        origin: where the values come from: method, settings, training step; JSON values.
    """

    graph: CircuitGraph
    values: Tensor
    by_magnitude: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().to("cpu", torch.float64)
        object.__setattr__(self, "values", values)
        if values.shape != (self.graph.num_edges,):
            raise ValueError(
                f"got scores of shape {list(values.shape)}, expected [{self.graph.num_edges}]"
            )
        if not values.isfinite().all():
            num_wrong = int((~values.isfinite()).sum())
            raise ValueError(f"{num_wrong:,} scores are NaN or infinite, expected finite numbers")

    def __repr__(self) -> str:
        return f"EdgeScores({self.graph.num_edges:,} edges, {self.origin.get('method', 'unknown')})"

    def _repr_html_(self) -> str:
        """In a notebook: the page, in a frame."""
        return edgeprune.page(self)._repr_html_()

    def importance(self) -> Tensor:
        """[edge], the numbers by which edges are ranked: the scores, or their magnitudes."""
        return self.values.abs() if self.by_magnitude else self.values

    def ranking(self) -> Tensor:
        """[edge], the indices of all edges, most important first; ties in the graph's order."""
        return torch.argsort(self.importance(), descending=True, stable=True)

    def circuit(self, *, num_edges: int | None = None, sparsity: float | None = None) -> Circuit:
        """The circuit of the highest-ranked edges, of exactly the requested size.

        Arguments and errors as `CircuitGraph.resolve_size`.
        """
        size = self.graph.resolve_size(num_edges, sparsity)
        kept = torch.zeros(self.graph.num_edges, dtype=torch.bool)
        kept[self.ranking()[:size]] = True
        return Circuit.from_mask(self.graph, kept.tolist())

    def greedy(self) -> EdgeScores:
        """Scores that rank the edges in the order in which a greedy search adds them.

        The search grows the circuit from the output: it repeatedly adds the highest-ranked edge
        into the output or into a node from which an edge has been added (as EAP-IG and MIB do), so
        that what an added edge carries always reaches the output.
        """
        graph, importance = self.graph, self.importance().tolist()
        edges_into: dict[str, list[int]] = {}  # per node, the edges that become candidates with it
        for reader, edges in graph.edges_into.items():
            for node in graph.nodes_fed_by(reader) or ["output"]:
                edges_into.setdefault(node, []).extend(edges)
        candidates: list[tuple[float, int]] = []
        seen, order = set(), []

        def reach(node: str) -> None:
            for edge in edges_into.pop(node, ()):
                if edge not in seen:  # heads may share a reader
                    seen.add(edge)
                    heappush(candidates, (-importance[edge], edge))

        reach("output")
        while candidates:
            _, edge = heappop(candidates)
            order.append(edge)
            reach(graph.edges[edge][0])
        values = torch.empty(graph.num_edges, dtype=torch.float64)
        values[order] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        return EdgeScores(graph, values, origin={**self.origin, "order": "greedy"})

    def circuit_above(self, threshold: float) -> Circuit:
        """The circuit of the edges whose value is at least a threshold."""
        return Circuit.from_mask(self.graph, (self.values >= threshold).tolist())

    def magnitudes(self) -> Tensor:
        """[edge], numbers whose magnitude ranks the edges, for formats that rank by magnitude.

        The values themselves where magnitude ranks them; otherwise their sigmoids, flattened if
        values exceed `MAX_LOG_ODDS`, because several sigmoids would be 1 in float32.
        """
        if self.by_magnitude:
            return self.values
        scale = max(1.0, self.values.abs().max().item() / MAX_LOG_ODDS)
        return torch.sigmoid(self.values / scale)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, which also holds graph and origin."""
        graph, origin = self.graph.to_dict(), dict(self.origin)
        about = {"graph": graph, "by_magnitude": self.by_magnitude, "origin": origin}
        metadata = {"edgeprune": json.dumps(about)}  # several keys would come in any order
        write_atomically(Path(path), lambda new: save_file({"scores": self.values}, new, metadata))

    @classmethod
    def load(cls, path: Path | str) -> EdgeScores:
        """Read a file written by `save`; raises CircuitError if it is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                metadata, values = file.metadata() or {}, file.get_tensor("scores")
            about = json.loads(metadata["edgeprune"])
            graph = CircuitGraph.from_dict(about["graph"])
            return cls(graph, values, about["by_magnitude"], about["origin"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CircuitError(
                f"{path} is not a readable scores file ({type(error).__name__}: {error}); expected "
                "a scores.safetensors that edgeprune wrote"
            ) from None
