"""training.png: what it shows of the lines of metrics.jsonl."""

from dataclasses import asdict

import pytest

from edgeprune.drawing.training import _figure, draw_training
from edgeprune.training.trainer import StepMetrics


def lines(*distances: float, **more) -> list[dict]:
    """Steps 10, 20, ... with sparsity .1, .2, ... and a target .05 beyond."""
    return [
        {
            **asdict(StepMetrics(10 * i, d, d, None, i / 10, i / 10 + 0.05, *[None] * 4, 0.1)),
            **more,
        }
        for i, d in enumerate(distances, 1)
    ]


def shown(metrics: list[dict]) -> list[dict]:
    """Of both panels: label -> (x, y) of each line."""
    axes = _figure(metrics, "t").axes
    return [
        {line.get_label() if ax is axes[1] else "": line.get_xydata().tolist() for line in ax.lines}
        for ax in axes
    ]


def test_distance_and_sparsity_are_drawn():
    left, right = shown(lines(2.0, 0.5, 0.01))
    assert left == {"": [[10, 2.0], [20, 0.5], [30, 0.01]]}
    assert list(right) == ["edge gates", "target of edge gates"]
    assert right["edge gates"] == [[10, 0.1], [20, 0.2], [30, 0.3]]
    targets = [y for _, y in right["target of edge gates"]]
    assert targets == pytest.approx([0.15, 0.25, 0.35])


def test_node_gates_have_lines_of_their_own():
    _, right = shown(lines(2.0, node_sparsity=0.4, node_target=0.5))
    assert right["node gates"] == [[10, 0.4]]
    assert right["target of node gates"] == [[10, 0.5]]
    assert right["edge gates"] == [[10, 0.1]]


def test_where_outputs_are_values_and_edges_have_a_price():
    metrics = lines(0.5, 0.0, kl=None, target=None)
    for line in metrics:
        line["unexplained"] = line["loss"]
    left, right = shown(metrics)
    assert left == {"": [[10, 0.5], [20, 0.0]]}
    assert list(right) == ["edge gates"]
    assert _figure(metrics, "t").axes[0].get_ylabel() == "unexplained variance"


@pytest.mark.parametrize("distances", [[0.0], [0.5], [0.0, 0.0], [1e-9, 3.0, -1e-8], [1e30, 2.0]])
def test_any_distances_can_be_drawn(tmp_path, distances):
    path = tmp_path / "training.png"
    draw_training(lines(*distances), path, title="a_$b in {c}\\")
    assert path.read_bytes().startswith(b"\x89PNG")
