"""What devices evaluated, in a plot: where the parameters were made, with the spread and the worst tenth."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from edgefl.records import RoundReport
from edgefl.simulation.screen.on_devices import draw_on_devices, evaluated_names
from edgefl.simulation.screen.plot import draw_rounds
from edgefl.testing import make_report


def _evaluated(mean: float, **others: float) -> dict[str, float]:
    return {
        "devices/count": 3.0, "devices/gain": mean, "devices/gain/std": 0.5, "devices/gain/worst_tenth": mean - 1,
        **others,
    }  # fmt: skip


ROUNDS = [make_report(round=number, metrics=_evaluated(float(number))) for number in (1, 2)]


def _lines(*, spread: bool, final: dict[str, float]) -> tuple[dict[str, Any], list[Any]]:
    axes = Figure().subplots()
    draw_on_devices(
        axes, ROUNDS, final, "gain", lambda rounds: [one.round for one in rounds], color="C1", spread=spread
    )
    lines = {str(line.get_label()): [list(map(float, part)) for part in line.get_data()] for line in axes.lines}
    return lines, list(axes.collections)


def test_a_rounds_evaluation_is_drawn_where_its_parameters_were_made() -> None:
    lines, bands = _lines(spread=True, final=_evaluated(5.0))
    assert lines == {
        "gain on devices": [[0, 1, 2], [1, 2, 5]],
        "the worst tenth": [[0, 1, 2], [0, 1, 4]],
    }
    assert len(bands) == 1


def test_several_runs_have_their_mean_alone() -> None:
    lines, bands = _lines(spread=False, final={})
    assert lines == {"gain on devices": [[0, 1], [1, 2]]}
    assert bands == []


def test_the_names_are_those_with_a_spread() -> None:
    assert evaluated_names(ROUNDS) == {"gain"}
    assert evaluated_names([make_report(metrics={"accuracy": 1.0})]) == set()


@pytest.mark.parametrize("central", [{}, {"accuracy": 0.5}])
def test_a_plot_shows_devices_beside_the_test_data_or_alone(central: dict[str, float]) -> None:
    name = "accuracy" if central else "gain"
    metrics = {key.replace("gain", name): value for key, value in _evaluated(0.5).items()} | central
    rounds: list[RoundReport] = [make_report(round=number, metrics=metrics) for number in (1, 2)]
    figure = draw_rounds({"run": rounds}, finals={"run": metrics})
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == [*central, f"{name} on devices", "the worst tenth"]


def test_several_runs_say_which_lines_are_of_devices() -> None:
    figure = draw_rounds({"a": ROUNDS, "b": ROUNDS}, finals={"a": _evaluated(5.0)})
    assert figure.axes[0].get_ylabel() == "gain (dashed: on devices)"
    assert figure.axes[2].get_ylabel() == "loss (dotted: in training, dashed: on devices)"
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[0, 1, 2], [0, 1]]
