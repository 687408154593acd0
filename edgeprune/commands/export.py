"""`edgeprune export`."""

from edgeprune.commands.console import print_result
from edgeprune.config import ExportConfig


def export(config: ExportConfig) -> None:
    """Choose a circuit from a run's scores, or read one from a file, and write it."""
    from edgeprune.api.export import export

    circuit, output, origin = export(config)
    connected, how = circuit.without_dangling(), ""
    if origin.get("edge_threshold") is not None:
        how = f", at threshold {origin['edge_threshold']:.4f}"
    if cleanup := origin.get("cleanup"):
        how += (
            f", cleaned up from {cleanup['num_edges_before']:,} (distance from the full model "
            f"{cleanup['distance_before']:.3g} before, {cleanup['distance_after']:.3g} after)"
        )
    print_result(
        f"{len(circuit):,} of {circuit.graph.num_edges:,} edges ({circuit.sparsity:.2%} sparse)"
        f"{how}; {len(connected):,} edges and {len(connected.nodes)} nodes lie on a path from "
        f"input to output -> {output}"
    )
