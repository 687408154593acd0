"""Circuit: a frozen set of edges; set algebra and dangling edges. Files are in `formats`."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune.config import check_num_edges
from edgeprune.formats import CircuitError, read_circuit_file, write_circuit_file
from edgeprune.graph import CircuitGraph, Edge


@dataclass(frozen=True)
class Circuit:
    """The kept edges of a graph."""

    graph: CircuitGraph
    edge_set: frozenset[Edge]

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {self.graph.num_edges:,} edges)"

    @staticmethod
    def check(circuit: Any, graph: CircuitGraph | None = None) -> None:
        """Refuse what cannot be used.

        Args:
            circuit: to be one.
            graph: the model's, if the circuit is to be run in it.

        Raises:
            TypeError: it is anything but a circuit.
            ValueError: it is of another graph.
        """
        if not isinstance(circuit, Circuit):
            raise TypeError(
                f"got a {type(circuit).__name__}, expected a Circuit, such as `pruned.circuit` or "
                "`Circuit.load(path, model.graph)`"
            )
        if graph is not None and circuit.graph != graph:
            raise ValueError(
                f"the circuit is of another graph than the model's: {circuit.graph} and {graph}; "
                "load the model that it was found in, with the same embedding_writers"
            )

    @classmethod
    def from_edges(cls, graph: CircuitGraph, edges: Iterable[Edge]) -> Circuit:
        """A circuit from (writer, reader) names.

        Raises:
            ValueError: an edge which the graph does not have.
        """
        edges = [(writer, reader) for writer, reader in edges]
        for edge in edges:
            graph.edge_index(edge)
        return cls(graph, frozenset(edges))

    @classmethod
    def from_mask(cls, graph: CircuitGraph, kept: Sequence[bool]) -> Circuit:
        """A circuit from one boolean an edge, in the graph's order."""
        if len(kept) != graph.num_edges:
            raise ValueError(f"got {len(kept)} booleans for {graph.num_edges} edges")
        return cls(graph, frozenset(edge for edge, k in zip(graph.edges, kept, strict=True) if k))

    @classmethod
    def random(cls, graph: CircuitGraph, num_edges: int, seed: int) -> Circuit:
        """A circuit of `num_edges` edges drawn at random, for comparison.

        Raises:
            ConfigError: `num_edges` is negative or more than the graph has.
        """
        check_num_edges(num_edges, graph.num_edges)
        return cls(graph, frozenset(random.Random(seed).sample(graph.edges, num_edges)))

    def shuffled(self, seed: int) -> Circuit:
        """The same circuit between other heads, for comparison: as many edges, as well connected.

        The heads of each layer change places; where they share keys and values, the groups do, and
        the heads in each.
        """
        rng, graph = random.Random(seed), self.graph
        group = graph.num_heads // graph.num_kv_heads
        renamed = {}
        for layer in range(graph.num_layers):
            for kv, other_kv in enumerate(_shuffled(rng, graph.num_kv_heads)):
                for part in "kv":
                    renamed[f"a{layer}.h{kv}.{part}"] = f"a{layer}.h{other_kv}.{part}"
                for head, other in enumerate(_shuffled(rng, group)):
                    name, other_name = (
                        f"a{layer}.h{first * group + index}"
                        for first, index in ((kv, head), (other_kv, other))
                    )
                    renamed |= {name: other_name, f"{name}.q": f"{other_name}.q"}
        return Circuit(
            graph, frozenset((renamed.get(w, w), renamed.get(r, r)) for w, r in self.edge_set)
        )

    @property
    def edges(self) -> list[Edge]:
        """In the graph's order."""
        return sorted(self.edge_set, key=self.graph.edge_index)

    def digest(self) -> str:
        """SHA-256 of the edges, by which a measurement says what it is of."""
        return hashlib.sha256(json.dumps(self.edges).encode()).hexdigest()

    def mask(self) -> list[bool]:
        """One boolean an edge, in the graph's order; the inverse of `from_mask`."""
        return [edge in self.edge_set for edge in self.graph.edges]

    def __len__(self) -> int:
        return len(self.edge_set)

    def __iter__(self) -> Iterator[Edge]:
        """The edges, in the graph's order."""
        return iter(self.edges)

    def __contains__(self, edge: Sequence[str]) -> bool:
        return tuple(edge) in self.edge_set

    @property
    def sparsity(self) -> float:
        """1 - kept / all, a fraction."""
        return 1 - len(self) / self.graph.num_edges

    @property
    def nodes(self) -> list[str]:
        """Writers that take part: they write to an edge, or an edge feeds them."""
        used = set(self._writing)
        for reader in {reader for _, reader in self.edge_set}:
            used.update(self.nodes_fed_by(reader))
        return [writer for writer in self.graph.writers if writer in used]

    def nodes_fed_by(self, reader: str) -> list[str]:
        """Writers that an edge into this reader feeds in this circuit.

        Of heads that share their keys and values those that write to an edge, since to the others
        these make no difference; all of them where none does.
        """
        fed = self.graph.nodes_fed_by(reader)
        return [node for node in fed if node in self._writing] or fed

    @cached_property
    def _writing(self) -> frozenset[str]:
        return frozenset(writer for writer, _ in self.edge_set)

    def sizes(self) -> dict[str, Any]:
        """How large it is, with and without its dangling edges, as plain values."""
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
        """Only the edges on some path from the input to the final read.

        An edge dangles when no path leads from an embedding to its writer, or none from its reader
        to `resid_post`. Under interchange ablation dropping such edges changes no output: what
        reaches nothing changes nothing, and a node whose inputs are all corrupted writes its
        corrupted value. Under zero and mean ablation such a node still writes something.
        """
        # Embeddings that are no writers always flow, into every node.
        alive, fed = set(self.graph.embedding_writers or self.graph.writers), []
        for writer, reader in self.edges:  # in the order of the forward pass
            if writer in alive:
                alive.update(self.graph.nodes_fed_by(reader))
                fed.append((writer, reader))
        useful, kept = set(), set()
        for writer, reader in reversed(fed):
            if reader == "resid_post" or useful.intersection(self.graph.nodes_fed_by(reader)):
                useful.add(writer)
                kept.add((writer, reader))
        return Circuit(self.graph, frozenset(kept))

    def __and__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edge_set & self._same_graph(other).edge_set)

    def __or__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edge_set | self._same_graph(other).edge_set)

    def __sub__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edge_set - self._same_graph(other).edge_set)

    def _same_graph(self, other: Circuit) -> Circuit:
        self.check(other)
        if other.graph != self.graph:
            raise ValueError(f"circuits of different graphs: {self.graph} and {other.graph}")
        return other

    def save(
        self,
        path: Path | str,
        format: str = "edges",
        *,
        scores: Sequence[float] | None = None,
        d_model: int | None = None,
    ) -> None:
        """Write a file: `edges`, the published `edges.json`, or `eap_json` or `eap_pt`.

        Arguments as `formats.write_circuit_file`.
        """
        write_circuit_file(self.graph, self.edges, path, format, scores=scores, d_model=d_model)

    @classmethod
    def load(cls, path: Path | str, graph: CircuitGraph) -> Circuit:
        """Read a file of any format (see `formats`), or a run directory's edges.json.

        Warns of what was lost or decided in reading.

        Raises:
            CircuitError: no such file, a damaged one, or one of another graph.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "edges.json"
        file = read_circuit_file(path, graph)
        circuit = cls.from_edges_checked(graph, file.edges, str(path))
        for note in file.notes:
            warnings.warn(note, stacklevel=2)
        return circuit

    @classmethod
    def from_edges_checked(cls, graph: CircuitGraph, edges: list[Edge], where: str) -> Circuit:
        try:
            return cls.from_edges(graph, edges)
        except ValueError as error:
            raise CircuitError(f"{where} is no circuit of this model: {error}") from None


def _shuffled(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(count), count)
