"""How many layers the outboxes look ahead (see `Outboxes.read`)."""

from __future__ import annotations

from edgeprune.graph import CircuitGraph

MAX_LOOKAHEAD = 8
"""Maximum number of layers: more save little, and take memory when blocks are recomputed."""


def lookaheads(graph: CircuitGraph) -> list[range]:
    """The layers of each look-ahead, in order."""
    length = lookahead_length(graph)
    starts = range(0, graph.num_layers, length)
    return [range(start, min(start + length, graph.num_layers)) for start in starts]


def lookahead_length(graph: CircuitGraph) -> int:
    """The number of layers per look-ahead that moves the least memory.

    In units of one [token, d_model] array, counting forward and backward: a look-ahead goes four
    times through the outboxes written before it (or their gradients). What is written during the
    look-ahead is then added in four passes over the readers' inputs (or their gradients); the layer
    with index i takes part in as many such passes as i has one bits.
    """
    num_readers = len(graph.sites[0].readers) + 1

    def num_arrays(length: int) -> int:
        total = 0
        for start in range(0, graph.num_layers, length):
            indices = range(min(length, graph.num_layers - start))
            total += graph.sites[2 * start].num_writers
            total += num_readers * sum(index.bit_count() for index in indices)
        return total

    return min(range(2, MAX_LOOKAHEAD + 1), key=num_arrays)
