"""The names of a run directory's files; nothing else in the package spells them out."""

CONFIG = "config.yaml"
"""The resolved settings."""
MANIFEST = "run.json"
"""Graph, digests of data and model, versions; makes a directory a run."""
DATA = "data.jsonl"
"""The prompts, where the run generated them."""
METRICS = "metrics.jsonl"
"""One line per step."""
PLOT = "training.png"
"""A plot of METRICS."""
CHECKPOINTS = "checkpoints"
SCORES = "scores.safetensors"
"""The final score of every edge."""
CURVE, CURVE_PLOT = "curve.json", "curve.png"
"""Metrics of circuits of many sizes, cut from SCORES, and a plot of them."""
CIRCUIT = "circuit.json"
"""The chosen circuit with its graph and origin."""
EDGES = "edges.json"
"""The chosen circuit as a bare list of [writer, reader] pairs."""
GRAPH_JSON, GRAPH_PT = "graph.json", "graph.pt"
"""The chosen circuit as a graph of EAP-IG and MIB."""
DRAWING = "circuit"
"""Stem of the drawings."""
PAGE = "page.html"
"""The page that shows the run's circuits of every size; also holds what was measured for it."""
REPORT = "report"
LOCK = ".lock"


def evaluation(split: str) -> str:
    """The measurement of the run's circuit on a split of the run's prompts."""
    return f"evaluation-{split}.json"


def mib(split: str) -> str:
    """What the MIB benchmark measures of the run's scores on a split of the run's prompts."""
    return f"mib-{split}.json"
