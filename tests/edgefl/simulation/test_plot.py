"""The picture of the rounds."""

import sys
from pathlib import Path

import pytest

from edgefl.errors import ConfigError, MissingExtra
from edgefl.simulation.plot import draw_rounds, write_plot


def rounds(count=3, **metrics):
    return [
        {"round": n, "admitted": 5, "rejected": 0, "failed": n, "missing": 0, "up_bytes": 10**6,
         "down_bytes": 2 * 10**6, "metrics": {name: value * n for name, value in metrics.items()}}
        for n in range(1, count + 1)
    ]  # fmt: skip


def test_one_run_shows_four_panels():
    metrics, losses, traffic, clients = draw_rounds({"digits": rounds(accuracy=0.3, loss=1.0, train_loss=2.0)}).axes
    assert [axes.get_title() for axes in (metrics, losses, traffic, clients)] == [
        "accuracy", "loss", "megabytes moved, in all", "clients",
    ]  # fmt: skip
    assert metrics.lines[0].get_ydata().tolist() == pytest.approx([0.3, 0.6, 0.9])
    assert [line.get_label() for line in losses.lines] == ["test", "training"]
    assert [line.get_ydata().tolist() for line in traffic.lines] == [[2, 4, 6], [1, 2, 3]]
    assert [container.get_label() for container in clients.containers] == ["admitted", "failed"]


def test_several_runs_share_the_axes():
    runs = {"lr=0.1": rounds(f1=0.5, recall=0.1), "lr=0.2": rounds(f1=0.6)}
    metrics, _, traffic, clients = draw_rounds(runs).axes
    assert [line.get_label() for line in metrics.lines] == ["lr=0.1, f1", "lr=0.1, recall", "lr=0.2, f1"]
    assert len(traffic.lines) == 4
    assert [line.get_label() for line in clients.lines] == ["lr=0.1, admitted", "lr=0.2, admitted"]


def test_it_is_written_by_the_files_name(tmp_path):
    write_plot({"digits": rounds(accuracy=0.3)}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_plot({"nothing": []}, tmp_path / "b.svg")
    with pytest.raises(ConfigError, match="cannot write --plot"):
        write_plot({}, Path(tmp_path / "no" / "c.png"))
    with pytest.raises(ConfigError, match="cannot write --plot"):
        write_plot({}, tmp_path / "c.what")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="sim"):
        draw_rounds({})
