"""Methods that score the edges of a graph.

Those that learn are described in `method.py`, those that do not in `attribution.py`.
"""

from edgeprune.methods.attribution import POINTS, AlongGates, AtPoints
from edgeprune.methods.every_size import EverySize
from edgeprune.methods.exact import ACDC, Exact
from edgeprune.methods.paper import Lagrangian
from edgeprune.methods.priced import Priced

METHODS = {"every_size": EverySize, "lagrangian": Lagrangian, "priced": Priced}
"""Class per value of the setting `trainer.method`."""

ATTRIBUTIONS = {
    **dict.fromkeys(POINTS, AtPoints),
    "gates": AlongGates,
    "exact": Exact,
    "acdc": ACDC,
}
"""Class per value of the setting `method` of `edgeprune attribute`."""
