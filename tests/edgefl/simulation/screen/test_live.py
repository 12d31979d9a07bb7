"""A simulation on the screen."""

import dataclasses
import io

import pytest
from rich.console import Console

from edgefl.simulation.screen import live
from edgefl.simulation.screen.live import Progress, duration_text, live_rounds, size_text
from edgefl.terminal.output import Output
from edgefl.testing import make_report

OUTCOME = make_report(
    admitted=8, rejected=1, failed=1, seconds=2.0, up_bytes=1_000_000, down_bytes=500_000, metrics={"accuracy": 0.5},
    reasons={f"c{n}": "no data" for n in range(5)},
)  # fmt: skip


def test_the_time_left_is_told_by_the_last_rounds():
    progress = Progress(21)
    progress.begin("loop", now_s=100.0)
    cells = progress.note(OUTCOME, now_s=103.0)
    assert cells == ("1/21", "8 admitted, 1 rejected, 1 failed", "4", "1.5 MB", "1:00", "accuracy=0.5")
    cells = progress.note(dataclasses.replace(OUTCOME, round=11), now_s=104.0)
    assert cells[4] == "0:20"


def test_nobody_may_know_how_many_rounds_there_will_be():
    progress = Progress(None)
    progress.begin("flower", now_s=0.0)
    assert progress.note(OUTCOME, now_s=1.0)[::4] == ("1", "?")


def test_a_terminal_sees_a_table():
    progress = Progress(2)
    progress.begin("stacked", "measured: [fast]", now_s=0.0)
    progress.note(OUTCOME, now_s=1.0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(progress.table())
    text = console.export_text()
    assert "engine stacked: measured: [fast]" in text
    assert "accuracy=0.5" in text
    assert "round 1: c0, c1, c2 and 2 more: no data" in text


def test_elsewhere_there_is_a_line_a_round(capsys):
    with live_rounds(Output(), Progress(2)) as screen:
        screen.on_engine("loop", "it was asked for")
        screen.on_round(OUTCOME)
    engine, line = capsys.readouterr().out.splitlines()
    assert engine == "engine loop: it was asked for"
    assert line.startswith("round 1/2: 8 admitted, 1 rejected, 1 failed, 4 clients/s, 1.5 MB moved, ")
    assert line.endswith("accuracy=0.5 (c0, c1, c2 and 2 more: no data)")


def test_a_terminal_is_updated(monkeypatch, capsys):
    monkeypatch.setattr(live.sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(live.sys.stderr, "isatty", lambda: True)
    with live_rounds(Output(), Progress(2)) as screen:
        screen.on_engine("loop", "it was asked for")
        screen.on_round(OUTCOME)
    seen = capsys.readouterr()
    assert "1/2" in seen.err
    assert seen.out == ""  # a line between two drawings would be drawn over


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2.5e9, "2.5 GB"), (3e17, "3e+05 TB")]
)
def test_sizes(num_bytes, text):
    assert size_text(num_bytes) == text


def test_durations():
    assert [duration_text(seconds) for seconds in (7.4, 60, 3725)] == ["0:07", "1:00", "1:02:05"]
