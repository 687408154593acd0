"""The computational graph: writers, readers, and which edges exist.

All index arithmetic of the project is in this file. Writers are ordered by when they write, so the
writers that a reader can see are always a prefix of that order. Edges are numbered reader by
reader, each reader's writers in order; one flat vector of length `num_edges` therefore splits,
without copying, into one dense [reader, writer] block per site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from edgeprune.errors import ConfigError

Edge = tuple[str, str]
"""(writer, reader), by name."""

MAX_HEADS = 100_000
"""Maximum number of layers times heads: more is a mistake in a file and would fill the memory."""


@dataclass(frozen=True)
class Site:
    """A point of the forward pass where readers see the same writers.

    `a{l}` holds a layer's query readers, then its key readers, then its value readers; `m{l}` and
    `resid_post` hold one reader each.
    """

    name: str
    layer: int
    """The site's layer; for `resid_post`, the last one."""
    readers: tuple[str, ...]
    num_writers: int
    """The first `num_writers` writers exist here."""
    offset: int
    """Index of the first edge of this site."""
    groups: tuple[int, ...]
    """Number of readers of each group (q, k, v; or one), in order; gates are rounded per group."""

    @property
    def num_edges(self) -> int:
        return len(self.readers) * self.num_writers

    @property
    def place(self) -> slice:
        """Where the site's edges are in a flat vector of all."""
        return slice(self.offset, self.offset + self.num_edges)


@dataclass(frozen=True)
class CircuitGraph:
    """Nodes and edges of a transformer whose residual stream is split into one outbox per node.

    Args:
        num_heads: query heads per block.
        num_kv_heads: key readers per block, and value readers: one per key/value head, or one per
            query head if query heads that share keys and values have readers of their own.
        embedding_writers: names of the embeddings that are writers, in order; all others always
            flow: their clean values reach every reader.

    Raises ValueError if a count is not a positive integer, too large, or not a multiple.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embedding_writers: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = layers, heads, kv_heads = (self.num_layers, self.num_heads, self.num_kv_heads)
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"layers, heads, key/value heads are {counts}, not positive integers")
        if layers * heads > MAX_HEADS:
            raise ValueError(f"{layers * heads:,} heads exceed {MAX_HEADS:,}")
        if heads % kv_heads:
            raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key/value heads")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "embedding_writers": list(self.embedding_writers)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CircuitGraph:
        """The inverse of `to_dict`."""
        return cls(**{**fields, "embedding_writers": tuple(fields["embedding_writers"])})

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names in write order: embeddings, then layer by layer the heads and the MLP."""
        names = list(self.embedding_writers)
        for layer in range(self.num_layers):
            names += [f"a{layer}.h{head}" for head in range(self.num_heads)]
            names.append(f"m{layer}")
        return tuple(names)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Sites in forward order: a0, m0, a1, m1, ..., resid_post."""
        sites: list[Site] = []
        attention_groups = (self.num_heads, self.num_kv_heads, self.num_kv_heads)

        def add(name: str, readers: tuple[str, ...], num_writers: int, groups: tuple[int, ...]):
            offset = sites[-1].place.stop if sites else 0
            sites.append(Site(name, layer, readers, num_writers, offset, groups))

        seen = len(self.embedding_writers)
        for layer in range(self.num_layers):
            heads = tuple(
                f"a{layer}.h{head}.{kind}"
                for kind, count in zip("qkv", attention_groups, strict=True)
                for head in range(count)
            )
            add(f"a{layer}", heads, seen, attention_groups)
            add(f"m{layer}", (f"m{layer}",), seen + self.num_heads, (1,))
            seen += self.num_heads + 1
        add("resid_post", ("resid_post",), seen, (1,))
        return tuple(sites)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        return tuple(reader for site in self.sites for reader in site.readers)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in order of its number; the inverse of `edge_index`."""
        return tuple(
            (writer, reader)
            for reader, numbers in self.edges_into.items()
            for writer in self.writers[: len(numbers)]
        )

    @property
    def num_writers(self) -> int:
        return len(self.writers)

    @property
    def num_edges(self) -> int:
        return self.sites[-1].place.stop

    def resolve_size(self, num_edges: int | None = None, sparsity: float | None = None) -> int:
        """The number of edges of a circuit, given exactly one of its two measures.

        Args:
            num_edges: number of edges to keep.
            sparsity: fraction of the edges to remove, in [0, 1]; rounded to the nearest edge.

        Raises ConfigError if not exactly one is given, or it is out of range.
        """
        if (num_edges is None) == (sparsity is None):
            raise ConfigError(f"give either num_edges or sparsity, got {num_edges} and {sparsity}")
        size = (1 - sparsity) * self.num_edges if num_edges is None else num_edges
        if not 0 <= size <= self.num_edges:  # also if it is NaN
            given = f"sparsity={sparsity}" if num_edges is None else f"num_edges={num_edges}"
            raise ConfigError(f"{given} is out of range: the graph has {self.num_edges:,} edges")
        return round(size)

    @cached_property
    def edges_into(self) -> dict[str, range]:
        """The numbers of the edges into each reader, one per writer that it sees, in order."""
        return {
            reader: range(first, first + site.num_writers)
            for site in self.sites
            for row, reader in enumerate(site.readers)
            for first in [site.offset + row * site.num_writers]
        }

    @cached_property
    def _writer_index(self) -> dict[str, int]:
        return {writer: index for index, writer in enumerate(self.writers)}

    def edge_index(self, edge: Edge) -> int:
        """The number of an edge given by name; raises ValueError if there is no such edge."""
        writer, reader = edge
        column, numbers = self._writer_index.get(writer), self.edges_into.get(reader, ())
        if column is None or column >= len(numbers):
            raise ValueError(
                f"there is no edge {writer} -> {reader} in a graph of {self.num_layers} layers of "
                f"{self.num_heads} heads with writers {', '.join(self.writers[:3])}, ..."
            )
        return numbers[column]

    def edge_writers(self) -> list[int]:
        """The writer's index of every edge, in order of the edge's number."""
        return [column for numbers in self.edges_into.values() for column in range(len(numbers))]

    def edge_readers(self) -> list[int]:
        """The reader's index of every edge, in order of the edge's number."""
        return [row for row, numbers in enumerate(self.edges_into.values()) for _ in numbers]

    def gate_groups(self) -> list[slice]:
        """Edges rounded together for deterministic gates: per layer q, k, v, MLP; then the end."""
        counts = [readers * site.num_writers for site in self.sites for readers in site.groups]
        return _slices(counts)

    def node_groups(self) -> list[slice]:
        """Writers rounded together for node gates: the embeddings; per layer heads, MLP."""
        return _slices([len(self.embedding_writers)] + [self.num_heads, 1] * self.num_layers)

    def nodes_fed_by(self, reader: str) -> list[str]:
        """The writers fed by this reader (several heads under GQA), none by `resid_post`."""
        if reader == "resid_post":
            return []
        if reader.startswith("m"):
            return [reader]
        layer_name, head_name, kind = reader.split(".")
        head = int(head_name[1:])
        if kind == "q":
            return [f"{layer_name}.h{head}"]
        group = self.heads_per_kv_head
        return [f"{layer_name}.h{h}" for h in range(head * group, (head + 1) * group)]


def _slices(counts: Sequence[int]) -> list[slice]:
    """Consecutive slices of these lengths, without empty ones."""
    ends = accumulate(counts)
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True) if count]
