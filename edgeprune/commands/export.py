"""`edgeprune export`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.commands.shared import (
    OUT,
    data_file,
    export_from,
    load_model,
    load_pairs,
    run_settings,
    show,
)
from edgeprune.config import ExportConfig, check_cleanup, check_size
from edgeprune.files import write_text


def export(config: ExportConfig, model: Any = None) -> None:
    """Make a circuit of a run's checkpoint and write edges.json."""
    check_size(config.sparsity, config.num_edges)
    check_cleanup(config.cleanup)
    from edgeprune.training.run import EDGES, REPORT

    run_dir = Path(config.run)
    chosen, step = export_from(run_dir, config.checkpoint, config.sparsity, config.num_edges)
    output = Path(config.output) if config.output else run_dir / EDGES
    cleaned = None
    if config.cleanup is not None:
        cleaned = _clean_up(run_dir, chosen, config.cleanup, model)
        chosen = replace(chosen, circuit=cleaned.circuit)
    chosen.circuit.save(output)
    report = {"checkpoint": step, **chosen.to_dict()}
    if cleaned is not None:
        report["cleanup"] = {"tolerance": config.cleanup, **cleaned.to_dict()}
    if not config.output:
        write_text(run_dir / REPORT, json.dumps(report, indent=1) + "\n")
    connected = report["without_dangling"]
    threshold = report["edge_threshold"]
    how = "exactly as asked" if threshold is None else f"at threshold {threshold:.4f}"
    if cleaned is not None:
        how = (
            f"cleaned up from {cleaned.num_edges_before:,} ({how}; distance from the full model "
            f"{cleaned.distance_before:.3g} before, {cleaned.distance_after:.3g} after)"
        )
    show(
        f"circuit of step {step}: {report['num_edges']:,} of {report['all_edges']:,} edges "
        f"({report['sparsity']:.2%} sparse), {how}; without dangling edges "
        f"{connected['num_edges']:,} edges, {connected['num_nodes']} nodes -> {output}"
    )


def _clean_up(run_dir: Path, chosen: Any, tolerance: float, model: Any) -> Any:
    """On the run's own training prompts, under its own ablation."""
    from edgeprune.ablation import Ablation
    from edgeprune.analysis.cleanup import clean_up

    of_run = run_settings(run_dir)
    if model is None:
        model = load_model(of_run["model"])
    task = of_run["task"]
    pairs = load_pairs(data_file(task, model.tokenizer, run_dir), task, model, "train")
    with OUT.status(f"cleaning up {len(chosen.circuit):,} edges"):
        return clean_up(
            model,
            chosen.circuit,
            pairs,
            tolerance=tolerance,
            ranking=chosen.ranking,
            ablation=Ablation(model, of_run["ablation"], pairs),
        )
