"""Circuit files in four formats, told apart by their content when read.

edges     edges.json: a bare list of [writer, reader] pairs, as published with Edge Pruning
circuit   circuit.json: our own format, which also names the graph and the circuit's origin
eap_json  a graph of EAP-IG or MIB as JSON
eap_pt    the same as tensors
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.circuit import Circuit
from edgeprune.errors import CircuitError
from edgeprune.formats import edges_json
from edgeprune.formats.circuit_file import CircuitFile
from edgeprune.graph import CircuitGraph

if TYPE_CHECKING:
    from edgeprune.scores import EdgeScores

__all__ = ["FORMATS", "CircuitFile", "read_circuit", "write_circuit"]

FORMATS = ("edges", "circuit", "eap_json", "eap_pt")
"""Names of the formats."""


def read_circuit(path: Path | str, graph: CircuitGraph | None = None) -> CircuitFile:
    """Read a circuit file of any format.

    Args:
        path: the file.
        graph: the model's graph. Only files that edgeprune wrote in another format than 'edges'
            can be read without it.

    Raises:
        CircuitError: the file is missing, damaged, of an unknown format or of another graph, or
            it does not identify its model and no graph is given.
    """
    path = Path(path)
    try:
        file = _parse(path, path.read_bytes(), graph)
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CircuitError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise CircuitError(
            f"{path} is damaged, or not a circuit ({type(error).__name__}: {error}); export the "
            "circuit again"
        ) from None
    return replace(file, notes=tuple(f"{path}: {note}" for note in file.notes))


def _parse(path: Path, data: bytes, graph: CircuitGraph | None) -> CircuitFile:
    if data.startswith(b"PK\x03\x04") or path.suffix == ".pt":
        from edgeprune.formats import eap  # imports torch

        return eap.read_pt(path.name, data, graph)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file is not JSON: {error}") from None
    if isinstance(content, dict):
        if content.get("format") == edges_json.FORMAT:
            return edges_json.read_circuit_json(content, graph)
        if {"cfg", "edges"} <= content.keys():
            from edgeprune.formats import eap

            return eap.read_json(path.name, content, graph)
        content = content.get("edges")  # ground truth of Tracr models: a list under this key
    return edges_json.read_list(content, graph)


def write_circuit(
    circuit: Circuit,
    path: Path | str,
    format: str = "edges",
    *,
    scores: EdgeScores | None = None,
    d_model: int | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write a circuit file atomically.

    Args:
        circuit: the circuit.
        path: the file.
        format: one of `FORMATS`.
        scores: for 'eap_json' and 'eap_pt'; None: 1 for kept edges, 0 for the others.
        d_model: width of the model, for 'eap_json' and 'eap_pt'; None: unknown, written as 0.
        origin: how the circuit was found, as JSON values, for 'circuit'.

    Raises:
        CircuitError: the path ends in .pt, but the format is JSON.
        ValueError: unknown format.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose {', '.join(FORMATS)}")
    if path.suffix == ".pt" and format != "eap_pt":
        raise CircuitError(
            f"{path}: a .pt file holds tensors, but format {format!r} is JSON; give "
            "format='eap_pt', or a name that ends in .json"
        )
    if format == "edges":
        edges_json.write_list(circuit, path)
    elif format == "circuit":
        edges_json.write_circuit_json(circuit, path, origin or {})
    else:
        from edgeprune.formats import eap

        write = eap.write_json if format == "eap_json" else eap.write_pt
        write(circuit, path, scores, d_model)
