"""Lists of edges: `edges.json`, a bare list, and `circuit.json`, which describes itself."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.files import write_text
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

VERSION = 1
"""Version of circuit.json that is written and read."""


@dataclass(frozen=True)
class CircuitFile:
    """The content of a circuit file.

    Attributes:
        origin: how it was found, as JSON values; empty unless the file is a circuit.json.
        notes: remarks for the user, such as what could not be represented.
        scores: from a graph file with a number for every edge.
        d_model: width of the model, if the file records it.
        is_eap: whether the file is a graph of EAP-IG or MIB.
    """

    circuit: Circuit
    origin: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scores: EdgeScores | None = None
    d_model: int | None = None
    is_eap: bool = False


def read(
    content: dict[str, Any], graph: CircuitGraph, own_graph: CircuitGraph | None
) -> CircuitFile:
    """The circuit of a circuit.json, whose graph is `own_graph`, or of edges without a graph.

    Raises ValueError with a message, or whatever error damaged content leads to.
    """
    if content.get("version", VERSION) != VERSION:
        raise ValueError(f"version {content['version']}, expected {VERSION}; update edgeprune")
    if own_graph not in (None, graph):
        raise ValueError(f"not of this model: the file has {own_graph}, the model {graph}")
    return CircuitFile(Circuit.from_edges(graph, content["edges"]), dict(content.get("origin", {})))


def write_list(circuit: Circuit, path: Path) -> None:
    """Write a bare list of [writer, reader] pairs."""
    write_text(path, f"[\n{_lines(circuit)}\n]\n")


def write_circuit_json(circuit: Circuit, path: Path, origin: dict[str, Any]) -> None:
    """Write a circuit.json, one edge per line."""
    content = {
        "format": "edgeprune/circuit", "version": VERSION, "graph": circuit.graph.to_dict(),
        **circuit.sizes(), "origin": origin,
    }  # fmt: skip
    start = json.dumps(content, indent=1).removesuffix("\n}")
    write_text(path, f'{start},\n "edges": [\n{_lines(circuit)}\n ]\n}}\n')


def _lines(circuit: Circuit) -> str:
    return ",\n".join(json.dumps(edge) for edge in circuit.edges)
