"""What each panel shows, by hand."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from edgefl.simulation.screen import plot
from edgefl.simulation.screen.plot import Run
from edgefl.testing import make_report


def rounds(count=3, **metrics):
    return [
        make_report(
            round=n, admitted=5, failed=n, up_bytes=10**6, down_bytes=2 * 10**6,
            metrics={name: value * n for name, value in metrics.items()},
        )
        for n in range(1, count + 1)
    ]  # fmt: skip


def numbers(rounds):
    return [one.round for one in rounds]


def run(name="a", color="C0", took_part=(), **metrics):
    return Run(name=name, rounds=rounds(**metrics), color=color, took_part=np.array(took_part, np.uint32))


@pytest.fixture
def axes():
    return Figure().subplots()


def test_accuracy_goes_alone_where_it_is_there(axes):
    plot.draw_metrics(axes, [run(accuracy=0.3, f1=0.1, loss=1.0)], numbers)
    assert axes.get_ylabel() == "accuracy"
    assert [line.get_ydata().tolist() for line in axes.lines] == [pytest.approx([0.3, 0.6, 0.9])]


def test_other_metrics_share_the_panel_and_runs_their_colour(axes):
    plot.draw_metrics(axes, [run(f1=0.3, recall=0.1), run("b", "C1", f1=0.1)], numbers)
    seen = [(line.get_label(), line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert seen == [("f1", "C0", "-"), ("recall", "C0", "--"), ("f1", "C1", "-")]


def test_no_metrics_are_said(axes):
    plot.draw_metrics(axes, [run(loss=1.0)], numbers)
    assert "no metrics" in axes.texts[0].get_text()


def test_losses_of_test_and_training(axes):
    plot.draw_losses(axes, [run(loss=1.0, train_loss=2.0)], numbers)
    assert [(line.get_label(), line.get_ydata().tolist()) for line in axes.lines] == [
        ("test", [1, 2, 3]), ("training", [2, 4, 6]),
    ]  # fmt: skip


def test_bytes_add_up_in_a_fitting_unit(axes):
    plot.draw_bytes(axes, [run()], numbers)
    assert axes.get_ylabel() == "transferred so far (MB)"
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2, 4, 6], [1, 2, 3]]


def test_of_several_runs_both_ways_together(axes):
    plot.draw_bytes(axes, [run(), run("b", "C1")], numbers)
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3, 6, 9]] * 2
    first, second = (line.get_linewidth() for line in axes.lines)
    assert first > second  # they lie on each other


def test_what_became_of_the_clients(axes):
    plot.draw_outcomes(axes, [run()])
    assert [bars.get_label() for bars in axes.containers] == ["admitted", "failed"]
    assert axes.get_ylim() == (0, pytest.approx(8 * 1.15))
    axes.clear()
    plot.draw_outcomes(axes, [run(), run("b")])
    assert [line.get_ydata().tolist() for line in axes.lines] == [[5, 5, 5]] * 2


def test_how_often_clients_took_part(axes):
    plot.draw_participation(axes, [run(took_part=[0, 0, 3, 1])])
    values, edges, _ = axes.patches[0].get_data()
    assert values.tolist() == [2, 1, 0, 1]
    assert edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert axes.get_yscale() == "linear"


def test_a_million_clients_are_few_bars_on_a_logarithm(axes):
    took_part = np.zeros(10**6, np.uint32)
    took_part[:7] = 500
    plot.draw_participation(axes, [run(took_part=took_part)])
    values = axes.patches[0].get_data().values
    assert (len(values) <= 40, values[0], values[-1]) == (True, 999_993, 7)
    assert axes.get_yscale() == "log"


def test_nobody_may_have_counted(axes):
    plot.draw_participation(axes, [run()])
    assert axes.texts[0].get_text() == "participation was not recorded"
