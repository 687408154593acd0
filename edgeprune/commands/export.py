"""`edgeprune export`."""

from __future__ import annotations

from edgeprune.commands.console import print_result
from edgeprune.config import ExportConfig


def export(config: ExportConfig) -> None:
    """Choose a circuit from a run's scores, or read one from a file, and write it."""
    from edgeprune.api.export import export

    done = export(config)
    sizes = done.circuit.sizes()
    connected, cleanup = sizes["without_dangling"], done.chosen.get("cleanup")
    step = "" if done.step is None else f" of step {done.step}"
    threshold = done.chosen.get("edge_threshold")
    how = "" if threshold is None else f", at threshold {threshold:.4f}"
    if cleanup is not None:
        how += (
            f", cleaned up from {cleanup['num_edges_before']:,} (distance from the full model "
            f"{cleanup['distance_before']:.3g} before, {cleanup['distance_after']:.3g} after)"
        )
    print_result(
        f"circuit{step}: {sizes['num_edges']:,} of {sizes['all_edges']:,} edges "
        f"({sizes['sparsity']:.2%} sparse){how}; {connected['num_edges']:,} edges and "
        f"{connected['num_nodes']} nodes lie on a path from input to output -> {done.output}"
    )
