"""The picture of the rounds."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError, MissingExtra
from edgefl.simulation.screen.plot import draw_rounds, write_plot
from edgefl.testing import make_report


def rounds(count=3, seconds=0.5, virtual_s=None, **metrics):
    return [
        make_report(
            round=n, admitted=5, failed=n, up_bytes=10**6, down_bytes=2 * 10**6, seconds=seconds,
            metrics={name: value * n for name, value in metrics.items()},
            virtual_end_s=n * virtual_s if virtual_s else None,
        )
        for n in range(1, count + 1)
    ]  # fmt: skip


def labels(figure):
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def test_one_run_shows_rounds_and_time_side_by_side():
    figure = draw_rounds({"digits": rounds(accuracy=0.3, loss=1.0)}, {"digits": np.array([3, 3, 0], np.uint32)})
    assert labels(figure) == [
        ("round", "accuracy"), ("time in rounds (seconds)", ""), ("round", "loss"), ("time in rounds (seconds)", ""),
        ("round", "transferred so far (MB)"), ("time in rounds (seconds)", ""), ("round", "clients per round"),
        ("number of rounds per client", "clients"),
    ]  # fmt: skip
    over_time = figure.axes[1].lines[0]
    assert over_time.get_xdata().tolist() == [0.5, 1.0, 1.5]
    assert over_time.get_ydata().tolist() == pytest.approx([0.3, 0.6, 0.9])
    assert figure.get_suptitle() == "digits"


@pytest.mark.parametrize(("virtual_s", "unit", "last"), [(10, "seconds", 30), (100, "minutes", 5), (86400, "days", 3)])
def test_virtual_time_goes_before_real(virtual_s, unit, last):
    figure = draw_rounds({"digits": rounds(virtual_s=virtual_s, loss=1.0)})
    assert figure.axes[3].get_xlabel() == f"virtual time ({unit})"
    assert figure.axes[3].lines[0].get_xdata()[-1] == last


def test_several_runs_have_one_legend():
    names = [f"train.lr={number}" for number in range(12)]
    figure = draw_rounds({name: rounds(accuracy=0.3) for name in names})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert len({str(line.get_color()) for line in figure.axes[0].lines}) == 12


def test_panels_in_which_all_runs_are_equal_are_left_out():
    counts = np.array([3, 3, 0], np.uint32)
    figure = draw_rounds({"a": rounds(accuracy=0.3), "b": rounds(accuracy=0.2)}, {"a": counts, "b": counts})
    assert labels(figure) == [
        ("round", "accuracy"), ("time in rounds (seconds)", ""),
        ("round", "loss (dotted: in training)"), ("time in rounds (seconds)", ""),
    ]  # fmt: skip
    shorter = draw_rounds({"a": rounds(accuracy=0.3), "b": rounds(2, accuracy=0.2)}, {"a": counts})
    assert labels(shorter) == labels(figure)
    other = [dataclasses.replace(one, admitted=4, up_bytes=9) for one in rounds(accuracy=0.2)]
    more = draw_rounds({"a": rounds(accuracy=0.3), "b": other}, {"a": counts, "b": counts + 1})
    assert [label for _, label in labels(more)][4:] == [
        "transferred so far, up and down (MB)", "", "clients admitted", "clients",
    ]  # fmt: skip


def test_a_diverged_run_is_named_and_flattens_nothing():
    figure = draw_rounds({"a": rounds(loss=1.0), "b": rounds(loss=1.2), "wild": rounds(loss=1e5)})
    axes = figure.axes[2]
    assert axes.get_ylim()[1] < 5
    assert axes.get_title(loc="right") == "outside: wild"
    assert axes.get_yscale() == "linear"


def test_it_is_written_by_the_files_name(tmp_path):
    write_plot({"digits": rounds(accuracy=0.3)}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_plot({"nothing": []}, tmp_path / "b.svg")
    with pytest.raises(ConfigError, match="cannot write the plot"):
        write_plot({}, Path(tmp_path / "no" / "c.png"))
    with pytest.raises(ConfigError, match="cannot write the plot"):
        write_plot({}, tmp_path / "c.what")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="sim"):
        draw_rounds({})
