"""Circuit: a set of edges of a graph, its set algebra, and which of its edges are connected."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import edgeprune
from edgeprune.graph import CircuitGraph, Edge


@dataclass(frozen=True)
class Circuit:
    """The kept edges of a graph."""

    graph: CircuitGraph
    edge_set: frozenset[Edge]

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {self.graph.num_edges:,} edges)"

    def _repr_html_(self) -> str:
        """In a notebook: the page, in a frame."""
        return edgeprune.page(self)._repr_html_()

    @staticmethod
    def check(circuit: Any, graph: CircuitGraph | None = None) -> None:
        """Raise TypeError unless it is a circuit, ValueError unless it is of a given graph."""
        if not isinstance(circuit, Circuit):
            raise TypeError(
                f"got a {type(circuit).__name__}, expected a Circuit, such as `pruned.circuit` or "
                "`edgeprune.load_circuit(path)`"
            )
        if graph is not None and circuit.graph != graph:
            raise ValueError(
                f"the circuit belongs to {circuit.graph}, expected {graph}; use the model in which "
                "it was found, with the same embedding_writers and split_kv_readers"
            )

    @classmethod
    def from_edges(cls, graph: CircuitGraph, edges: Iterable[Edge]) -> Circuit:
        """A circuit from (writer, reader) names; raises ValueError for an unknown edge."""
        edges = [(writer, reader) for writer, reader in edges]
        for edge in edges:
            graph.edge_index(edge)
        return cls(graph, frozenset(edges))

    @classmethod
    def from_mask(cls, graph: CircuitGraph, kept: Sequence[bool]) -> Circuit:
        """A circuit from one boolean per edge, in the graph's order."""
        if len(kept) != graph.num_edges:
            raise ValueError(f"got {len(kept)} booleans for {graph.num_edges} edges")
        return cls(graph, frozenset(edge for edge, k in zip(graph.edges, kept, strict=True) if k))

    @classmethod
    def random(cls, graph: CircuitGraph, num_edges: int, seed: int) -> Circuit:
        """A circuit of `num_edges` edges drawn at random."""
        size = graph.resolve_size(num_edges)
        return cls(graph, frozenset(random.Random(seed).sample(graph.edges, size)))

    def head_permuted(self, seed: int) -> Circuit:
        """The same circuit between other heads: equally many edges, equally well connected.

        Permutes the heads within each layer. Under grouped-query attention it permutes the groups,
        and the query heads within each group.
        """
        rng, graph = random.Random(seed), self.graph
        group, num_groups = graph.heads_per_kv_head, graph.num_kv_heads
        renamed = {}
        for layer in range(graph.num_layers):
            for kv, other_kv in enumerate(rng.sample(range(num_groups), num_groups)):
                for part in "kv":
                    renamed[f"a{layer}.h{kv}.{part}"] = f"a{layer}.h{other_kv}.{part}"
                for head, other in enumerate(rng.sample(range(group), group)):
                    name = f"a{layer}.h{kv * group + head}"
                    other_name = f"a{layer}.h{other_kv * group + other}"
                    renamed |= {name: other_name, f"{name}.q": f"{other_name}.q"}
        edges = {(renamed.get(w, w), renamed.get(r, r)) for w, r in self.edge_set}
        return Circuit(graph, frozenset(edges))

    @property
    def edges(self) -> list[Edge]:
        """The edges in the graph's order."""
        return sorted(self.edge_set, key=self.graph.edge_index)

    def digest(self) -> str:
        """SHA-256 of the edges; identifies the circuit a measurement belongs to."""
        return hashlib.sha256(json.dumps(self.edges).encode()).hexdigest()

    def mask(self) -> list[bool]:
        """One boolean per edge, in the graph's order; the inverse of `from_mask`."""
        return [edge in self.edge_set for edge in self.graph.edges]

    def __len__(self) -> int:
        return len(self.edge_set)

    def __iter__(self) -> Iterator[Edge]:
        """The edges, in the graph's order."""
        return iter(self.edges)

    def __contains__(self, edge: Edge) -> bool:
        return tuple(edge) in self.edge_set

    @property
    def sparsity(self) -> float:
        """1 - kept / all, a fraction."""
        return 1 - len(self) / self.graph.num_edges

    @property
    def nodes(self) -> list[str]:
        """The writers that take part: one of their edges is kept, or a kept edge feeds them."""
        readers = {reader for _, reader in self.edge_set}
        used = self._writing.union(*map(self.nodes_fed_by, readers))
        return [writer for writer in self.graph.writers if writer in used]

    def nodes_fed_by(self, reader: str) -> list[str]:
        """The writers that an edge into this reader feeds in this circuit.

        Of the query heads that share a key or value head, those with an outgoing edge, if any has
        one: on the others the edge has no effect.
        """
        fed = self.graph.nodes_fed_by(reader)
        return [node for node in fed if node in self._writing] or fed

    @cached_property
    def _writing(self) -> frozenset[str]:
        return frozenset(writer for writer, _ in self.edge_set)

    def sizes(self) -> dict[str, Any]:
        """Size with and without dangling edges, as JSON values."""
        connected = self.without_dangling()
        return {
            "all_edges": self.graph.num_edges,
            "num_edges": len(self),
            "sparsity": self.sparsity,
            "without_dangling": {
                "num_edges": len(connected),
                "sparsity": connected.sparsity,
                "num_nodes": len(connected.nodes),
            },
        }

    def without_dangling(self) -> Circuit:
        """Only the edges on some path from the input to the output; the others dangle.

        Under interchange ablation removing dangling edges changes no output: what reaches nothing
        changes nothing, and a node whose inputs are all corrupted writes its corrupted value. Under
        zero and mean ablation such a node still writes something.
        """
        edges_into: dict[str, list[Edge]] = {reader: [] for reader in self.graph.readers}
        for edge in self.edge_set:
            edges_into[edge[1]].append(edge)
        # Embeddings that are not writers always flow, into every node.
        alive = set(self.graph.embedding_writers or self.graph.writers)
        for reader, edges in edges_into.items():  # in the order of the forward pass
            edges[:] = [edge for edge in edges if edge[0] in alive]
            if edges:
                alive.update(self.graph.nodes_fed_by(reader))
        useful, kept = set(), set()
        for reader, edges in reversed(edges_into.items()):
            if reader == "resid_post" or useful.intersection(self.graph.nodes_fed_by(reader)):
                useful.update(writer for writer, _ in edges)
                kept.update(edges)
        return Circuit(self.graph, frozenset(kept))

    def __and__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edge_set & self._same_graph(other).edge_set)

    def __or__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edge_set | self._same_graph(other).edge_set)

    def __sub__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edge_set - self._same_graph(other).edge_set)

    def _same_graph(self, other: Circuit) -> Circuit:
        self.check(other, self.graph)
        return other
