"""`edgeprune export`."""

from __future__ import annotations

import json
from pathlib import Path

from edgeprune.commands.shared import export_from, show
from edgeprune.config import ExportConfig, check_size
from edgeprune.files import write_text


def export(config: ExportConfig) -> None:
    """Make a circuit of a run's checkpoint and write edges.json."""
    check_size(config.sparsity, config.num_edges)
    from edgeprune.training.run import EDGES, REPORT

    run_dir = Path(config.run)
    chosen, step = export_from(run_dir, config.checkpoint, config.sparsity, config.num_edges)
    output = Path(config.output) if config.output else run_dir / EDGES
    chosen.circuit.save(output)
    report = {"checkpoint": step, **chosen.to_dict()}
    if not config.output:
        write_text(run_dir / REPORT, json.dumps(report, indent=1) + "\n")
    connected = report["without_dangling"]
    threshold = report["edge_threshold"]
    how = "exactly as asked" if threshold is None else f"at threshold {threshold:.4f}"
    show(
        f"circuit of step {step}: {report['num_edges']:,} of {report['all_edges']:,} edges "
        f"({report['sparsity']:.2%} sparse), {how}; without dangling edges "
        f"{connected['num_edges']:,} edges, {connected['num_nodes']} nodes -> {output}"
    )
