"""`edgeprune prune`."""

from edgeprune.commands.run import make_run
from edgeprune.config import PruneConfig


def prune(config: PruneConfig) -> None:
    """Rank a model's edges by how much a task needs them; leaves a run directory."""
    make_run("prune", config)
