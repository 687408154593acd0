"""The result of reading a circuit file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeprune.circuit import Circuit

if TYPE_CHECKING:
    from edgeprune.scores import EdgeScores

UNKNOWN_MODEL = (
    "the file does not identify its model; give model=... (from Python, the model's graph)"
)
"""Message for a file without a graph when none is given."""


@dataclass(frozen=True)
class CircuitFile:
    """The content of a circuit file.

    Attributes:
        circuit: the circuit.
        origin: how it was found, as JSON values; empty unless the file is a circuit.json.
        notes: remarks for the user, such as what could not be represented.
        scores: from a graph file with a number for every edge.
        d_model: width of the model, if the file records it.
    """

    circuit: Circuit
    origin: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scores: EdgeScores | None = None
    d_model: int | None = None
