"""Passes of the full model with some of its nodes ablated, also token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import CircuitModel


class NodeMeans:
    """Mean outputs of nodes over prompts, for mean ablation.

    With `per_position`, positions that some prompt has get a mean of their own; others, such as
    those of generated tokens, get the mean over all.
    """

    def __init__(self, model: CircuitModel, names: Sequence[str], *, per_position: bool) -> None:
        self.model, self.per_position = model, per_position
        self.sums = {name: torch.zeros(0, model.d_model) for name in names}  # [pos, d_model]
        self.counts = torch.zeros(0)  # [pos]

    @torch.no_grad()
    def add(self, ids: Tensor) -> None:
        """Add prompts of one length, [batch, pos]."""
        length = max(ids.shape[1], len(self.counts))

        def padded(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])

        def add(name: str, x: Tensor) -> Tensor:
            total = padded(self.sums[name])
            total[: x.shape[1]] += x.float().sum(0).cpu()
            self.sums[name] = total
            return x

        self.counts = padded(self.counts)
        self.counts[: ids.shape[1]] += len(ids)
        with self.model.intervene({name: partial(add, name) for name in self.sums}) as run:
            run.states(ids)

    def get(self, name: str, start: int, length: int) -> Tensor:
        """The means at `length` positions from `start` on, [length, d_model], or [1, d_model]."""
        total = self.sums[name].sum(0, keepdim=True) / self.counts.sum()
        if not self.per_position or start + length > len(self.counts):
            return total
        place = slice(start, start + length)
        return self.sums[name][place] / self.counts[place, None]


class AblatedModel:
    """The full model with nodes ablated by zero, a mean, or the corrupted prompt's value.

    Args:
        names: the nodes, such as "a5.h1" or "m3"; none for the full model.
        kind: `zero`, `mean` or `interchange`.
        means: for `mean`.
    """

    def __init__(
        self, model: CircuitModel, names: Sequence[str], kind: str, means: NodeMeans | None
    ) -> None:
        self.model, self.kind, self.means = model, kind, means
        self.changes = {name: partial(self._value, name) for name in names}
        self.exchanges = kind == "interchange" and bool(names)
        self._corrupted: dict[str, Tensor] = {}
        self._is_recording, self._start = False, 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Keep the ablation in place; `states` and `generate` need this."""
        with self.model.intervene(self.changes) as self._run:
            yield

    @torch.no_grad()
    def states(
        self, clean: Tensor, corrupted: Tensor, caches: dict[str, Any] | None = None
    ) -> Tensor:
        """Hidden states after the final norm, of prompts of one length, [batch, pos, d_model].

        With `caches`, an empty dictionary at first, the next call continues the prompts.
        """
        options: dict[str, Any] = {}
        if not caches:
            self._start = 0
        for name, ids in (("corrupted", corrupted), ("clean", clean)):
            self._is_recording = name == "corrupted"
            if self._is_recording and not self.exchanges:
                continue
            if caches is not None:
                options = {"use_cache": True, "past_key_values": caches.get(name)}
            states, _, *cache = self._run.states(ids, **options)
            if caches is not None:
                caches[name] = cache[0]
        self._start += clean.shape[1]
        return states

    @torch.no_grad()
    def generate(self, last: Tensor, caches: dict[str, Any], count: int) -> Tensor:
        """The most likely next tokens, one after another, [batch, count].

        With interchange ablation, the corrupted prompt is continued with the same tokens.

        Args:
            last, caches: the states at the last position, [batch, d_model], and the caches, after a
                call of `states`.
        """
        tokens = [self.model.architecture.logits(last).argmax(-1)]
        while len(tokens) < count:
            ids = tokens[-1][:, None]
            last = self.states(ids, ids, caches)[:, -1]
            tokens.append(self.model.architecture.logits(last).argmax(-1))
        return torch.stack(tokens, 1)

    def _value(self, name: str, x: Tensor) -> Tensor | float:
        """What takes the place of a node's output, [batch, pos, d_model]."""
        if self._is_recording:
            self._corrupted[name] = x
            return x
        if self.kind == "interchange":
            return self._corrupted[name]
        return 0.0 if self.means is None else self.means.get(name, self._start, x.shape[1])
