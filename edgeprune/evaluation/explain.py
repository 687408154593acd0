"""What is each edge of a circuit for? Each is cut alone, in the circuit and in the full model.

The predictions after a cut show what the edge carries. If they become a distractor, the edge helps
to tell the answers apart; if they become the answer of the empty circuit (under interchange
ablation, that of the corrupted prompt), it carries the answer itself. As a control, edges outside
of the circuit are cut from the full model. When each edge rose is read from a run's snapshots.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import CircuitError
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.cuts import Cut, cuts_of, flips, num_flips, without, without_nodes
from edgeprune.evaluation.pushes import Pushes, Verification
from edgeprune.evaluation.statistics import Difference, paired_bootstrap
from edgeprune.files import json_values
from edgeprune.metrics import SAME_NUMBER, ExampleMetrics, Output
from edgeprune.prompts import Pair
from edgeprune.scores import EdgeScores
from edgeprune.training.snapshots import Snapshots

NUM_CONTROLS = 20
"""Number of random edges outside of the circuit that are cut from the full model."""
NUM_CHANGES, NUM_PROMPTS = 8, 3
"""Maximum number of changes listed per cut, and of the prompts that need the edge most."""
FLIPS = {
    "full": "full\nmodel's", "distractor": "dis-\ntractor",
    "empty": "empty\ncircuit's", "corrupted": "corrupted\nprompt's", "other": "another",
}  # fmt: skip
"""What a flipped prediction has become, and the heading of its share: the full model's answer, a
distractor, the empty circuit's answer, a token of the corrupted prompt (for models that output
logits), or another one. The first that applies counts."""


@dataclass(frozen=True)
class Change:
    """A change from one prediction to another, with its share and count among a cut's flips."""

    text: str
    share: float
    count: int


@dataclass(frozen=True)
class Example:
    """A prompt that needs an edge.

    Attributes:
        prompt: its text.
        rise: how much the distance from the full model rises if the edge is cut.
        before, after: what is predicted with and without the edge.
    """

    prompt: str
    rise: float
    before: str
    after: str


@dataclass(frozen=True)
class Effect:
    """What a cut does to the circuit, or to the full model.

    Attributes:
        rise: of the mean distance from the full model (KL in nats, or the error of values).
        num_flips: number of prompts of which a prediction changes.
        num_tokens: number of predicted tokens that change; the shares below are of these.
        kinds: share of each of `FLIPS` among what they become.
        changes: the most frequent changes, such as "a → b".
        prompts: the prompts that need the part most.
    """

    rise: Difference
    num_flips: int
    num_tokens: int
    kinds: dict[str, float]
    changes: tuple[Change, ...]
    prompts: tuple[Example, ...]


@dataclass(frozen=True)
class Explained:
    """A node or an edge: what it does, and where it ranks.

    Attributes:
        kind: "node" or "edge".
        name: the node's; or writer and reader, separated by a space.
        index: number of the edge; None for a node.
        in_circuit, in_full: what cutting it does to the circuit, and to the full model.
        rank: the edge's place among all edges, from 1; None if they have no scores.
        ranks: the same at each snapshot of the run.
        since: the step from which on the edge's rank was at most the circuit's size; None if the
            last one was not.
    """

    kind: str
    name: str
    index: int | None
    in_circuit: Effect
    in_full: Effect
    rank: int | None
    ranks: tuple[int, ...]
    since: int | None

    @property
    def title(self) -> str:
        return self.name.replace(" ", " → ")


@dataclass(frozen=True)
class Explanation:
    """What the parts of a circuit do.

    Attributes:
        parts: nodes and edges, in descending order of how much a cut raises the distance.
        num_edges: size of the circuit.
        num_prompts: number of prompts on which it was cut.
        distance_name: "KL" or "error".
        distance: the circuit's mean distance from the full model.
        controls: what cutting each of some random edges outside of the circuit does to the full
            model: (rise of the distance, number of flipped prompts).
        control_edges: the numbers of these edges.
        steps: the steps of the snapshots.
        pushes: which training pairs pushed the edges, if that was measured.
        verification: what training without these pairs gave, if that was tried.
    """

    parts: tuple[Explained, ...]
    num_edges: int
    num_prompts: int
    distance_name: str
    distance: float
    controls: tuple[tuple[float, int], ...]
    control_edges: tuple[int, ...]
    steps: tuple[int, ...] = ()
    pushes: Pushes | None = None
    verification: Verification | None = None

    def of_kind(self, kind: str) -> list[Explained]:
        return [part for part in self.parts if part.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: a record per node and edge, by name."""
        fields = {
            "num_edges": self.num_edges, "num_prompts": self.num_prompts,
            "distance": self.distance_name, "circuit_distance": self.distance,
            "controls": self.controls, "steps": self.steps,
        }  # fmt: skip
        for kind in ("node", "edge"):
            fields[f"{kind}s"] = {part.name: self._record(part) for part in self.of_kind(kind)}
        if self.pushes is not None:
            fields["pushes"] = self.pushes.to_dict(self.control_edges)
        if self.verification is not None:
            fields["verification"] = self.verification.to_dict()
        return json_values(fields)

    def _record(self, part: Explained) -> dict[str, Any]:
        record = asdict(part)
        for name in ("in_circuit", "in_full"):
            record[name]["rise"] = getattr(part, name).rise._asdict()
        del record["kind"], record["name"], record["index"]
        if part.kind == "node":
            del record["rank"], record["ranks"], record["since"]
        elif self.pushes is not None:
            record["pushed"] = self.pushes.of_edge(part.index)._asdict()
        return record


def explain(
    model: CircuitModel,
    circuit: Circuit,
    pairs: Sequence[Pair],
    *,
    scores: EdgeScores | None = None,
    snapshots: Snapshots | None = None,
    ablation: Ablation | str = "interchange",
    max_edges: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    listener: Callable[[float], object] | None = None,
) -> Explanation:
    """Cut each node and edge of a circuit alone, in the circuit and in the full model.

    Args:
        pairs: prompts, which should not be those that the circuit was found on.
        scores: ranks the edges.
        snapshots: scores over a run, `Run.open(path).snapshots()`, which show when edges rose.
        ablation: what a cut edge carries, see `evaluate`.
        max_edges: number of edges, and of nodes, to cut, the highest-ranked first, without scores
            in the order of the graph; None: all that lie on a path.
        seed: of the random edges outside of the circuit.
        listener: called with the number of circuits measured since the last call, a fraction.

    Raises CircuitError if no edge lies on a path from the input to the output, and ValueError as
    `evaluate` does.
    """
    graph = model.graph
    Circuit.check(circuit, graph)
    ranking = list(range(graph.num_edges)) if scores is None else scores.ranking().tolist()
    cuts = cuts_to_explain(circuit, ranking, max_edges)
    if not cuts:
        raise CircuitError(
            f"none of the circuit's {len(circuit):,} edges lies on a path from the input to the "
            "output, so there is nothing to explain; choose a larger circuit"
        )
    bench = Bench(model, pairs, ablation, batch_size, listener)
    outside = [index for index, edge in enumerate(graph.edges) if edge not in circuit.edge_set]
    controls = random.Random(seed).sample(outside, min(NUM_CONTROLS, len(outside)))
    (own,) = bench.measure([circuit])
    in_circuit = bench.measure(without(circuit, cut.edges) for cut in cuts)
    in_full = bench.measure(
        without_nodes(bench.whole, [cut.name]) if cut.kind == "node"
        else without(bench.whole, cut.edges) for cut in cuts
    )  # fmt: skip
    of_controls = bench.measure(without(bench.whole, [edge]) for edge in controls)
    rank_of = {} if scores is None else {edge: rank for rank, edge in enumerate(ranking, 1)}
    steps, ranks_of = _rises(snapshots, [cut.edges[0] for cut in cuts if cut.kind == "edge"])
    parts = []
    for cut, a, b in zip(cuts, in_circuit, in_full, strict=True):
        edge = cut.edges[0] if cut.kind == "edge" else None
        ranks = ranks_of.get(edge, ())
        parts.append(Explained(
            cut.kind, cut.name, edge, _effect(bench, own, a), _effect(bench, bench.full, b),
            rank_of.get(edge), ranks, _since(steps, ranks, len(circuit)),
        ))  # fmt: skip
    parts.sort(key=lambda part: -part.in_circuit.rise.mean)
    return Explanation(
        tuple(parts), len(circuit), len(bench), bench.distance_name,
        max(bench.distance(own).mean().item(), 0.0),
        tuple((bench.distance(each).mean().item(), num_flips(bench.full, each))
              for each in of_controls),
        tuple(controls), steps,
    )  # fmt: skip


def cuts_to_explain(
    circuit: Circuit, ranking: Sequence[int], max_edges: int | None = None
) -> list[Cut]:
    """The highest-ranked nodes, and as many of the edges; None: all."""
    cuts = cuts_of(circuit, ranking)
    nodes, edges = ([cut for cut in cuts if cut.kind == kind] for kind in ("node", "edge"))
    return nodes[:max_edges] + edges[:max_edges]


def num_circuits(circuit: Circuit, max_edges: int | None = None) -> int:
    """Number of circuits that `explain` measures, at most."""
    cuts = cuts_to_explain(circuit, range(circuit.graph.num_edges), max_edges)
    return 1 + 2 * len(cuts) + NUM_CONTROLS


def _rises(
    snapshots: Snapshots | None, edges: Sequence[int]
) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
    """The steps of the snapshots, if there are any, and the ranks of each edge at them."""
    if snapshots is None or not len(snapshots.steps):
        return (), {}
    ranks = map(tuple, snapshots.ranks(edges).T.tolist())
    return tuple(snapshots.steps.tolist()), dict(zip(edges, ranks, strict=True))


def _since(steps: Sequence[int], ranks: Sequence[int], size: int) -> int | None:
    """The step from which on all ranks are within a size; None if the last one is not."""
    since = None
    for step, rank in zip(steps, ranks, strict=False):  # nodes have no ranks
        if rank > size:
            since = None
        elif since is None:
            since = step
    return since


# ---------------------------------------------------------------------------------------- effects


def _effect(bench: Bench, before: ExampleMetrics, after: ExampleMetrics) -> Effect:
    """What a cut did, given the examples before and after it."""
    distances = bench.distance(after).clamp(min=0), bench.distance(before).clamp(min=0)
    rises = distances[0] - distances[1]  # [example]
    changed = flips(before, after)
    changes, kinds = Counter(), Counter()
    for index, flags in enumerate(changed):
        for place in flags.nonzero()[:, 0].tolist():
            old, new = (each.predicted[index][place].item() for each in (before, after))
            changes[" → ".join(bench.model.text_of([token]) for token in (old, new))] += 1
            kinds[_kind(bench, index, place, new)] += 1
    total = sum(kinds.values())
    worst = rises.argsort(descending=True)[:NUM_PROMPTS].tolist()
    return Effect(
        paired_bootstrap(*distances), num_flips(before, after), total,
        {kind: kinds[kind] / total for kind in FLIPS if kinds[kind]},
        tuple(Change(text, n / total, n) for text, n in changes.most_common(NUM_CHANGES)),
        tuple(_example(bench, i, rises[i].item(), before, after) for i in worst if rises[i] > 0),
    )  # fmt: skip


def _kind(bench: Bench, index: int, place: int, token: float) -> str:
    """Which of `FLIPS` a flipped prediction has become."""
    pair = bench.pairs[index]
    if abs(token - bench.full.predicted[index][place].item()) <= SAME_NUMBER:
        return "full"
    if place == pair.contrast and token in pair.distractor_ids:
        return "distractor"
    empty = bench.empty.predicted[index][place].item()
    if abs(token - empty) <= SAME_NUMBER:
        return "empty"
    is_token = bench.model.output is Output.logits
    return "corrupted" if is_token and token in pair.corrupted_ids else "other"


def _example(
    bench: Bench, index: int, rise: float, before: ExampleMetrics, after: ExampleMetrics
) -> Example:
    texts = (bench.model.text_of(each.predicted[index].tolist()) for each in (before, after))
    return Example(bench.pairs[index].text, rise, *texts)
