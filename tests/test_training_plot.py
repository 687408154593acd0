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


def shown(metrics: list[dict]) -> list[list[tuple]]:
    """Of both panels: label, colour, dashed or not, and (x, y) of each line."""
    return [
        [
            (line.get_label(), line.get_color(), line.is_dashed(), line.get_xydata().tolist())
            for line in ax.lines
        ]
        for ax in _figure(metrics, "t").axes
    ]


def test_distance_and_sparsity_are_drawn():
    left, right = shown(lines(2.0, 0.5, 0.01))
    assert [points for *_, points in left] == [[[10, 2.0], [20, 0.5], [30, 0.01]]]
    gates, target = right
    assert gates[0] == "edge gates"
    assert gates[-1] == [[10, 0.1], [20, 0.2], [30, 0.3]]
    assert [y for _, y in target[-1]] == pytest.approx([0.15, 0.25, 0.35])


def test_targets_are_dashed_in_the_colour_of_their_gates():
    _, right = shown(lines(2.0, 1.0, node_sparsity=0.4, node_target=0.5))
    assert [line[0] for line in right][::2] == ["edge gates", "node gates"]
    assert [line[2] for line in right] == [False, True, False, True]
    colors = [line[1] for line in right]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert right[2][-1] == [[10, 0.4], [20, 0.4]]
    assert right[3][-1] == [[10, 0.5], [20, 0.5]]


def test_where_outputs_are_values_and_edges_have_a_price():
    metrics = lines(0.5, 0.25, kl=None, target=None)
    for line in metrics:
        line["unexplained"] = line["loss"]
    left, right = shown(metrics)
    assert [points for *_, points in left] == [[[10, 0.5], [20, 0.25]]]
    assert [line[0] for line in right] == ["edge gates"]
    assert _figure(metrics, "t").axes[0].get_ylabel() == "unexplained variance"


def test_axes_do_not_magnify_nothing():
    left, right = _figure(lines(-1e-8, 3e-9), "t").axes
    assert left.lines[0].get_ydata().tolist() == [1e-6, 1e-6]
    assert right.get_ylim()[0] <= 0 < 1 <= right.get_ylim()[1]


@pytest.mark.parametrize("distances", [[0.0], [0.5], [0.0, 0.0], [1e-9, 3.0, -1e-8], [1e30, 2.0]])
def test_any_distances_can_be_drawn(tmp_path, distances):
    path = tmp_path / "training.png"
    draw_training(lines(*distances), path, title="a_$b in {c}\\")
    assert path.read_bytes().startswith(b"\x89PNG")
