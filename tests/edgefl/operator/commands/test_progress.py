"""A job on the screen."""

from __future__ import annotations

import click
import pytest

from edgefl.errors import CloudUnreachable
from edgefl.operator.commands.progress import left_running, round_progress, round_text
from edgefl.terminal.output import Output

ROUND = {
    "round": 2, "admitted": 3, "rejected": 1, "failed": 0, "missing": 1, "reasons": {"cam-1": "weight 0"},
    "seconds": 0.5, "metrics": {"accuracy": 0.9},
}  # fmt: skip
TEXT = "round 2/5: 3 admitted, 1 rejected, 1 missing in 0.50 s accuracy=0.9 (cam-1: weight 0)"


def test_a_round_by_hand():
    assert round_text(ROUND, 5) == TEXT
    quiet = ROUND | {"rejected": 0, "missing": 0, "reasons": {}, "metrics": {}}
    assert round_text(quiet, 5) == "round 2/5: 3 admitted in 0.50 s"


def test_a_line_a_round_off_a_terminal(capsys):
    with round_progress(Output(), 5) as on_round:
        on_round(ROUND)
    assert capsys.readouterr().out == TEXT + "\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    for stream in ("sys.stdout", "sys.stderr"):
        monkeypatch.setattr(f"{stream}.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with round_progress(Output(), 5) as on_round:
        on_round(ROUND)
    seen = capsys.readouterr()
    assert TEXT in seen.err
    assert "waiting for devices" in seen.err
    assert seen.out == ""


def test_ctrl_c_leaves_the_job_and_says_so(capsys):
    with pytest.raises(click.exceptions.Exit) as ended, left_running("job-1", Output()):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    said = capsys.readouterr().out
    assert "edgefl jobs watch job-1" in said
    assert "edgefl jobs cancel job-1" in said


def test_a_lost_cloud_leaves_the_job_and_says_so(capsys):
    with pytest.raises(CloudUnreachable), left_running("job-1", Output()):
        raise CloudUnreachable("gone")
    assert "edgefl jobs watch job-1" in capsys.readouterr().out


def test_a_reason_stays_on_its_line():
    outcome = {"round": 1, "admitted": 1, "rejected": 0, "failed": 1, "missing": 0, "seconds": 1.0,
               "metrics": {"a\x1b": None}, "reasons": {"cam\n": "\x1b[2J[red]boom\nround 2: 9 admitted"}}  # fmt: skip
    shown = round_text(outcome, 3)
    assert shown.endswith("a\\x1b=- (cam : \\x1b[2J[red]boom round 2: 9 admitted)")
    assert "\n" not in shown
