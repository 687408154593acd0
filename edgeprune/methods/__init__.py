"""Methods that score the edges of a graph, one file per method; `method.py` has what they share."""

from edgeprune.methods.held import Held
from edgeprune.methods.paper import Lagrangian
from edgeprune.methods.priced import Priced

METHODS = {"lagrangian": Lagrangian, "held": Held, "priced": Priced}
"""Class per value of the setting `trainer.method`."""
