"""The computational graph: writers, readers, and which edges exist.

All index arithmetic of the project is in this file. Writers are ordered by when they write, so the
writers that a reader can see are always a prefix of that order. Edges are numbered reader by
reader, each reader's writers in order; one flat vector of length `num_edges` therefore splits,
without copying, into one dense [reader, writer] block per site.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from edgeprune.errors import ConfigError

Edge = tuple[str, str]
"""(writer, reader), by name."""

MAX_HEADS = 100_000
"""Layers times heads of a graph; more is a mistake in a file, and would fill the memory."""


@dataclass(frozen=True)
class Site:
    """A point of the forward pass where readers see the same writers.

    `a{l}` holds a layer's query readers, then its key readers, then its value readers; `m{l}` and
    `resid_post` hold one reader each.
    """

    name: str
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
        num_layers: blocks.
        num_heads: attention (query) heads a block.
        num_kv_heads: key/value heads a block; equal to `num_heads` without grouped-query attention.
        embedding_writers: names of the embedding writers, in order; empty when the embeddings
            always flow.

    Raises:
        ValueError: a count is no whole number above 0 or beyond any model's, or `num_heads` is no
            multiple of `num_kv_heads`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embedding_writers: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name}={count!r} must be a whole number above 0")
        if self.num_layers * self.num_heads > MAX_HEADS:
            raise ValueError(
                f"a model of {self.num_layers:,} layers of {self.num_heads:,} heads has more than "
                f"the {MAX_HEADS:,} heads of any that is known; check its numbers"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads: "
                "the first must be a multiple of the second"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
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
        sites = []
        offset = 0
        attention_groups = (self.num_heads, self.num_kv_heads, self.num_kv_heads)

        def add(name: str, readers: tuple[str, ...], num_writers: int, groups: tuple[int, ...]):
            nonlocal offset
            sites.append(Site(name, readers, num_writers, offset, groups))
            offset += sites[-1].num_edges

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
            for site in self.sites
            for reader in site.readers
            for writer in self.writers[: site.num_writers]
        )

    @property
    def num_writers(self) -> int:
        return len(self.writers)

    @property
    def num_edges(self) -> int:
        last = self.sites[-1]
        return last.offset + last.num_edges

    def check_num_edges(self, num_edges: int) -> None:
        """Raise ConfigError unless a circuit of this graph can have `num_edges` edges."""
        if not 0 <= num_edges <= self.num_edges:
            raise ConfigError(
                f"num_edges={num_edges} is out of range: the graph has {self.num_edges:,} edges"
            )

    def resolve_size(self, num_edges: int | None = None, sparsity: float | None = None) -> int:
        """The number of edges of a circuit, given exactly one of its two measures.

        Args:
            num_edges: number of edges to keep.
            sparsity: fraction of the edges to remove, in [0, 1]; the number of edges is rounded to
                the nearest integer.

        Raises:
            ConfigError: not exactly one is given, or it is out of range.
        """
        if (num_edges is None) == (sparsity is None):
            raise ConfigError(
                f"got num_edges={num_edges} and sparsity={sparsity}; give exactly one of them"
            )
        if sparsity is not None:
            if not 0 <= sparsity <= 1:
                raise ConfigError(
                    f"sparsity={sparsity} is out of range: it is the fraction of edges to remove, "
                    "0 to 1"
                )
            return round((1 - sparsity) * self.num_edges)
        self.check_num_edges(num_edges)
        return num_edges

    @cached_property
    def _reader_place(self) -> dict[str, tuple[int, int]]:
        """reader -> (index of its first edge, number of its writers)."""
        return {
            reader: (site.offset + row * site.num_writers, site.num_writers)
            for site in self.sites
            for row, reader in enumerate(site.readers)
        }

    @cached_property
    def _writer_index(self) -> dict[str, int]:
        return {writer: index for index, writer in enumerate(self.writers)}

    def edge_index(self, edge: Edge) -> int:
        """The number of an edge given by name.

        Raises:
            ValueError: unknown writer or reader, or the writer does not come before the reader.
        """
        writer, reader = edge
        column = self._writer_index.get(writer)
        place = self._reader_place.get(reader)
        if column is None:
            raise ValueError(f"unknown writer {writer!r}; this graph has {_sample(self.writers)}")
        if place is None:
            raise ValueError(f"unknown reader {reader!r}; this graph has {_sample(self.readers)}")
        offset, num_writers = place
        if column >= num_writers:
            raise ValueError(f"no edge {writer} -> {reader}: {writer} writes after {reader} reads")
        return offset + column

    def edge_writers(self) -> list[int]:
        """The writer's index of every edge, in order of the edge's number."""
        return [
            column
            for site in self.sites
            for _ in site.readers
            for column in range(site.num_writers)
        ]

    def gate_groups(self) -> list[slice]:
        """Edges rounded together for deterministic gates: per layer q, k, v, MLP; then the end."""
        slices = []
        for site in self.sites:
            start = site.offset
            for num_readers in site.groups:
                stop = start + num_readers * site.num_writers
                if stop > start:
                    slices.append(slice(start, stop))
                start = stop
        return slices

    def node_groups(self) -> list[slice]:
        """Writers rounded together for node gates: the embeddings; per layer heads, MLP."""
        counts = [len(self.embedding_writers)] + [self.num_heads, 1] * self.num_layers
        slices = []
        start = 0
        for count in counts:
            if count:
                slices.append(slice(start, start + count))
            start += count
        return slices

    def nodes_fed_by(self, reader: str) -> list[str]:
        """The writers whose output depends on this reader (several heads under GQA).

        `resid_post` feeds none.
        """
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


def _sample(names: tuple[str, ...]) -> str:
    if len(names) <= 8:
        return ", ".join(names)
    return ", ".join(names[:3]) + ", ..., " + ", ".join(names[-3:])
