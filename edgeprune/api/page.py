"""The page: look into the circuits of one or several runs at every size."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.api.choose import RULES, Pruned
from edgeprune.api.export import Measuring
from edgeprune.api.shared import check_output, labels_of, optional
from edgeprune.circuit import Circuit
from edgeprune.config import MAX_EVALUATION_BATCH, SPLITS, PageConfig, chosen_by
from edgeprune.drawing.page import data_of_page, in_frame, render
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import CircuitError, ConfigError, DataError
from edgeprune.evaluation import page_data
from edgeprune.evaluation.curve import Curve
from edgeprune.evaluation.token_tables import tokens_data
from edgeprune.files import file_digest, read_if_intact, write_text
from edgeprune.graph import CircuitGraph
from edgeprune.prompts import Pair, PairDataset
from edgeprune.runs import layout
from edgeprune.runs.data import kind_of_prompts, load_pairs
from edgeprune.runs.run import Run
from edgeprune.runs.source import head_labels
from edgeprune.scores import EdgeScores
from edgeprune.training.progress import progress as progress_bar

LIMITS = (
    ("max_kl", 1.0, "KL ≤ 1"),
    ("max_kl", 0.1, "KL ≤ 0.1"),
    ("max_kl", 0.01, "KL ≤ 0.01"),
    ("min_exact_match", 0.9, "exact match ≥ 0.9"),
    ("min_exact_match", 0.99, "exact match ≥ 0.99"),
    ("max_share_lost", 0.05, "≤ 5 % of the empty circuit's distance"),
)
"""The rules whose choices the page marks: name, limit, text."""


DEFAULTS = {
    "max_edges": page_data.MAX_EDGES, "num_prompts": page_data.NUM_PROMPTS, "num_cuts": None,
}  # fmt: skip
"""What is measured unless something else is asked for."""


NOTHING_MEASURED = {**DEFAULTS, "num_prompts": 0}


@dataclass(frozen=True)
class Page:
    """A page of circuits, which a notebook shows.

    Attributes:
        html: the whole file.
    """

    html: str = field(repr=False)

    def save(self, path: Path | str) -> None:
        """Write the page into a file."""
        write_text(Path(path), self.html)

    def _repr_html_(self) -> str:
        return in_frame(self.html)


def page(
    *shown: Run | Pruned | EdgeScores | Circuit | Path | str,
    model: CircuitModel | None = None,
    pairs: Sequence[Pair] | None = None,
    title: str | None = None,
    edges: int = page_data.MAX_EDGES,
    prompts: int = page_data.NUM_PROMPTS,
    cuts: int | None = None,
) -> Page:
    """Make a page to look into circuits at every size. In a notebook, the result shows itself.

    Args:
        shown: results of `prune`, scores, circuits, or run directories; several are compared.
        model, pairs: with both, the page also shows answers on prompts, attention, and what cuts
            change, for results of `prune`. For run directories these are measured as `edgeprune
            page` does.
        title: shown above; None: task and model of the runs.
        edges: number of edges that the page carries, the strongest of each.
        prompts: number of prompts, half of them typical and half the least faithful.
        cuts: maximum number of nodes and edges that are cut one at a time; None: as many as take
            about a minute.

    Raises ConfigError if nothing is given; CircuitError if graphs differ.
    """
    options = {"max_edges": edges, "num_prompts": prompts, "num_cuts": cuts}
    parts = [
        _of_run(Run.open(one) if isinstance(one, (Path, str)) else one, options)
        if isinstance(one, (Run, Path, str))
        else _of_result(one, model, pairs, options)
        for one in shown
    ]
    names = [data["name"] for _, data in parts]
    for number, (name, (_, data)) in enumerate(zip(names, parts, strict=True), 1):
        data["name"] = f"{name} {number}" if names.count(name) > 1 else name
    titles = dict.fromkeys(data["title"] for _, data in parts if data["title"])
    return _page(parts, title or ", ".join(titles) or "edgeprune")


def write_page(config: PageConfig) -> Path:
    """Write the page of the runs that settings name; returns its path."""
    runs = [Run.open(path) for path in config.runs]
    if not runs:
        raise ConfigError("got no run; usage: edgeprune page RUN [RUN ...]")
    path = Path(config.output or (runs[0].path / layout.PAGE if len(runs) == 1 else layout.PAGE))
    if config.output or len(runs) > 1:
        check_output(path, [run.data_path for run in runs])
    options = {"max_edges": config.edges, "num_prompts": config.prompts, "num_cuts": config.cuts}
    title = ", ".join(dict.fromkeys(run.config.title for run in runs))
    page_of_runs(runs, title, options).save(path)
    return path


def page_of_runs(runs: Sequence[Run], title: str, options: Mapping[str, Any] | None = None) -> Page:
    """Make a page of runs; by default with scores and curves only, which needs no model."""
    for run in runs[1:]:
        _check_graph(run.graph, runs[0].graph)
    parts = [_of_run(run, options or NOTHING_MEASURED) for run in runs]
    for label, (_, data) in zip(labels_of([run.path for run in runs]), parts, strict=True):
        data["name"] = label
    return _page(parts, title)


def write_run_page(run: Run, model: CircuitModel | None, ablation: Ablation) -> None:
    """Write the page of a run that has just ended; `model` None: without measurements."""
    path = run.path / layout.PAGE
    with optional(path):
        if model is None:
            part = _of_run(run, NOTHING_MEASURED)
        else:
            part = _of_run(run, DEFAULTS, loaded=(model, ablation))
        _page([part], run.config.title).save(path)


Part = tuple[CircuitGraph, dict[str, Any]]
"""A graph, and what the page shows of one run in it."""


def _page(parts: Sequence[Part], title: str) -> Page:
    if not parts:
        raise ConfigError("got nothing to show; give run directories, scores or circuits")
    graph = parts[0][0]
    for other, _ in parts[1:]:
        _check_graph(other, graph)
    data = {
        "format": page_data.FORMAT,
        "title": title,
        "graph": page_data.graph_data(graph),
        "runs": [data for _, data in parts],
    }
    return Page(render(data))


def _check_graph(graph: CircuitGraph, first: CircuitGraph) -> None:
    if graph != first:
        raise CircuitError(
            f"circuits of different graphs cannot be shown on one page: {first} and {graph}; "
            "write a page for each"
        )


def _of_result(
    shown: Pruned | EdgeScores | Circuit, model: CircuitModel | None,
    pairs: Sequence[Pair] | None, options: Mapping[str, Any],
) -> Part:  # fmt: skip
    """The part of what was made in Python."""
    data: dict[str, Any] = {"name": "circuit", "title": "", "curve": None, "measured": None}
    if isinstance(shown, Circuit):
        return shown.graph, {**data, **page_data.circuit_data(shown)}
    max_edges = options["max_edges"]
    if isinstance(shown, EdgeScores):
        name = str(shown.origin.get("method", "scores"))
        return shown.graph, {
            **data,
            "name": name,
            **page_data.scores_data(shown, None, None, max_edges),
        }
    if not isinstance(shown, Pruned):
        raise TypeError(
            f"got a {type(shown).__name__}, expected a run directory, what `prune` returns, "
            "EdgeScores or a Circuit"
        )
    how = shown.origin.get("chosen_by")
    data |= page_data.scores_data(shown.scores, shown.circuit, how, max_edges)
    data["curve"] = page_data.curve_data(shown.curve, _rules(shown.curve))
    if model is not None and pairs is not None and options["num_prompts"]:
        data["measured"] = _measure(
            model, shown.scores, shown.circuit, pairs, shown.ablation, shown.curve,
            MAX_EVALUATION_BATCH, options,
        )  # fmt: skip
    return shown.circuit.graph, data


def _of_run(
    run: Run, options: Mapping[str, Any],
    loaded: tuple[CircuitModel, Ablation] | None = None,
) -> Part:  # fmt: skip
    """The part of a run: of its files, and of its page if that was measured in the same way.

    `loaded` are the model and the ablation, where they are loaded already.
    """
    scores, chosen = run.scores(), run.circuit()
    circuit, curve = chosen.circuit, run.curve()
    data = {
        "name": run.path.resolve().name,
        "title": run.config.title,
        "about": f"{run.config.variant}, {run.config.ablation.kind} ablation",
        "labels": {head: ", ".join(kinds) for head, kinds in head_labels(run.path).items()},
        "curve": None if curve is None else page_data.curve_data(curve, _rules(curve)),
    }
    data |= page_data.scores_data(
        scores, circuit, chosen.origin.get("chosen_by"), options["max_edges"]
    )
    data["rose"] = page_data.rise_data(scores, run.snapshots())
    data["explained"] = _found(run, circuit, layout.EXPLANATION, page_data.explained_data)
    key = {
        "edges": circuit.digest(), "data": run.digests["data"], "model": run.digests["model"],
        "scores": _digest(run.path / layout.SCORES), "curve": _digest(run.path / layout.CURVE),
        "options": dict(options),
    }  # fmt: skip
    found = _known(run.path / layout.PAGE, key)
    if found is None and options["num_prompts"]:
        if loaded is None:
            own = Measuring.of(run)
            loaded = own.model, own.ablation
        model, ablation = loaded
        pairs, kind = _pairs(run, model)
        found = _measure(
            model, scores, circuit, pairs, ablation, curve, run.config.evaluation_batch_size,
            options,
        )  # fmt: skip
        found["split"] = kind
    data["tokens"] = _found(run, circuit, layout.TOKENS, tokens_data)
    return run.graph, {**data, "measured": found, "key": key}


def _found(
    run: Run, circuit: Circuit, name: str, to_data: Callable[[dict], dict[str, Any]]
) -> dict[str, Any] | None:
    """What `edgeprune explain` or `tokens` has found about the run's circuit, if anything."""
    path, digest = run.path / name, circuit.digest()
    return read_if_intact(
        path, lambda record: to_data(record) if record.get("edges_sha256") == digest else None,
        f"run edgeprune {path.stem} again",
    )  # fmt: skip


def _measure(
    model: CircuitModel, scores: EdgeScores, circuit: Circuit, pairs: Sequence[Pair],
    ablation: Ablation, curve: Curve | None, batch_size: int, options: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """`measured_data` with a progress bar."""
    with progress_bar(100, "measuring for the page: percent") as show:
        return page_data.measured_data(
            model, scores, circuit, pairs, ablation=ablation, curve=curve, batch_size=batch_size,
            listener=lambda done, total: show(100 * done // total), **options,
        )  # fmt: skip


def _pairs(run: Run, model: CircuitModel) -> tuple[PairDataset, str]:
    """The run's test prompts, or if there are none its others; and what they are."""
    problems = []
    for split in reversed(SPLITS):
        try:
            pairs = load_pairs(run.data_path, run.config.task, model, split)
            return pairs, kind_of_prompts(split, pairs)
        except DataError as error:
            problems.append(error)
    raise problems[0]


def _rules(curve: Curve) -> list[dict[str, Any]]:
    """The sizes that the usual limits choose; without those that keep all edges."""
    has_kl = not math.isnan(curve.empty.kl)
    found = []
    for name, limit, text in LIMITS:
        if has_kl or name != "max_kl":
            size = curve.smallest(RULES[name](limit))
            if size < curve.num_edges:
                found.append({"text": text, "by": chosen_by((name, limit)), "size": size})
    return found


def _digest(path: Path) -> str | None:
    return file_digest(path) if path.exists() else None


def _known(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier page of the run has measured, if nothing that it depends on has changed."""
    if not path.exists():
        return None
    try:
        data = data_of_page(path.read_text(encoding="utf-8"))
        part = data["runs"][0]
        same = data["format"] == page_data.FORMAT and part["key"] == json.loads(json.dumps(key))
        return part["measured"] if same else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
