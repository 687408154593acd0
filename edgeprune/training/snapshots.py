"""Snapshots: the scores of all edges at about 50 steps of a run, in one safetensors file.

The scores before the first step come first. The others follow at steps that grow as squares do,
because the ranking forms early and then settles: evenly spaced ones would miss the beginning, and
on a logarithmic scale most would fall into the first tenth. Each snapshot is written before the
checkpoint of its step, so a resumed run finds all that it needs, and those of later steps are
dropped: its file has the same bytes as that of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune.errors import CheckpointError
from edgeprune.files import write_atomically

NUM_SNAPSHOTS = 50
"""Maximum number of snapshots after the start of a run; runs of less than a thousand steps have
fewer."""


def is_due(step: int, steps: int) -> bool:
    """Whether a run of `steps` steps takes a snapshot after `step` of them; always at its end."""
    reached, before = (isqrt(NUM_SNAPSHOTS**2 * done // steps) for done in (step, step - 1))
    return reached > before


@dataclass(frozen=True)
class Snapshots:
    """Scores at several steps of a run.

    Attributes:
        steps: [snapshot], the number of steps done, ascending.
        scores: [snapshot, edge], float32 on the CPU, higher is more important.
    """

    steps: Tensor
    scores: Tensor

    def with_snapshot(self, step: int, scores: Tensor) -> Snapshots:
        """The snapshots before a step, and a new one of `scores`, [edge], after it.

        Those of later steps, which a run took before it was resumed, are dropped.
        """
        known = self.steps < step
        steps = torch.cat([self.steps[known], torch.tensor([step])])
        return Snapshots(steps, torch.cat([self.scores[known], scores.cpu().float()[None]]))

    def ranks(self, edges: Sequence[int]) -> Tensor:
        """[snapshot, edge], the places of some edges among all, from 1 for the highest score."""
        rows = []
        for scores in self.scores:  # one at a time: all places of a large graph take gigabytes
            places = torch.empty(len(scores), dtype=torch.long)
            order = torch.argsort(scores, descending=True, stable=True)
            places[order] = torch.arange(1, len(scores) + 1)
            rows.append(places[list(edges)])
        return torch.stack(rows)

    def save(self, path: Path) -> None:
        """Write a file atomically; CheckpointError if the disk is full or read-only."""
        tensors = {"steps": self.steps, "scores": self.scores}
        try:
            write_atomically(path, lambda temporary: save_file(tensors, temporary))
        except OSError as error:
            hint = "Remove the cause and continue with resume=auto; checkpoints are intact"
            raise CheckpointError(f"cannot save {path}: {error}. {hint}") from None

    @classmethod
    def load(cls, path: Path, num_edges: int) -> Snapshots:
        """Read a file; none if there is no file. CheckpointError if it is damaged."""
        if not path.exists():
            return cls(torch.empty(0, dtype=torch.long), torch.empty(0, num_edges))
        try:
            found = cls(**load_file(path))
            if found.scores.shape != (len(found.steps), num_edges):
                raise ValueError(f"scores are {list(found.scores.shape)}")
            return found
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}; delete it, and only the snapshots are lost"
            ) from None
