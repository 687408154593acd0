"""What many runs say together: frontiers of size against faithfulness, and stability over seeds.

Runs of one model on one task under one ablation are a group. In it, runs whose settings differ only
in seed and in how sparse they are asked to be are a series, one curve; and those of a series that
are asked for the same size are a point, whose spread is that over seeds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.config import CUSTOM, FREE_TO_CHANGE, KNOWN_BY_DIGEST, model_title, task_title
from edgeprune.evaluation.compare import Overlap, consensus, times_kept
from edgeprune.graph import Edge

SIZE = ("sparsity", "num_edges", "trainer.target_sparsity")
"""Settings that say how sparse a circuit shall be."""
IGNORED = (*SIZE, "seed", "trainer.micro_batch_size", "trainer.recompute",
           *(name for name in FREE_TO_CHANGE if name != "model.name"))  # fmt: skip
"""Settings which do not make another series."""
SPLITS = ("test", "validation", "train")
"""Whose evaluation is preferred."""
DISTANCES = ("kl", "error")
"""From the full model: of logits, and of values."""
SHARES = ("exact_match", "accuracy")
SHOWN_OF_DISTRACTORS = ("two_way_accuracy", "logit_difference")
"""Of the scores that are of examples with distractors alone, those that a report shows."""
METRICS = (*DISTANCES, *SHARES, *SHOWN_OF_DISTRACTORS)
"""What a frontier says."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: its directory, for people.
        settings: its config.yaml, flattened: 'trainer.steps' -> 600.
        circuit: its edges.json.
        evaluations: by split, as evaluation-<split>.json has them.
        digests: of its `data` and `model`, by which they are known wherever they lie.
    """

    name: str
    settings: Mapping[str, Any]
    circuit: Circuit
    evaluations: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]

    @property
    def size(self) -> tuple:
        """What was asked for."""
        return tuple(self.settings.get(key) for key in SIZE)

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of a number over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where there are no values."""
        known = [value for value in values if value is not None]
        return cls(sum(known) / len(known), min(known), max(known)) if known else None


@dataclass(frozen=True)
class Stability:
    """How alike the circuits of several seeds are.

    Attributes:
        edge_iou, node_iou: over every two circuits.
        pairs: (run, run, overlap) of every two.
        times_kept: for each edge that any keeps, how many keep it.
        consensus: the edges that more than half keep.
    """

    edge_iou: Spread
    node_iou: Spread
    pairs: tuple[tuple[str, str, Overlap], ...]
    times_kept: Mapping[Edge, int]
    consensus: Circuit

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Stability:
        pairs = tuple(
            (a.name, b.name, Overlap.of(a.circuit, b.circuit)) for a, b in combinations(runs, 2)
        )
        circuits = [run.circuit for run in runs]
        return cls(
            edge_iou=Spread.of(overlap.edge_iou for *_, overlap in pairs),
            node_iou=Spread.of(overlap.node_iou for *_, overlap in pairs),
            pairs=pairs,
            times_kept=times_kept(circuits),
            consensus=consensus(circuits),
        )


@dataclass(frozen=True)
class Point:
    """Runs of a series that were asked for one size.

    Attributes:
        runs: by seed.
        split: whose evaluations are shown.
        asked: the size asked for, in words.
    """

    runs: tuple[Run, ...]
    split: str | None
    asked: str

    @property
    def num_edges(self) -> Spread:
        return Spread.of(len(run.circuit) for run in self.runs)

    @property
    def num_evaluated(self) -> int:
        """Runs with an evaluation on the split."""
        return sum(self.split in run.evaluations for run in self.runs)

    def spread(self, metric: str) -> Spread | None:
        """Of a metric of the evaluated runs' circuits; None where there are none."""
        return Spread.of(score(run, self.split, "circuit", metric) for run in self.runs)

    @cached_property
    def stability(self) -> Stability | None:
        """None for a single run."""
        return Stability.of(self.runs) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Series:
    """A curve: points by size, largest circuit first, and what sets the series apart."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Group:
    """Runs that can be shown in one plot.

    Attributes:
        task, model, ablation: their names; one's own data and models go by their files' names.
        num_edges: of the whole graph.
        split: whose evaluations are shown, if there are any; None: no run has been evaluated.
        series: curves.
    """

    task: str
    model: str
    ablation: str
    num_edges: int
    split: str | None
    series: tuple[Series, ...]

    @property
    def title(self) -> str:
        return f"{self.task} in {self.model}, {self.ablation} ablation"

    @property
    def runs(self) -> list[Run]:
        return [run for series in self.series for point in series.points for run in point.runs]

    @property
    def evaluated(self) -> bool:
        """Whether any run has been, on the split."""
        return any(self.split in run.evaluations for run in self.runs)

    @property
    def prompts(self) -> str:
        """Whose evaluations are shown, in words, and whether they are of training prompts."""
        if not self.evaluated:
            return "not evaluated" + (f" on {self.split} prompts" if self.split else "")
        shown = [run.evaluations.get(self.split, {}) for run in self.runs]
        among = any(evaluation.get("training_prompts") for evaluation in shown)
        return f"{self.split} prompts" + (", training prompts among them" if among else "")

    @property
    def distance(self) -> str:
        """Which of `DISTANCES` its outputs have."""
        return "kl" if self.reference("circuit", "error") is None else "error"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `METRICS` that its tables show: of distractors only what any run has."""
        others = [
            name for name in SHOWN_OF_DISTRACTORS if self.reference("circuit", name) is not None
        ]
        return (self.distance, *SHARES, *others)

    def reference(self, of: str, metric: str) -> float | None:
        """A metric of the `circuit`, `full` or `corrupted` model, averaged over the runs."""
        found = Spread.of(score(run, self.split, of, metric) for run in self.runs)
        return None if found is None else found.mean


def score(run: Run, split: str | None, of: str, metric: str) -> float | None:
    """A metric of a run's `circuit`, `full` or `corrupted` model; None where it has none."""
    scores = run.evaluations.get(split or "", {}).get(of, {})
    value = scores.get(metric) if isinstance(scores, Mapping) else None
    return value if isinstance(value, (int, float)) else None


def group_runs(runs: Sequence[Run], split: str | None = None) -> list[Group]:
    """Sort runs into groups, series and points.

    Args:
        runs: all of them.
        split: whose evaluations are shown; None: in each group that which most runs have.
    """
    runs = _in_one_place(runs)
    groups = defaultdict(list)
    tasks, models = _titles(runs, "task", task_title), _titles(runs, "model", model_title)
    for run, task, model in zip(runs, tasks, models, strict=True):
        ablation = run.settings.get("ablation.kind", "")
        groups[(task, model, ablation, run.circuit.graph)].append(run)
    return [
        Group(*key[:3], key[3].num_edges, shown := split or _split(members),
              _series(members, shown))
        for key, members in sorted(groups.items(), key=lambda item: str(item[0]))
    ]  # fmt: skip


def _in_one_place(runs: Sequence[Run]) -> list[Run]:
    """The runs, as if the same model or data had always lain where the first of them has it.

    What was changed in its place since has the beginning of its digest added.
    """
    places, digests, moved = {}, defaultdict(list), []
    for run in runs:
        settings = dict(run.settings)
        held_in = (settings.get("model.dtype"), settings.get("model.bits"))  # other digests
        for key, part in KNOWN_BY_DIGEST.items():
            digest = run.digests[part]
            if settings.get(key):
                place = places.setdefault((key, digest), settings[key])
                known = digests[key, place, held_in]
                if digest not in known:
                    known.append(digest)
                settings[key] = place if digest == known[0] else f"{place} ({digest[:8]})"
        moved.append(replace(run, settings=settings))
    return moved


def _titles(runs: Sequence[Run], part: str, title: Callable[[str, str | None], str]) -> list[str]:
    """What each run's `task` or `model` is called: where two of one's own share a title, its path.

    Args:
        runs: all of them.
        part: `task` or `model`.
        title: of a name and a path.
    """
    given = [
        (run.settings.get(f"{part}.name", ""), run.settings.get(f"{part}.path")) for run in runs
    ]
    paths = defaultdict(set)
    for name, path in given:
        paths[title(name, path)].add(path)
    return [
        str(path) if path and name == CUSTOM and len(paths[title(name, path)]) > 1
        else title(name, path)
        for name, path in given
    ]  # fmt: skip


def _split(runs: Sequence[Run]) -> str | None:
    """The split that most runs were evaluated on, `test` before `validation`."""
    counts = Counter(split for run in runs for split in run.evaluations)
    return max(SPLITS, key=lambda split: counts[split]) if counts else None


def _series(runs: Sequence[Run], split: str | None) -> tuple[Series, ...]:
    """Runs by the settings in which they differ, apart from size and seed."""
    keys = sorted({key for run in runs for key in run.settings if not _ignored(key)})
    differing = [k for k in keys if len({str(run.settings.get(k)) for run in runs}) > 1]
    members = defaultdict(lambda: defaultdict(list))
    for run in runs:
        name = ", ".join(f"{key}={run.settings.get(key)}" for key in differing)
        members[name][run.size].append(run)
    return tuple(
        Series(
            name,
            tuple(
                sorted(
                    (
                        Point(tuple(sorted(some, key=_by_seed)), split, _asked(size, by_size))
                        for size, some in by_size.items()
                    ),
                    key=lambda point: -point.num_edges.mean,
                )
            ),
        )
        for name, by_size in sorted(members.items())
    )


def _asked(size: tuple, sizes: Iterable[tuple]) -> str:
    """A size in words; its target sparsity only where no other setting tells it from the others."""
    named = zip((key.split(".")[-1] for key in SIZE), size, strict=True)
    given = {key: value for key, value in named if value is not None}
    if len(given) > 1 and sum(other[:-1] == size[:-1] for other in sizes) == 1:
        del given["target_sparsity"]
    return ", ".join(f"{key} {value}" for key, value in given.items()) or "by threshold"


def _by_seed(run: Run) -> tuple:
    return (run.seed if isinstance(run.seed, int) else 0, run.name)


def _ignored(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in IGNORED)
