"""`edgeprune report`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from edgeprune.commands.report_page import REFERENCES, columns, frontier_rows, report_page
from edgeprune.commands.shared import (
    OUT,
    read_origin,
    replacing_earlier,
    say,
    show,
    unfinished_steps,
    write_circuit,
)
from edgeprune.config import ReportConfig, edges_left
from edgeprune.errors import ConfigError
from edgeprune.files import write_text

if TYPE_CHECKING:
    from edgeprune.circuit import Circuit
    from edgeprune.evaluation.report import Group, Point, Run, Series

LABELS = {"kl": "KL from the full model (nats)", "error": "error from the full model",
          "exact_match": "exact match with the full model", "accuracy": "accuracy"}  # fmt: skip
OF = {"edges_sha256": "circuit", "ablation": "ablation", "model_sha256": "model",
      "data_sha256": "data file"}  # fmt: skip
"""What an evaluation must share with its run."""


def report(config: ReportConfig) -> None:
    """Sum up all runs below a folder: frontiers, and stability over seeds."""
    from edgeprune.evaluation.report import group_runs

    folder = Path(config.folder)
    output = Path(config.output) if config.output else folder / "report"
    with OUT.status(f"reading the runs below {folder}"):
        found = list(_read_runs(folder))
        split = config.split and config.split.name
        groups = group_runs([run for run, _ in found], split)
    places = {run.name: run_dir for run, run_dir in found}

    for group, _, point in _points(groups):
        seeds = [str(run.seed) for run in point.runs]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(run.name for run in point.runs)
            say(
                f"{group.title}, {point.asked}: runs of the same seed count as several seeds "
                f"({names}); leave out copies"
            )
    slugs = _slugs(groups)
    title = f"edgeprune: {len(found)} runs in {folder.resolve().name}"
    with replacing_earlier(output, "report") as written:
        consensus = _write_consensus(groups, slugs, output, places, written)
        for name, rows in _csv_tables(groups).items():
            _write_csv(output / name, rows)
            written.append(output / name)
        pictures = []
        for group, slug in zip(groups, slugs, strict=True):
            drawn = _draw(group, output / f"frontier-{slug}")
            written += drawn
            pictures.append(drawn[-1] if drawn else None)
            _print(group)
        page = report_page(title, groups, pictures, consensus)
        write_text(output / "report.html", page)
        written.append(output / "report.html")
    show(
        f"{len(found)} runs -> {output}: report.html, frontier-*.png, .pdf and .svg, frontier.csv, "
        f"runs.csv, stability.csv, edges.csv" + (", consensus/" if consensus else "")
    )


# ------------------------------------------------------------------------------------- reading


def _read_runs(folder: Path) -> Iterator[tuple[Run, Path]]:
    """Every finished run below a folder, and where it lies.

    Raises:
        ConfigError: there is none.
    """
    from edgeprune.circuit import CircuitError
    from edgeprune.runs.run import CONFIG, EDGES, MANIFEST

    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}; give one with run directories in it")
    number = 0
    for manifest in sorted(folder.rglob(MANIFEST)):
        run_dir = manifest.parent
        if not (run_dir / CONFIG).exists():
            continue
        if not (run_dir / EDGES).exists():
            say(f"{run_dir} is left out: it has no {EDGES} yet")
            continue
        try:
            run = _read_run(run_dir, str(run_dir.relative_to(folder)))
        except (ConfigError, CircuitError) as error:
            say(f"{run_dir} is left out: {error}")
            continue
        number += 1
        yield run, run_dir
    if not number:
        raise ConfigError(
            f"no finished run below {folder}; make some with, for instance, `edgeprune prune "
            "experiment=ioi sparsity=0.9,0.95,0.98 seed=0,1,2 --multirun`, which leaves them below "
            "runs/"
        )


def _read_run(run_dir: Path, name: str) -> Run:
    from edgeprune.circuit import Circuit
    from edgeprune.evaluation.report import SPLITS, Run
    from edgeprune.runs.run import EDGES, flatten, read_config, read_digests, read_graph

    settings, digests = read_config(run_dir), read_digests(run_dir)
    circuit = Circuit.load(run_dir / EDGES, read_graph(run_dir))
    _check_size(run_dir, settings, circuit)
    own = {
        "edges_sha256": circuit.digest(),
        "ablation": settings.get("ablation"),
        "model_sha256": digests["model"],
        "data_sha256": digests["data"],
    }
    evaluations = {}
    for split in SPLITS:
        path = run_dir / f"evaluation-{split}.json"
        if not path.exists():
            continue
        try:
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            others = [OF[key] for key, value in own.items() if evaluation[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{path} is passed over: {type(error).__name__}: {error}; evaluate it again")
            continue
        if others:
            what = " and ".join(others)
            say(f"{path} is passed over: it is of another {what} than the run's; evaluate it again")
            continue
        evaluations[split] = evaluation
    name = run_dir.name if name == "." else name
    return Run(name, flatten(settings), circuit, evaluations, digests)


def _check_size(run_dir: Path, settings: dict[str, Any], circuit: Circuit) -> None:
    """A run's circuit has the size asked for, where one was, before any clean-up.

    Raises:
        ConfigError: it has another, such as of a later export.
    """
    from edgeprune.runs.run import EDGES

    sparsity, num_edges = settings.get("sparsity"), settings.get("num_edges")
    if sparsity is not None:
        num_edges = edges_left(sparsity, circuit.graph.num_edges)
    origin, size = read_origin(run_dir / EDGES), len(circuit)
    of_all = unfinished_steps(settings, origin.get("checkpoint"))
    if of_all:
        raise ConfigError(
            f"its circuit is of step {origin['checkpoint']:,} of {of_all:,}; let the run end (its "
            f"command, with resume=auto), or if it has, `edgeprune export {run_dir}` again"
        )
    cleanup = origin.get("cleanup")
    if isinstance(cleanup, dict) and origin.get("num_edges") == size:
        size = cleanup.get("num_edges_before", size)
    if num_edges is not None and size != num_edges:
        asked = f"num_edges={num_edges}" if sparsity is None else f"sparsity={sparsity}"
        raise ConfigError(
            f"its circuit was made with {size:,} edges, but {asked} asks for {num_edges:,}; make "
            f"that one again by `edgeprune export {run_dir}`, and evaluate it"
        )


# ------------------------------------------------------------------------------------- writing


def _slug(*parts: str) -> str:
    """A file name made of words."""
    return (
        re.sub(r"[^\w.=+-]+", "-", "-".join(part for part in parts if part)).strip("-.") or "runs"
    )


def _slugs(groups: list[Group]) -> list[str]:
    """A file name for every group; those of the same names differ in their graphs."""
    slugs = [_slug(group.task, group.model, group.ablation) for group in groups]
    return [
        f"{slug}-{number}" if slugs.count(slug) > 1 else slug
        for number, slug in enumerate(slugs, 1)
    ]


def _write_consensus(
    groups: list[Group],
    slugs: list[str],
    output: Path,
    places: dict[str, Path],
    written: list[Path],
) -> dict[str, str]:
    """The consensus circuit of every point of several seeds.

    The files are added to `written`. Returns their paths in output, by the name of the point's
    first run.
    """
    consensus: dict[str, str] = {}
    for group, slug in zip(groups, slugs, strict=True):
        for number, series in enumerate(group.series, 1):
            curve = f"series-{number}" if len(group.series) > 1 else ""
            for point in series.points:
                if point.stability is None:
                    continue
                folder = f"consensus/{_slug(slug, curve, point.asked)}"
                runs = ", ".join(run.name for run in point.runs)
                how = f"consensus of {len(point.runs)} runs: {runs}"
                run_dir = places[point.runs[0].name]
                circuit = point.stability.consensus
                written += write_circuit(output / folder, circuit, how, run_dir)
                consensus[point.runs[0].name] = f"{folder}/edges.json"
    return consensus


def _points(groups: list[Group]) -> Iterator[tuple[Group, Series, Point]]:
    for group in groups:
        for series in group.series:
            for point in series.points:
                yield group, series, point


def _csv_tables(groups: list[Group]) -> dict[str, list[dict]]:
    """Rows of each CSV file."""
    from edgeprune.evaluation.report import METRICS, score

    runs, frontier, stability, edges = [], [], [], []
    metrics = (*METRICS, "logit_difference_recovered", "probability_difference")
    for group, series, point in _points(groups):
        where = {"task": group.task, "model": group.model, "ablation": group.ablation,
                 "series": series.name, "asked": point.asked}  # fmt: skip
        for run in point.runs:
            size = run.circuit.sizes()
            runs.append({
                **where, "run": run.name, "seed": run.seed, "num_edges": size["num_edges"],
                "sparsity": size["sparsity"],
                "num_edges_without_dangling": size["without_dangling"]["num_edges"],
                "num_nodes_without_dangling": size["without_dangling"]["num_nodes"],
                "split": group.split if group.split in run.evaluations else None,
                **{metric: score(run, group.split, "circuit", metric) for metric in metrics},
            })  # fmt: skip
        size = point.num_edges.mean
        row = {**where, "runs": len(point.runs), "evaluated": point.num_evaluated,
               "num_edges": size,
               "sparsity": 1 - size / group.num_edges, "split": group.split}  # fmt: skip
        spreads = {metric: point.spread(metric) for metric in METRICS}
        if point.stability:
            spreads |= {"edge_iou": point.stability.edge_iou, "node_iou": point.stability.node_iou}
        for metric in (*METRICS, "edge_iou", "node_iou"):
            spread = spreads.get(metric)
            row |= {f"{metric}_{part}": getattr(spread, part, None)
                    for part in ("mean", "low", "high")}  # fmt: skip
        frontier.append(row)
        if point.stability is None:
            continue
        stability += [
            {**where, "a": a, "b": b, "edge_iou": overlap.edge_iou, "node_iou": overlap.node_iou,
             "shared_edges": overlap.shared_edges, "shared_nodes": overlap.shared_nodes}
            for a, b, overlap in point.stability.pairs
        ]  # fmt: skip
        edges += [
            {**where, "writer": writer, "reader": reader, "times_kept": count,
             "runs": len(point.runs), "share": count / len(point.runs)}
            for (writer, reader), count in point.stability.times_kept.items()
        ]  # fmt: skip
    return {"runs.csv": runs, "frontier.csv": frontier, "stability.csv": stability,
            "edges.csv": edges}  # fmt: skip


def _write_csv(path: Path, rows: list[dict]) -> None:
    """The header alone where there are no rows."""
    text = io.StringIO()
    columns = list(rows[0]) if rows else ["task", "model", "ablation", "series", "asked"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _draw(group: Group, stem: Path) -> list[Path]:
    """The frontier as .png, .pdf and .svg, in this order; nothing without evaluations."""
    from edgeprune.drawing.frontier import Curve, Panel, draw_frontier
    from edgeprune.evaluation.report import DISTANCES, SHARES

    panels = []
    for metric in (group.distance, *SHARES):
        curves = []
        for series in group.series:
            points = [(point.num_edges.mean, spread) for point in series.points
                      if (spread := point.spread(metric)) is not None]  # fmt: skip
            xs, spreads = [x for x, _ in points], [spread for _, spread in points]
            curves.append(Curve(series.name, xs, [s.mean for s in spreads],
                                [s.low for s in spreads], [s.high for s in spreads]))  # fmt: skip
        levels = [(text, level) for of, text in REFERENCES.items()
                  if (level := group.reference(of, metric)) is not None
                  and not (of == "full" and metric in DISTANCES)]  # fmt: skip
        panels.append(Panel(LABELS[metric], curves, levels, log=metric in DISTANCES))
    if not group.evaluated:
        where = f" on {group.split} prompts" if group.split else ""
        say(f"{group.title}: no run has been evaluated{where}, so there is no plot")
        return []
    title = f"{group.title}: {group.prompts}"
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf", "svg")]
    for path in paths:
        draw_frontier(panels, path, title=title, all_edges=group.num_edges)
    return paths


# ------------------------------------------------------------------------------------- console


def _print(group: Group) -> None:
    from edgeprune.evaluation.report import SHARES

    for series in group.series:
        name = f"; {series.name}" if series.name else ""
        title = f"{group.title}, {group.num_edges:,} edges; {group.prompts}{name}"
        table = Table(title=Text(title), title_justify="left")
        metrics = (group.distance, *SHARES)
        for index, column in enumerate(columns(metrics)[:-1]):
            table.add_column(column, justify="right" if index else "left", no_wrap=not index)
        for row in frontier_rows(group, series, metrics, ranges=False):
            table.add_row(*map(Text, row[:-1]))
        OUT.print(table)
