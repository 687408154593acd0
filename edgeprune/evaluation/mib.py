"""The areas by which the Mechanistic Interpretability Benchmark ranks methods.

Mueller et al. 2025 (arXiv:2504.13151). For shares p of the N edges, from .1 % to all, the
floor(p N) highest-ranked are kept, except for edges from nodes without inputs and into nodes
without outputs. (The benchmark's code removes these in one pass, so edges that dangle only
afterwards still count; they have no effect.) With m the mean logit difference between answer and
distractor, the faithfulness is

    f(p) = (m(p) - m(empty circuit)) / (m(full model) - m(empty circuit))

CPR is the area under f over p, so a circuit that overshoots the full model raises it; CMD is the
area under |1 - f|. Both are trapezoids over the nominal shares, on a linear axis.

Where the true circuit is known, the ranking is compared with it, see `Recovery`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import DataError
from edgeprune.evaluation.evaluate import measure_circuits
from edgeprune.evaluation.table import Table
from edgeprune.prompts import Pair, iterate_batches
from edgeprune.scores import EdgeScores

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of the edges that are kept."""


@dataclass(frozen=True)
class Areas:
    """What the benchmark measures of one ranking.

    Attributes:
        num_edges: per share, the number of edges that are kept.
        faithfulness: per share, the fraction of the logit difference that is recovered.
        cpr: area under the faithfulness; higher is better.
        cmd: area between the faithfulness and 1; lower is better.
    """

    num_edges: tuple[int, ...]
    faithfulness: tuple[float, ...]

    @property
    def cpr(self) -> float:
        return _area(self.faithfulness)

    @property
    def cmd(self) -> float:
        return _area([abs(1 - value) for value in self.faithfulness])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        lists = {"num_edges": list(self.num_edges), "faithfulness": list(self.faithfulness)}
        return {"shares": list(SHARES), **lists, "cpr": self.cpr, "cmd": self.cmd}


@dataclass(frozen=True)
class Recovery:
    """How well a ranking separates the edges of the true circuit from the others.

    Attributes:
        auroc: area under the ROC curve: the probability that a true edge is ranked above one that
            is not; ties count half.
        interpbench: the benchmark's estimate of this area. Its circuits have `SHARES` of the edges,
            are grown from the output (`EdgeScores.greedy`) and have no dead ends. The estimate is
            the area under their true positive rates over their false positive rates, which are
            divided by the last circuit's, by trapezoids from the first circuit to the last. It is
            too low if the first circuit has false positives.
    """

    auroc: float
    interpbench: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"auroc": self.auroc, "interpbench_auroc": self.interpbench}


def _area(values: Sequence[float], at: Sequence[float] = SHARES) -> float:
    """The area under a line through values."""
    points = pairwise(zip(at, values, strict=True))
    return sum((right - left) * (a + b) / 2 for (left, a), (right, b) in points)


def mib_circuits(scores: EdgeScores) -> list[Circuit]:
    """A circuit per share of the edges."""
    total = scores.graph.num_edges
    return [_without_dead_ends(scores.circuit(num_edges=int(share * total))) for share in SHARES]


def _without_dead_ends(circuit: Circuit) -> Circuit:
    """Drop the edges from nodes without inputs and into nodes without outputs, in one pass."""
    graph = circuit.graph
    fed = {reader: graph.nodes_fed_by(reader) or ["output"] for reader in graph.readers}
    entered = {node for _, reader in circuit.edge_set for node in fed[reader]}
    entered |= {*graph.embedding_writers}
    left = {writer for writer, _ in circuit.edge_set} | {"output"}
    return Circuit(graph, frozenset(
        (writer, reader) for writer, reader in circuit.edge_set
        if writer in entered and not left.isdisjoint(fed[reader])
    ))  # fmt: skip


def recovery(scores: EdgeScores, truth: Circuit) -> Recovery:
    """Compare a ranking with the edges of the true circuit.

    Raises DataError if all edges are true, or none is.
    """
    total = scores.graph.num_edges
    is_true = torch.tensor(truth.mask(), dtype=torch.bool)
    if len(truth) in (0, total):
        raise DataError(f"the true circuit has {len(truth):,} of {total:,} edges, so no ranking")
    importance = scores.importance()
    others, ours = importance[~is_true].sort().values, importance[is_true]
    below = sum(torch.searchsorted(others, ours, right=right) for right in (False, True)) / 2
    greedy, rates = scores.greedy(), []
    for share in SHARES:
        found = _without_dead_ends(greedy.circuit(num_edges=math.ceil(share * total)))
        hits = len(found.edge_set & truth.edge_set)
        rates.append((hits / len(truth), (len(found) - hits) / (total - len(truth))))
    true_rates, false_rates = zip(*rates, strict=True)
    last = false_rates[-1]
    return Recovery(
        (below / len(others)).mean().item(),
        _area(true_rates, [rate / last for rate in false_rates]) if last else 0.0,
    )


def mib_areas(
    model: CircuitModel,
    scores: EdgeScores,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 64,
    listener: Callable[[int], object] | None = None,
) -> Areas:
    """Measure the areas of one ranking, under interchange ablation.

    Arguments and errors as for `measure_curve`.

    Raises DataError if a prompt has no distractor, or if the full model's mean logit difference
    equals the empty circuit's.
    """
    model.check_prompts(pairs)
    if not all(pair.distractor_ids for pair in pairs):
        raise DataError('MIB\'s areas need a "distractor" on every line of the prompts')
    ablation = Ablation(model, "interchange", pairs)
    circuits = mib_circuits(scores)
    measured = measure_circuits(
        model, [Circuit(model.graph, frozenset()), *circuits],
        list(iterate_batches(pairs, batch_size)), ablation, listener,
    )  # fmt: skip
    full, empty, *means = (each.logit_difference.double().mean().item() for each in measured)
    if full == empty:
        raise DataError(
            "the full model's mean logit difference equals the empty circuit's, so no faithfulness "
            "is defined; give prompts on which they differ"
        )
    faithfulness = tuple((mean - empty) / (full - empty) for mean in means)
    return Areas(tuple(map(len, circuits)), faithfulness)


def mib_table(areas: Mapping[str, Areas], recovered: Mapping[str, Recovery], title: str) -> Table:
    """A row per share, with the edges kept and the faithfulness of each ranking; then the areas."""
    parts = ("edges", "faith-\nfulness")
    names = [*areas] or [*recovered]
    columns = ["share of edges", *(f"{name}:\n{part}" for name in names for part in parts)]
    rows = []
    for index, share in enumerate(SHARES if areas else ()):
        cells = [
            (f"{a.num_edges[index]:,}", f"{a.faithfulness[index]:.3f}") for a in areas.values()
        ]
        rows.append([f"{share:.1%}", *chain(*cells)])
    summaries = {
        "CPR (higher is better)": [a.cpr for a in areas.values()],
        "CMD (lower is better)": [a.cmd for a in areas.values()],
        "AUROC of the true edges": [r.auroc for r in recovered.values()],
        "the same, as in InterpBench": [r.interpbench for r in recovered.values()],
    }
    for name, values in summaries.items():
        if values:
            rows.append([name, *chain(*(("", f"{value:.3f}") for value in values))])
    return Table(columns, rows, title)
