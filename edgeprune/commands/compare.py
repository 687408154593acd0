"""`edgeprune compare`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from edgeprune.commands.shared import (
    OUT,
    check_formats,
    find_circuit,
    known_graph,
    replacing_earlier,
    run_title,
    say,
    show,
    write_circuit,
)
from edgeprune.config import CompareConfig
from edgeprune.errors import ConfigError
from edgeprune.files import write_json

if TYPE_CHECKING:
    from edgeprune.circuit import Circuit
    from edgeprune.graph import CircuitGraph

MAX_PAIRS = 15
"""Rows of the table of pairs; the JSON has them all."""


@dataclass(frozen=True)
class Given:
    """A circuit as it was named on the command line."""

    path: Path
    run_dir: Path | None
    graph: CircuitGraph | None
    """None: not known without reading the file."""


@dataclass(frozen=True)
class Name:
    """A label in a table; where it is too long for a line it is parted after a hyphen."""

    label: str

    @property
    def parts(self) -> list[str]:
        return re.split("(?<=-)", self.label)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = ""
        for part in self.parts:
            if line and cell_len(line + part) > options.max_width:
                yield Text(line)
                line = ""
            line += part
        yield Text(line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(cell_len, self.parts)), cell_len(self.label))


def compare(config: CompareConfig) -> None:
    """Compare circuits: what they share, what only one has, and how alike they are."""
    from edgeprune.evaluation import compare as analysis

    check_formats(config.formats)
    given = [_find(name) for name in config.circuits]
    reference = None
    if config.reference is not None:
        known = _find(config.reference)
        places = [one.path.resolve() for one in given]
        if known.path.resolve() not in places:
            given.append(known)
            places.append(known.path.resolve())
        reference = places.index(known.path.resolve())
    if len(given) < 2:
        raise ConfigError(
            f"got {len(given)} circuit to compare, expected two or more: edgeprune compare PATH "
            "PATH ..., or one and reference=PATH"
        )
    labels = labels_of([one.path for one in given])
    circuits = dict(zip(labels, _read(given), strict=True))

    result = analysis.compare(circuits, None if reference is None else labels[reference])
    for label, one in zip(labels, given, strict=True):
        result["circuits"][label] = {"path": str(one.path), **result["circuits"][label]}
    folder = Path(config.output)
    run_dirs = [one.run_dir for one in given if one.run_dir]
    run_dir = _run_of_all(run_dirs)
    parts = {
        "intersection": analysis.intersection(circuits.values()),
        "union": analysis.union(circuits.values()),
        **{f"only-{label}": analysis.only_in(label, circuits) for label in labels},
    }
    title = ", ".join(dict.fromkeys(filter(None, map(run_title, run_dirs))))
    with replacing_earlier(folder, "compare", [one.path for one in given]) as written:
        for name, part in parts.items():
            how = f"{name} of {', '.join(labels)}"
            written += write_circuit(folder / name, part, how, run_dir)
        write_json(folder / "comparison.json", result)
        written.append(folder / "comparison.json")
        _print(result)
        for path in _draw(circuits, folder, config.formats, title):
            written.append(path)
    show(f"-> {folder}: comparison.json, {', '.join(parts)}")


def _find(name: str) -> Given:
    path, run_dir = find_circuit(name)
    return Given(path, run_dir, known_graph(path, run_dir))


def _run_of_all(run_dirs: list[Path]) -> Path | None:
    """The first run, if all are of the same prompts and model, so that they measure them all."""
    from edgeprune.runs.run import read_digests

    digests = [read_digests(run_dir) for run_dir in run_dirs]
    return run_dirs[0] if digests and all(one == digests[0] for one in digests) else None


def labels_of(paths: list[Path]) -> list[str]:
    """Short names that tell paths apart: a run directory's or a file's, as long as it must be.

    Raises:
        ConfigError: a path comes twice.
    """
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise ConfigError(f"{path} is given twice; give different circuits")
    named = [path.parent if path.name == "edges.json" else path for path in whole]
    for length in range(1, max(len(path.parts) for path in named)):
        for bare in (True, False):
            labels = [_label(path, length, bare and path in whole) for path in named]
            if len(set(labels)) == len(labels):
                return labels
    return [f"{label}-{number}" for number, label in enumerate(labels, 1)]


def _label(path: Path, length: int, bare: bool) -> str:
    """The last parts of a path as a file name, the last one bare of its suffix if asked."""
    parts = path.parts[-length:]
    return re.sub(r"[^\w.=+-]", "-", "-".join((*parts[:-1], path.stem if bare else path.name)))


def _read(given: list[Given]) -> list[Circuit]:
    """The circuits, all of one graph: a run's, if there is one, else what the names suggest.

    Raises:
        ConfigError: two of them are known to be of different graphs.
    """
    from edgeprune.circuit import Circuit
    from edgeprune.formats.eap import infer_graph, read_circuit_file

    known = {one.path: one.graph for one in given if one.graph}
    for one in given:
        if one.graph is None:
            file = read_circuit_file(one.path)
            if file.graph is not None and file.sure:
                known[one.path] = file.graph
    first = next(iter(known), None)
    for path, graph in known.items():
        if graph != known[first]:
            raise ConfigError(
                f"circuits of different graphs cannot be compared: {first} has {known[first]}, "
                f"{path} has {graph}"
            )
    graph = known.get(first)
    if graph is None:
        files = [(one.path, read_circuit_file(one.path)) for one in given]
        pairs = [edge for _, file in files if file.graph is None for edge in file.edges]
        where = ", ".join(str(path) for path, file in files if file.graph is None)
        graph = infer_graph(pairs, where) if pairs else None
        larger = next((file.graph for _, file in files if file.graph is not None), None)
        if larger is not None:
            embeddings = graph.embedding_writers if graph else ()
            graph = replace(larger, embedding_writers=embeddings or larger.embedding_writers)
        graph = graph or infer_graph([], where)
        say(
            "none of these says which model it is of, so the graph is the smallest that has these "
            f"edges ({graph.num_layers} layers of {graph.num_heads} heads, no grouped queries); "
            "with a run directory among them sparsity and nodes are exact"
        )
    circuits = []
    for one in given:
        file = read_circuit_file(one.path, graph)
        for note in file.notes:
            say(note)
        circuits.append(Circuit.from_edges_checked(graph, file.edges, str(one.path)))
    return circuits


def _print(result: dict[str, Any]) -> None:
    """Tables for the console."""
    some = next(iter(result["circuits"].values()))
    sizes = _table(
        f"circuits, of {some['all_edges']:,} edges; connected: on a path from input to output",
        "", "edges", "sparsity", "nodes", "only\nhere", "connected\nedges", "nodes", "only\nhere",
    )  # fmt: skip
    connected = result["connected"]
    for name, size in result["circuits"].items():
        own = size["without_dangling"]
        sizes.add_row(
            Name(name), f"{size['num_edges']:,}", f"{size['sparsity']:.4f}",
            f"{size['num_nodes']:,}", f"{size['only_here']:,}", f"{own['num_edges']:,}",
            f"{own['num_nodes']:,}", f"{connected['only_here'][name]:,}",
        )  # fmt: skip
    for name, key in (("all of them", "intersection"), ("any of them", "union")):
        size = result[key]
        sizes.add_row(
            name, f"{size['num_edges']:,}", f"{size['sparsity']:.4f}", "", "",
            f"{connected[key]:,}",
        )  # fmt: skip
    OUT.print(sizes)
    _print_overlaps("overlap of all edges", result["pairs"])
    _print_overlaps(
        "overlap of connected edges", [{**pair, **pair["connected"]} for pair in result["pairs"]]
    )
    if "reference" in result:
        against = _table(f"against {result['reference']}", "", "precision", "recall", "F1",
                         "of nodes:\nprecision", "recall", "F1")  # fmt: skip
        for name, both in result["agreement"].items():
            values = [both[of][key] for of in ("edges", "nodes")
                      for key in ("precision", "recall", "f1")]  # fmt: skip
            against.add_row(Name(name), *("–" if v is None else f"{v:.3f}" for v in values))
        OUT.print(against)


def _print_overlaps(title: str, pairs: list[dict[str, Any]]) -> None:
    table = _table(title, "", "", "shared\nedges", "edge IoU", "by\nchance", "shared\nnodes",
                   "node IoU")  # fmt: skip
    for pair in pairs[:MAX_PAIRS]:
        table.add_row(
            Name(pair["a"]), Name(pair["b"]), f"{pair['shared_edges']:,}",
            f"{pair['edge_iou']:.3f}", f"{pair['edge_iou_by_chance']:.3f}",
            str(pair["shared_nodes"]), f"{pair['node_iou']:.3f}",
        )  # fmt: skip
    OUT.print(table)
    if len(pairs) > MAX_PAIRS:
        ious = [pair["edge_iou"] for pair in pairs]
        show(
            f"... {len(ious)} pairs in all; edge IoU {min(ious):.3f} to {max(ious):.3f}, on "
            f"average {sum(ious) / len(ious):.3f}"
        )


def _table(title: str, *columns: str) -> Table:
    """Columns without a heading are names, which fold where numbers need the room."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        is_name = not column
        table.add_column(
            column, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold"
        )
    return table


def _draw(
    circuits: dict[str, Circuit], folder: Path, formats: list[str], title: str
) -> Iterator[Path]:
    """The connected edges of each circuit, coloured by the circuits that have them connected.

    Yields each file when it is written.
    """
    from edgeprune.drawing import GraphvizMissing, comparison_groups, draw_circuit
    from edgeprune.evaluation.compare import union

    connected = {name: circuit.without_dangling() for name, circuit in circuits.items()}
    shown = union(connected.values())
    groups = comparison_groups({name: c.edge_set for name, c in connected.items()})
    for suffix in formats:
        path = folder / f"comparison.{suffix}"
        try:
            draw_circuit(shown, path, title=title, groups=groups)
        except GraphvizMissing as error:
            say(str(error))
            yield path.with_suffix(".dot")
            return
        yield path
    if formats:
        show(f"drew {len(shown):,} edges -> {', '.join(f'comparison.{s}' for s in formats)}")
