"""Methods that score the edges of a graph, one file per method; `method.py` has the protocol."""

from edgeprune.methods.held import Held
from edgeprune.methods.paper import Lagrangian, circuit_by_threshold, scores_from_state
from edgeprune.methods.priced import Priced

METHODS = {"lagrangian": Lagrangian, "held": Held, "priced": Priced}
"""Class per value of the setting `trainer.method`."""

__all__ = ["METHODS", "Held", "Lagrangian", "Priced", "circuit_by_threshold", "scores_from_state"]
