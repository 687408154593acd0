"""`edgeprune export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeprune.commands.shared import export_from, find_circuit, known_graph, read_circuit, show
from edgeprune.config import CircuitFormat, ConfigError, ExportConfig, check_size
from edgeprune.files import write_text


def export(config: ExportConfig) -> None:
    """Make a circuit of a run's checkpoint, or read one from a file, and write it."""
    check_size(config.sparsity, config.num_edges)
    from edgeprune.training.run import EDGES, REPORT, load_masks, read_manifest

    if Path(config.run).is_file():
        _convert(config)
        return
    run_dir = Path(config.run)
    chosen, step = export_from(run_dir, config.checkpoint, config.sparsity, config.num_edges)
    format = _format(config)
    names = {"edges": EDGES, "eap_json": "graph.json", "eap_pt": "graph.pt"}
    output = Path(config.output) if config.output else run_dir / names[format]
    if format == "edges":
        chosen.circuit.save(output)
    else:
        scores = load_masks(run_dir, step)[0].scores()
        d_model = read_manifest(run_dir)["model"].get("d_model")
        chosen.circuit.save(output, format, scores=scores, d_model=d_model)
    report = {"checkpoint": step, **chosen.to_dict()}
    if not config.output and format == "edges":
        write_text(run_dir / REPORT, json.dumps(report, indent=1) + "\n")
    connected = report["without_dangling"]
    threshold = report["edge_threshold"]
    how = "exactly as asked" if threshold is None else f"at threshold {threshold:.4f}"
    show(
        f"circuit of step {step}: {report['num_edges']:,} of {report['all_edges']:,} edges "
        f"({report['sparsity']:.2%} sparse), {how}; without dangling edges "
        f"{connected['num_edges']:,} edges, {connected['num_nodes']} nodes -> {output}"
    )


def _format(config: ExportConfig) -> str:
    if config.format is not None:
        return config.format.name
    is_pt = config.output is not None and config.output.endswith(".pt")
    return (CircuitFormat.eap_pt if is_pt else CircuitFormat.edges).name


def _convert(config: ExportConfig) -> None:
    """From a circuit's file to another."""
    from edgeprune.training.run import read_manifest

    path, run_dir = find_circuit(config.run)
    if (config.checkpoint, config.sparsity, config.num_edges) != (None, None, None):
        raise ConfigError("checkpoint=, sparsity= and num_edges= need a run directory")
    if config.output is None:
        raise ConfigError(f"where shall the circuit of {path} be written? Give output=FILE")
    circuit = read_circuit(path, known_graph(path, run_dir))
    manifest: dict[str, Any] = read_manifest(run_dir) if run_dir else {"model": {}}
    circuit.save(config.output, _format(config), d_model=manifest["model"].get("d_model"))
    show(f"{len(circuit):,} of {circuit.graph.num_edges:,} edges of {path} -> {config.output}")
