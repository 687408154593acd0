"""Lists of edges: `edges.json`, a bare list, and `circuit.json`, which describes itself.

Functions that read raise ValueError with a message, or whatever error damaged content leads to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.files import write_text
from edgeprune.formats.circuit_file import UNKNOWN_MODEL, CircuitFile
from edgeprune.graph import CircuitGraph

FORMAT = "edgeprune/circuit"
"""Value of the key `format` by which a circuit.json is recognized."""
VERSION = 1
"""Version of circuit.json that is written and read."""


def read_list(content: Any, graph: CircuitGraph | None) -> CircuitFile:
    """Read a bare list of [writer, reader] pairs."""
    if not isinstance(content, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in content
    ):
        raise ValueError(
            "the file is not a list of [writer, reader] pairs of names, nor a circuit.json, nor a "
            "graph of EAP-IG or MIB with the keys 'cfg' and 'edges'"
        )
    if graph is None:
        raise ValueError(UNKNOWN_MODEL)
    try:
        return CircuitFile(Circuit.from_edges(graph, content))
    except ValueError as error:
        raise ValueError(f"not a circuit of this model: {error}") from None


def read_circuit_json(content: dict[str, Any], graph: CircuitGraph | None) -> CircuitFile:
    """Read a circuit.json. If a graph is given, it must be that of the file."""
    if content.get("version") != VERSION:
        raise ValueError(
            f"the file has version {content.get('version')!r}, expected {VERSION}; update edgeprune"
        )
    own = CircuitGraph.from_dict(content["graph"])
    if graph not in (None, own):
        raise ValueError(f"not a circuit of this model: the file has {own}, the model {graph}")
    circuit = read_list(content["edges"], own).circuit
    return CircuitFile(circuit, origin=dict(content.get("origin", {})))


def write_list(circuit: Circuit, path: Path) -> None:
    """Write a bare list of [writer, reader] pairs."""
    write_text(path, f"[\n{_lines(circuit)}\n]\n")


def write_circuit_json(circuit: Circuit, path: Path, origin: dict[str, Any]) -> None:
    """Write a circuit.json, one edge per line."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "graph": circuit.graph.to_dict(),
        **circuit.sizes(),
        "origin": origin,
    }
    start = json.dumps(content, indent=1).removesuffix("\n}")
    write_text(path, f'{start},\n "edges": [\n{_lines(circuit)}\n ]\n}}\n')


def _lines(circuit: Circuit) -> str:
    return ",\n".join(json.dumps(edge) for edge in circuit.edges)
