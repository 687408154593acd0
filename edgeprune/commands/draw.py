"""`edgeprune draw`."""

from edgeprune.commands.console import print_result
from edgeprune.config import DrawConfig


def draw(config: DrawConfig) -> None:
    """Draw a circuit with Graphviz."""
    from edgeprune.api.circuits import draw

    done = draw(config)
    note = f" ({done.num_dangling:,} dangling edges left out)" if done.num_dangling else ""
    print_result(
        f"drew {len(done.circuit):,} edges between {len(done.circuit.nodes):,} nodes and the "
        f"output{note} -> {', '.join(map(str, done.paths))}"
    )
