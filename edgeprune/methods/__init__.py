"""Methods that score the edges of a graph, one file per method; `method.py` has what they share."""

from edgeprune.methods.every_size import EverySize
from edgeprune.methods.paper import Lagrangian
from edgeprune.methods.priced import Priced

METHODS = {"every_size": EverySize, "lagrangian": Lagrangian, "priced": Priced}
"""Class per value of the setting `trainer.method`."""
