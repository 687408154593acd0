"""Which training pairs pushed an edge up, and does it fall without them?

A pair's push on an edge is minus the gradient of the pair's objective with respect to the edge's
score: how the pair alone would move the edge's own term of the score in a step. It is measured at
several snapshots of the run, with the gates of the step after each, so that all pairs are compared
in the same circuits; in training, a pair is used only in a few steps, each with a circuit of
another size. As in training, the gradients at a snapshot are divided by their mean size and
weighted by the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, geometric_mean
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.evaluation.finding import percent
from edgeprune.evaluation.statistics import LEVEL, sign_test
from edgeprune.evaluation.table import Table
from edgeprune.methods.every_size import MIN_TOTAL_GRADIENT, EverySize, grad_scores
from edgeprune.methods.method import learning_rate_factor
from edgeprune.metrics import Objective
from edgeprune.prompts import Pair, collate
from edgeprune.training.snapshots import Snapshots

NORMAL = 1.4826
"""The standard deviation of normal numbers is this times their median absolute deviation (MAD)."""
FALSE_ALARMS = 0.05
"""Expected number of outliers per edge if its pushes were normal and no pair were special."""
NUM_LISTED = 3
"""Number of pairs listed per edge that push it most, and of those that push it least."""
MAX_ROWS = 10
"""Number of rows of the table in a terminal."""
MAX_TEXT = 90
"""Number of characters of a prompt in a table."""


def outliers(pushes: Tensor) -> Tensor:
    """[pair], whether a push is an outlier among the pushes on an edge, [pair].

    Outliers are farther from the median than z * 1.4826 * MAD, where z is such that `FALSE_ALARMS`
    outliers are expected among as many normal numbers: 3.7 for 200 pairs. Because the median and
    the MAD are estimates, there are more: 0.06 among 1,600 normal numbers, 0.10 among 200.
    """
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * len(pushes)))
    median = pushes.median()
    deviations = (pushes - median).abs()
    return deviations > z * NORMAL * deviations.median()


class PushedEdge(NamedTuple):
    """Pushes on one edge.

    Attributes:
        share_up: share of the pairs that push it up.
        consistency: correlation, over pairs, of the pushes at every second snapshot with those at
            the others. Near 0, which pairs push most is chance.
        num_outliers: number of pairs that `outliers` finds.
        most, least: prompts of the pairs that push it up most and least, and their pushes, in
            multiples of the mean size of all pairs' pushes.
    """

    share_up: float
    consistency: float
    num_outliers: int
    most: list[tuple[str, float]]
    least: list[tuple[str, float]]


@dataclass(frozen=True)
class Pushes:
    """The pushes of training pairs on edges at snapshots of a run.

    Attributes:
        pairs: the training pairs.
        steps: the steps of the snapshots.
        edges: numbers of the edges, in the order of the last axis of `values`.
        values: [snapshot, pair, edge], the weighted pushes.
    """

    pairs: tuple[Pair, ...]
    steps: tuple[int, ...]
    edges: tuple[int, ...]
    values: Tensor

    def on(self, edge: int) -> Tensor:
        """[pair], the pushes on an edge, summed over the snapshots."""
        return self.values[..., self.edges.index(edge)].sum(0)

    def of_edge(self, edge: int) -> PushedEdge:
        """A summary of the pushes on an edge."""
        values = self.values[..., self.edges.index(edge)]  # [snapshot, pair]
        total = values.sum(0)
        size = total.abs().mean().clamp(min=1e-30)
        order = total.argsort(descending=True).tolist()
        halves = torch.stack([values[start::2].sum(0) for start in (0, 1)])
        consistency = halves.double().corrcoef()[0, 1].nan_to_num(0.0)  # NaN where all are equal

        def listed(indices: Sequence[int]) -> list[tuple[str, float]]:
            return [(self.pairs[i].text, (total[i] / size).item()) for i in indices]

        return PushedEdge(
            (total > 0).double().mean().item(), consistency.item(),
            int(outliers(total).sum()), listed(order[:NUM_LISTED]),
            listed(order[: -NUM_LISTED - 1 : -1]),
        )  # fmt: skip

    def _share_up(self, edges: Sequence[int]) -> float:
        """The share of some edges that all pairs together push up."""
        return sum(self.on(edge).mean().item() > 0 for edge in edges) / max(len(edges), 1)

    def to_dict(self, controls: Sequence[int]) -> dict[str, Any]:
        """JSON values, without the pushes themselves; `controls` are edges outside the circuit."""
        of_controls = [self.of_edge(edge) for edge in controls]
        return {
            "num_pairs": len(self.pairs), "steps": self.steps,
            "controls_pushed_up": self._share_up(controls), "false_alarms": FALSE_ALARMS,
            "control_outliers": [each.num_outliers for each in of_controls],
            "control_consistency": [each.consistency for each in of_controls],
        }  # fmt: skip

    def table(self, edges: Sequence[tuple[str, int]]) -> Table:
        """A row per edge of (title, number)."""
        rows = []
        for title, edge in edges[:MAX_ROWS]:
            found = self.of_edge(edge)
            text, size = found.most[0]
            rows.append([
                title, percent(found.share_up), f"{found.consistency:.2f}",
                str(found.num_outliers), f"{size:.1f} ×", shorten(text, MAX_TEXT, placeholder=" …"),
            ])  # fmt: skip
        title = f"how {len(self.pairs):,} training pairs pushed the edges that do most"
        columns = ["", "push\nit up", "consis-\ntency", "out-\nliers", "largest\npush", ""]
        return Table(columns, rows, title)

    def in_words(self, edges: Sequence[int], controls: Sequence[int]) -> str:
        """A summary, with edges outside of the circuit as controls."""
        mine, others = ([self.of_edge(e) for e in some] for some in (edges, controls))

        def outliers_per_edge(found: Sequence[PushedEdge]) -> str:
            return f"{sum(each.num_outliers for each in found) / max(len(found), 1):.1f}"

        middle = sorted(each.consistency for each in mine)[len(mine) // 2]
        return (
            f"At {len(self.steps)} snapshots, {len(self.pairs):,} training pairs together push "
            f"{percent(self._share_up(edges))} of the edges up, and "
            f"{percent(self._share_up(controls))} of those outside of the circuit. "
            f"Which pairs push an edge most is consistent between halves of the snapshots by a "
            f"correlation of {middle:.2f} (median of the edges; 0 is chance). An edge has "
            f"{outliers_per_edge(mine)} outliers among its pushes, one outside of the circuit "
            f"{outliers_per_edge(others)}; {FALSE_ALARMS} would be expected if pushes were normal."
        )


def measure_pushes(
    model: CircuitModel,
    pairs: Sequence[Pair],
    edges: Sequence[int],
    snapshots: Snapshots,
    *,
    num_snapshots: int,
    objective: Objective,
    method: Mapping[str, Any],
    ablation: Ablation,
    listener: Callable[[float], object] = lambda number: None,
) -> Pushes:
    """Differentiate the objective of each pair alone, at several snapshots of a run.

    Each pair takes one pass of the full model, and at each snapshot a forward and a backward pass
    of the circuit, which gives the gradients of all gates.

    Args:
        edges: the edges whose pushes are kept.
        num_snapshots: number of snapshots, which are spread over all but the last one.
        method: the arguments with which the run's `EverySize` was made, except for the graph.
        listener: called with the number of passes done since the last call.
    """
    learner = EverySize(model.graph, **method)
    before = len(snapshots.steps) - 1
    chosen = sorted({i * before // num_snapshots for i in range(num_snapshots)})
    steps = snapshots.steps[chosen].tolist()
    gates = [
        learner.gates_of(snapshots.scores[index].to(learner.device), step)
        for index, step in zip(chosen, steps, strict=True)
    ]
    values = torch.zeros(len(chosen), len(pairs), len(edges))
    means = torch.zeros(len(chosen), model.graph.num_edges)
    for column, pair in enumerate(pairs):
        batch = collate([pair]).to(model.device)
        reference, corrupted = model.run_pair(batch, corrupted=ablation.needs_corrupted)
        ablated = ablation.values(batch, corrupted)
        for row, own in enumerate(gates):
            inputs = StepInputs(batch, reference, ablated, own.clone().requires_grad_())
            _, grad_gates = differentiate(model, inputs, objective=objective)
            push = -grad_scores(grad_gates, own).cpu()  # [edge]
            values[row, column] = push[list(edges)]
            means[row] += push / len(pairs)
            listener(1)
    for row, step in enumerate(steps):
        weight = learning_rate_factor(step, learner.steps, 0)
        weight /= means[row].abs().mean().clamp(min=MIN_TOTAL_GRADIENT / means.shape[1]).item()
        values[row] *= weight
    return Pushes(tuple(pairs), tuple(steps), tuple(edges), values)


# ----------------------------------------------------------------------------------- verification


class Retrained(NamedTuple):
    """The ranks of an edge after training with one seed, on all pairs and on fewer."""

    edge: str
    seed: int
    with_all: int
    without_pushing: int
    without_random: int


@dataclass(frozen=True)
class Verification:
    """What training again without the pairs that pushed an edge most gave.

    All edges are compared with the same trainings on all pairs and without random pairs, one of
    each per seed, so only seeds are independent of each other.

    Attributes:
        num_pairs: number of training pairs.
        num_removed: number of pairs that were left out.
        ranks: the ranks of each edge with each seed.
    """

    num_pairs: int
    num_removed: int
    ranks: tuple[Retrained, ...]

    @property
    def falls(self) -> tuple[float, float]:
        """The factors by which ranks grow without the pushing and without random pairs, each the
        geometric mean of the trainings."""
        pushing = geometric_mean(each.without_pushing / each.with_all for each in self.ranks)
        random = geometric_mean(each.without_random / each.with_all for each in self.ranks)
        return pushing, random

    @property
    def wins(self) -> tuple[int, int]:
        """With how many seeds the edges rank lower without the pushing pairs than without random
        ones, in the geometric mean over the edges; and with how many seeds the two differ."""
        products: dict[int, tuple[int, int]] = {}  # by seed; integers, so that ties are exact
        for each in self.ranks:
            pushing, random = products.get(each.seed, (1, 1))
            products[each.seed] = pushing * each.without_pushing, random * each.without_random
        both = products.values()
        return sum(a > b for a, b in both), sum(a != b for a, b in both)

    @property
    def p(self) -> float:
        """P value of the sign test over seeds, that it does not matter which pairs are left out.

        With fewer than 6 seeds it cannot be below .05.
        """
        return sign_test(*self.wins)

    @property
    def holds(self) -> bool:
        """Whether edges clearly fall lower without the pairs that pushed them most."""
        wins, differ = self.wins
        return 2 * wins > differ and self.p <= LEVEL

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self), "ranks": [each._asdict() for each in self.ranks],
            "falls": self.falls, "wins": self.wins, "p": self.p, "holds": self.holds,
        }  # fmt: skip

    def table(self) -> Table:
        rows = [
            [each.edge, str(each.seed), *(f"{rank:,}" for rank in each[2:])] for each in self.ranks
        ]
        columns = ["", "seed", "rank", "without those\nthat pushed it", "without as\nmany random"]
        title = f"trained again without {self.num_removed:,} of {self.num_pairs:,} pairs"
        return Table(columns, rows, title)

    def in_words(self) -> str:
        """A verdict."""
        (wins, differ), (pushing, random) = self.wins, self.falls
        verdict = "holds" if self.holds else "fails"
        return (
            f"The claim that these pairs made the edges rise {verdict}: trained again without the "
            f"{self.num_removed:,} of {self.num_pairs:,} pairs that pushed an edge most, its rank "
            f"is multiplied by {pushing:.2f}, and without as many random pairs by {random:.2f} "
            f"(geometric means of {len(self.ranks)} trainings); edges rank lower in {wins} of the "
            f"{differ} seeds that differ (sign test, p = {self.p:.3f}; at most {LEVEL} would be "
            "needed, which takes at least 6 seeds)."
        )
