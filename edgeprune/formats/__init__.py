"""Circuit files in four formats, told apart by their content when read.

edges     edges.json: a bare list of [writer, reader] pairs, as published with Edge Pruning
circuit   circuit.json: our own format, which also names the graph and the circuit's origin
eap_json  a graph of EAP-IG or MIB as JSON
eap_pt    the same as tensors
"""

import json
import logging
from pathlib import Path
from typing import Any

from edgeprune.circuit import Circuit
from edgeprune.errors import CircuitError
from edgeprune.formats import eap, edges_json
from edgeprune.formats.edges_json import CircuitFile
from edgeprune.graph import CircuitGraph
from edgeprune.scores import EdgeScores

log = logging.getLogger("edgeprune")

__all__ = ["FORMATS", "CircuitFile", "read_circuit", "write_circuit"]

FORMATS = ("edges", "circuit", "eap_json", "eap_pt")
"""Names of the formats."""


def read_circuit(path: Path | str, graph: CircuitGraph | None = None) -> CircuitFile:
    """Read a circuit file of any format; files in which edgeprune stored the graph need no `graph`.

    Raises CircuitError if the file is missing, damaged or of another graph, or no graph is known.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        content = eap.load_tensors(data) if data.startswith(b"PK\x03\x04") else json.loads(data)
        if not isinstance(content, dict):
            content = {"edges": content}
        own = content.get(eap.OWN_KEY, content).get("graph")
        own_graph = own and CircuitGraph.from_dict(own)
        graph = graph or own_graph
        if graph is None:
            raise ValueError("the file does not identify its model; give model=... or a graph")
        if "cfg" in content:
            return eap.read(content, graph, own_graph, path.name)
        return edges_json.read(content, graph, own_graph)
    except Exception as error:  # damaged content can lead to any
        reason = error if isinstance(error, (OSError, ValueError)) else repr(error)
        raise CircuitError(
            f"cannot read {path} as a list of edges, circuit.json or graph of EAP-IG: {reason}"
        ) from None


def write_circuit(
    circuit: Circuit, path: Path | str, format: str = "edges", *, scores: EdgeScores | None = None,
    d_model: int | None = None, origin: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a circuit file atomically.

    Args:
        format: one of `FORMATS`.
        scores: for 'eap_json' and 'eap_pt'; None: 1 for kept edges, 0 for the others.
        d_model: width of the model, for 'eap_json' and 'eap_pt'; None: unknown, written as 0.
        origin: how the circuit was found, as JSON values. 'circuit' records it, 'eap_json' and
            'eap_pt' warn if its `ablation` is zero, see `eap.py`.

    Raises ValueError for an unknown format, TypeError if it is not a circuit.
    """
    Circuit.check(circuit)
    path = Path(path)
    if format == "edges":
        edges_json.write_list(circuit, path)
    elif format == "circuit":
        edges_json.write_circuit_json(circuit, path, origin or {})
    elif format in FORMATS:
        eap.write(circuit, path, format, scores, d_model)
        if (origin or {}).get("ablation", {}).get("kind") == "zero":
            log.warning(f"{path}: {eap.ZERO_ABLATION}")
    else:
        raise ValueError(f"unknown format {format!r}; choose {', '.join(FORMATS)}")
