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

    Counts arrays of [token, d_model]. Forward and backward, a look-ahead moves four times what was
    written before it (deltas or their gradients). Adding what is written during it moves four times
    the inputs of its readers (or their gradients): those of its layer with index i as often as the
    binary form of i has ones.
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
