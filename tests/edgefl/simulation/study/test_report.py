"""What a simulation returns."""

import sys

import numpy as np
import pytest

from edgefl.errors import MissingExtra
from edgefl.simulation.study.report import SimulationResult
from edgefl.testing import make_report


def result(rounds):
    return SimulationResult(
        task="digits", engine="loop", engine_reason="it was asked for", rounds=rounds, final={"accuracy": 0.5},
        seconds=4.0, round_seconds=2.0, peak_rss_mb=100.0, parameters={"w": np.zeros(1)},
        model={"sha256": "0", "path": None},
    )  # fmt: skip


ROUNDS = [
    make_report(round=n, admitted=3, up_bytes=1, down_bytes=2, metrics={"accuracy": 0.25 * n}) for n in (1, 2)
]  # fmt: skip


def test_the_json_has_the_contracts_keys():
    said = result(ROUNDS).as_json()
    wanted = {"rounds", "final", "seconds", "clients_per_second", "engine", "engine_reason", "peak_rss_mb", "model"}
    assert wanted <= said.keys()
    assert (said["clients_per_second"], said["rounds"]) == (3.0, [one.as_json() for one in ROUNDS])


def test_a_frame_has_a_row_a_round():
    frame = result(ROUNDS).to_frame()
    assert frame.index.tolist() == [1, 2]
    assert frame["accuracy"].tolist() == [0.25, 0.5]
    assert frame["up_bytes"].tolist() == [1, 1]
    assert len(result([]).to_frame()) == 0


def test_a_figure_is_drawn():
    assert len(result(ROUNDS).figure().axes) == 8


def test_nothing_done_is_no_rate(monkeypatch):
    assert SimulationResult.clients_per_second.fget(result([])) == 0.0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="sim"):
        result(ROUNDS).to_frame()
