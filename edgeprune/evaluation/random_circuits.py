"""Random circuits whose edges all lie on paths from the input to the output."""

import random
from collections import defaultdict
from collections.abc import Set

from edgeprune.circuit import Circuit
from edgeprune.graph import CircuitGraph, Edge

MAX_TRIES = 300
"""Number of paths in a row that may fail to fit before a circuit stays smaller than asked for."""


class RandomPaths:
    """Draws paths from the input to the output, and circuits made of them.

    A path starts at the output and goes backwards: to a writer, drawn uniformly from those that the
    reader sees through edges that are not excluded, on to one of the readers that feed this writer,
    and so on to an embedding. Where embeddings are not writers, they flow into every node, so a
    path may end at any node.

    Args:
        excluded: edges that no path uses.
    """

    def __init__(self, graph: CircuitGraph, excluded: Set[Edge] = frozenset()) -> None:
        self.graph = graph
        self.readers_of: dict[str, list[str]] = defaultdict(list)  # of each writer, its own inputs
        self.writers_of: dict[str, list[str]] = {}
        for site in graph.sites:
            writers = graph.writers[: site.num_writers]
            for reader in site.readers:
                self.writers_of[reader] = [w for w in writers if (w, reader) not in excluded]
                for node in graph.nodes_fed_by(reader):
                    self.readers_of[node].append(reader)
        self.may_end_anywhere = not graph.embedding_writers

    def path(self, rng: random.Random) -> list[Edge] | None:
        """The edges of a path, from the output backwards; None if a reader on it sees no writer."""
        edges, reader = [], "resid_post"
        while True:
            writers = self.writers_of[reader]
            if not writers and not self.may_end_anywhere:
                return None
            number = rng.randrange(len(writers) + self.may_end_anywhere)
            if number == len(writers):  # the embeddings
                return edges or None
            edges.append((writers[number], reader))
            if writers[number] in self.graph.embedding_writers:
                return edges
            reader = rng.choice(self.readers_of[writers[number]])

    def circuit(self, num_edges: int, seed: int) -> Circuit:
        """A circuit of paths, added until it has `num_edges` edges.

        A path that would make the circuit too large is drawn again. The circuit is smaller if too
        few paths fit (see `MAX_TRIES`).
        """
        rng, edges = random.Random(seed), set()
        failed = 0
        while len(edges) < num_edges and failed < MAX_TRIES:
            path = self.path(rng)
            if path is None or not 0 < len({*path} - edges) <= num_edges - len(edges):
                failed += 1
                continue
            edges.update(path)
            failed = 0
        return Circuit(self.graph, frozenset(edges))
