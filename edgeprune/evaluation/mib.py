"""The areas by which the Mechanistic Interpretability Benchmark ranks methods.

Mueller et al. 2025 (arXiv:2504.13151). For shares p of the N edges, from .1 % to all, the
floor(p N) highest-ranked are kept, without edges from nodes that none enters or into nodes that
none leaves. (The benchmark's code removes these in one pass, so some edges that then dangle are
counted; they have no effect.) With m the mean logit difference between answer and distractor, the
faithfulness is

    f(p) = (m(p) - m(empty circuit)) / (m(full model) - m(empty circuit))

CPR is the area under f over p, so a circuit that overshoots the full model raises it; CMD is the
area under |1 - f|. Both are trapezoids over the nominal shares, on a linear axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

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


def _area(values: Sequence[float]) -> float:
    """The area under a line through values at the shares."""
    points = pairwise(zip(SHARES, values, strict=True))
    return sum((right - left) * (a + b) / 2 for (left, a), (right, b) in points)


def mib_circuits(scores: EdgeScores) -> list[Circuit]:
    """A circuit per share of the edges."""
    total = scores.graph.num_edges
    return [_without_dead_ends(scores.circuit(num_edges=int(share * total))) for share in SHARES]


def _without_dead_ends(circuit: Circuit) -> Circuit:
    """Drop edges from nodes that none enters and into nodes that none leaves, in one pass."""
    graph = circuit.graph
    fed = {reader: graph.nodes_fed_by(reader) or ["output"] for reader in graph.readers}
    entered = {node for _, reader in circuit.edge_set for node in fed[reader]}
    entered |= {*graph.embedding_writers}
    left = {writer for writer, _ in circuit.edge_set} | {"output"}
    return Circuit(graph, frozenset(
        (writer, reader) for writer, reader in circuit.edge_set
        if writer in entered and not left.isdisjoint(fed[reader])
    ))  # fmt: skip


def mib_areas(
    model: CircuitModel,
    scores: EdgeScores,
    pairs: Sequence[Pair],
    *,
    ablation: Ablation | str = "interchange",
    batch_size: int = 64,
    listener: Callable[[int], object] | None = None,
) -> Areas:
    """Measure the areas of one ranking; arguments and errors as for `measure_curve`.

    Raises DataError if a prompt has no distractor, or the full model does no better than the empty
    circuit.
    """
    model.check_prompts(pairs)
    if not all(pair.distractor_ids for pair in pairs):
        raise DataError('MIB\'s areas need a "distractor" on every line of the prompts')
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    circuits = mib_circuits(scores)
    measured = measure_circuits(
        model, [Circuit(model.graph, frozenset()), *circuits],
        list(iterate_batches(pairs, batch_size)), ablation, listener,
    )  # fmt: skip
    full, empty, *means = (each.logit_difference.double().mean().item() for each in measured)
    if full == empty:
        raise DataError("the full model's logit difference is the empty circuit's, so none is kept")
    faithfulness = tuple((mean - empty) / (full - empty) for mean in means)
    return Areas(tuple(map(len, circuits)), faithfulness)


def mib_table(areas: Mapping[str, Areas], title: str) -> Table:
    """A row per share, with the edges kept and the faithfulness of each ranking; then the areas."""
    parts = ("edges", "faith-\nfulness")
    columns = ["share of edges", *(f"{name}:\n{part}" for name in areas for part in parts)]
    rows = []
    for index, share in enumerate(SHARES):
        cells = [
            (f"{a.num_edges[index]:,}", f"{a.faithfulness[index]:.3f}") for a in areas.values()
        ]
        rows.append([f"{share:.1%}", *chain(*cells)])
    rows.append(["CPR (higher is better)", *chain(*(("", f"{a.cpr:.3f}") for a in areas.values()))])
    rows.append(["CMD (lower is better)", *chain(*(("", f"{a.cmd:.3f}") for a in areas.values()))])
    return Table(columns, rows, title)
