"""`edgeprune attribute`."""

from edgeprune.commands.run import make_run
from edgeprune.config import AttributeConfig


def attribute(config: AttributeConfig) -> None:
    """Score a model's edges without learning; leaves a run directory, as `prune` does."""
    make_run("attribute", config)
