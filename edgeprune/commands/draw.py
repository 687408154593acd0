"""`edgeprune draw`."""

from __future__ import annotations

from pathlib import Path

from edgeprune.commands.shared import (
    check_formats,
    check_output,
    export_from,
    find_circuit,
    known_graph,
    read_circuit,
    run_title,
    show,
)
from edgeprune.config import DrawConfig, check_size
from edgeprune.errors import ConfigError


def draw(config: DrawConfig) -> None:
    """Draw a circuit by Graphviz."""
    check_size(config.sparsity, config.num_edges)
    from edgeprune.drawing import SUFFIXES, draw_circuit
    from edgeprune.runs.run import EDGES, has_run

    if not config.formats:
        raise ConfigError(f"formats is empty, expected some of {', '.join(SUFFIXES)}")
    check_formats(config.formats)
    output = None if config.output is None else Path(config.output)
    if output is not None and config.output.strip("/") and config.output.endswith("/"):
        output /= "circuit"
    if output is not None and output.suffix.removeprefix(".") in SUFFIXES:
        output = output.with_suffix("")  # formats says which are written
    if output is not None and output.name in ("", ".."):
        raise ConfigError(
            f"output={config.output} has no file's name, expected a path without suffix, such as "
            "pictures/circuit"
        )

    path = Path(config.circuit)
    from_masks = (config.checkpoint, config.sparsity, config.num_edges) != (None, None, None)
    if path.is_dir() and has_run(path) and (from_masks or not (path / EDGES).exists()):
        run_dir = path
        chosen, _ = export_from(run_dir, config.checkpoint, config.sparsity, config.num_edges)
        circuit, own = chosen.circuit, run_dir / "circuit"
    else:
        edges_path, run_dir = find_circuit(config.circuit)
        if from_masks:
            raise ConfigError("checkpoint=, sparsity= and num_edges= need a run directory")
        circuit = read_circuit(edges_path, known_graph(edges_path, run_dir))
        is_edges = edges_path.name == EDGES
        own = edges_path.with_name("circuit" if is_edges else edges_path.stem)
    shown = circuit if config.dangling else circuit.without_dangling()
    title = run_title(run_dir) if config.title is None else config.title
    stem = output or own
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in config.formats]
    for path in paths:
        check_output(path)
    for path in paths:
        draw_circuit(shown, path, title=title)
    dropped = len(circuit) - len(shown)
    note = f" ({dropped:,} dangling edges left out)" if dropped else ""
    counts = f"{len(shown):,} edges between {len(shown.nodes):,} nodes and the output"
    show(f"drew {counts}{note} -> {', '.join(map(str, paths))}")
