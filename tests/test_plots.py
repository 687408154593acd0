"""Plots: what they show, that they are reproducible, and that any values can be drawn."""

import pytest

from edgeprune.config import OBJECTIVES
from edgeprune.drawing import Line, Panel, Ranks, draw_frontier, draw_training

# ------------------------------------------------------------------------------------- training


def lines(*distances: float, **more) -> list[dict]:
    """Steps 10, 20, ... with sparsity .1, .2, ... and targets .05 above."""
    return [
        {
            "step": 10 * i, "kl": distance, "sparsity": i / 10,
            "target": i / 10 + 0.05, "node_sparsity": None, "node_target": None, **more,
        }
        for i, distance in enumerate(distances, 1)
    ]  # fmt: skip


def shown(axes) -> list[tuple]:
    """Label, colour, whether dashed, and points of each line."""
    return [
        (line.get_label(), line.get_color(), line.is_dashed(), line.get_xydata().tolist())
        for line in axes.lines
    ]


@pytest.fixture
def plot(tmp_path):
    return lambda metrics: draw_training(metrics, tmp_path / "p.svg", title="t").axes


def test_distance_and_sparsity_are_drawn(plot):
    left, right = map(shown, plot(lines(2.0, 0.5, 0.01)))
    assert [points for *_, points in left] == [[[10, 2.0], [20, 0.5], [30, 0.01]]]
    gates, target = right
    assert gates[-1] == [[10, 0.1], [20, 0.2], [30, 0.3]]
    assert [y for _, y in target[-1]] == pytest.approx([0.15, 0.25, 0.35])


def test_the_ranks_of_the_strongest_edges_are_drawn_rank_1_on_top(tmp_path):
    ranks = Ranks([0, 4, 9], [[90, 2, 1], [50, 1, 2]], ["a → b", "c → d"], 100)
    figure = draw_training(lines(2.0, 1.0), tmp_path / "p.svg", title="t", ranks=ranks)
    right = figure.axes[2]
    drawn = {line[0]: line[-1] for line in shown(right)}
    assert drawn == {"a → b": [[0, 90], [4, 2], [9, 1]], "c → d": [[0, 50], [4, 1], [9, 2]]}
    bottom, top = right.get_ylim()
    assert bottom > top


def test_targets_are_dashed_in_the_colour_of_their_gates(plot):
    right = shown(plot(lines(2.0, 1.0, node_sparsity=0.4, node_target=0.5))[1])
    assert [line[0] for line in right][::2] == ["edge gates", "node gates"]
    assert [line[2] for line in right] == [False, True, False, True]
    colors = [line[1] for line in right]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert [line[-1][0] for line in right[2:]] == [[10, 0.4], [10, 0.5]]


def test_unexplained_variance_replaces_the_kl_and_a_target_may_be_missing(plot):
    metrics = lines(0.5, 0.4, target=None)
    for line in metrics:
        line["unexplained"] = line.pop("kl")
    left, right = plot(metrics)
    assert [points for *_, points in shown(left)] == [[[10, 0.5], [20, 0.4]]]
    assert [line[0] for line in shown(right)] == ["edge gates"]
    assert left.get_ylabel() != plot(lines(0.5))[0].get_ylabel()


def of_every_size(objective: str, *values: float) -> list[dict]:
    """Steps 1, 2, ... at 100, 50, 33, ... edges."""
    return [
        {"step": i, objective: value, "num_edges": 100 / i, "learning_rate": 0.1}
        for i, value in enumerate(values, 1)
    ]


def test_steps_at_random_sizes_are_points_against_the_step_and_against_the_size(plot):
    left, right, *scales = plot(of_every_size("kl", 2.0, 0.5, 0.1))
    points = [ax.collections[0].get_offsets().tolist() for ax in (left, right)]
    assert points[0] == [[1, 2.0], [2, 0.5], [3, 0.1]]
    assert points[1] == [[100, 2.0], [50, 0.5], [pytest.approx(100 / 3), 0.1]]
    colors = [ax.collections[0].get_array().tolist() for ax in (left, right)]
    assert colors == [[100, 50, pytest.approx(100 / 3)], [1, 2, 3]]
    assert len(scales) == 2
    assert right.get_xscale() == left.get_yscale() == right.get_yscale() == "log"


def test_an_objective_may_be_negative(plot):
    left, right, *_ = plot(of_every_size("max_logit_difference", 2.0, -0.5, -3.0))
    for ax in (left, right):
        assert ax.get_ylim()[0] < -3 and ax.get_ylim()[1] > 2
        assert ax.get_yscale() == "linear"


@pytest.mark.parametrize("objective", [*OBJECTIVES, "unexplained"])
@pytest.mark.parametrize("values", [[0.0], [0.5], [1e-9, 3.0, -1e-8], [1e30, 2.0]])
def test_any_objective_and_any_values_can_be_drawn(tmp_path, objective, values):
    path = tmp_path / "training.png"
    draw_training(of_every_size(objective, *values), path, title="t")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rounding_errors_are_not_magnified(plot):
    left, right = plot(lines(-1e-8, 3e-9))
    assert left.lines[0].get_ydata().tolist() == [1e-6, 1e-6]
    assert right.get_ylim()[0] <= 0 < 1 <= right.get_ylim()[1]


@pytest.mark.parametrize("distances", [[0.0], [0.5], [1e-9, 3.0, -1e-8], [1e30, 2.0]])
def test_any_distances_can_be_drawn(tmp_path, distances):
    path = tmp_path / "training.png"
    draw_training(lines(*distances), path, title="a_$b in {c}\\")
    assert path.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------- frontier


@pytest.mark.parametrize("name", ["", "<b> $x_1$ & \\n {} %"])
def test_names_are_not_parsed_and_the_same_plot_is_the_same_file(tmp_path, name):
    lines = [
        Line(name, [10, 0], [0.1, 0.0], [0.0, 0.0], [0.2, 0.0]),
        Line("b", [5], [1], [1], [1]),
    ]
    panels = [
        Panel("KL", lines, [("full", 1.0)], log=True), Panel("accuracy", lines, [], log=False),
    ]  # fmt: skip
    for suffix in ("svg", "pdf", "png"):
        first, second = (tmp_path / f"{number}.{suffix}" for number in (1, 2))
        for path in (first, second):
            draw_frontier(panels, path, title=name or "t", all_edges=100)
        assert first.read_bytes() == second.read_bytes()
    if name:  # matplotlib writes the text that it draws as outlines into comments
        assert "$x_1$" in (tmp_path / "1.svg").read_text()


LINE = Line("", [9, 5], [0.18, 0.9], [0.18, 0.9], [0.18, 0.9])


def test_less_than_two_decades_have_labels_between_powers_of_ten(tmp_path):
    panel = Panel("KL", [LINE], [], log=True)
    figure = draw_frontier([panel], tmp_path / "p.svg", title="t", all_edges=9)
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert {"0.2", "0.5", "1"} <= set(labels)


def test_axes_from_no_edges_to_all_hold_all_points_and_few_ticks(tmp_path):
    """KL divergences of 0 come out slightly negative, and sizes may be close to each other."""
    sizes = [5524, 552, 276, 110, 55, 28, 6, 0]
    kl = [-3e-9, 0.0009, 0.001, 2.0, 9.7, 13.8, 14.76, 14.76]
    panel = Panel("KL", [Line("", sizes, kl, kl, kl)], [("all corrupted", 14.76)], log=True)
    figure = draw_frontier([panel], tmp_path / "p.svg", title="t", all_edges=5524)
    (ax,) = figure.axes
    in_axes = (ax.transData - ax.transAxes).transform
    points = in_axes(list(zip(sizes, kl, strict=True)))
    assert ax.get_ylim()[0] == 0
    assert 0 < points[-1][0] < 0.1
    assert 0.9 < points[0][0] < 1
    assert max(y for _, y in points) < 1
    ticks = ax.get_xticks()
    assert {0, 5524} < set(ticks) < set(sizes)
    places = in_axes([(x, 1) for x in ticks])[:, 0]
    assert abs(places[:-1] - places[1:]).min() >= 0.1


def test_names_of_levels_are_where_curves_are_not(tmp_path):
    panels = [
        Panel("exact match", [LINE], [("full", 1.0), ("empty", 0.0)], log=False),
        Panel("KL", [LINE], [("empty", 5.0)], log=True),
    ]
    figure = draw_frontier(panels, tmp_path / "p.svg", title="t", all_edges=9)
    places = [{text.get_text(): text.get_ha() for text in ax.texts} for ax in figure.axes]
    assert places == [{"full": "left", "empty": "right"}, {"empty": "right"}]
