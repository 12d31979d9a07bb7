"""A job on the screen."""

from __future__ import annotations

import dataclasses

import click
import pytest

from edgefl.app.commands.progress import left_running, round_progress, round_text
from edgefl.errors import CloudUnreachable
from edgefl.terminal.output import Output
from edgefl.testing import make_report

ROUND = make_report(
    round=2, admitted=3, rejected=1, missing=1, reasons={"cam-1": "weight 0"}, seconds=0.5, metrics={"accuracy": 0.9}
)
TEXT = "round 2/5: 3 admitted, 1 rejected, 1 missing in 0.50 s accuracy=0.9 (cam-1: weight 0)"


def test_a_round_by_hand():
    assert round_text(ROUND, 5) == TEXT
    quiet = dataclasses.replace(ROUND, rejected=0, missing=0, reasons={}, metrics={})
    assert round_text(quiet, 5) == "round 2/5: 3 admitted in 0.50 s"


def test_a_line_a_round_off_a_terminal(capsys):
    with round_progress(Output(), 5) as screen:
        screen.on_round(ROUND)
    assert capsys.readouterr().out == f"waiting for devices\n{TEXT}\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    for stream in ("sys.stdout", "sys.stderr"):
        monkeypatch.setattr(f"{stream}.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with round_progress(Output(), 5) as screen:
        screen.on_round(ROUND)
    seen = capsys.readouterr()
    assert TEXT in seen.err
    assert "waiting for devices" in seen.err
    assert seen.out == ""


def test_ctrl_c_leaves_the_job_and_says_so(capsys):
    with pytest.raises(click.exceptions.Exit) as ended, left_running(Output(), "job-1"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    said = capsys.readouterr().out
    assert "no longer watching; job job-1 continues in the cloud" in said
    assert "edgefl jobs watch job-1" in said
    assert "edgefl jobs cancel job-1" in said


def interrupted(*, is_asked_for, job="", fault=KeyboardInterrupt):
    with left_running(Output(), job) as standing:
        if is_asked_for:
            standing.ask()
        raise fault


@pytest.mark.parametrize(
    ("is_asked_for", "said"),
    [
        (False, "interrupted before the job was submitted; nothing runs in the cloud"),
        (True, "interrupted while submitting the job, which may run in the cloud. Check with: edgefl jobs list"),
    ],
)
def test_an_earlier_ctrl_c_says_what_the_cloud_has_of_the_job(capsys, is_asked_for, said):
    with pytest.raises(click.exceptions.Exit) as ended:
        interrupted(is_asked_for=is_asked_for)
    assert ended.value.exit_code == 130
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "is_asked_for", "said"),
    [
        ("job-1", True, "job job-1 continues in the cloud. Watch it with: edgefl jobs watch job-1"),
        ("", True, "which may run there. Check with: edgefl jobs list"),
        ("", False, ""),
    ],
)
def test_a_lost_cloud_leaves_the_job_and_says_so(capsys, job, is_asked_for, said):
    with pytest.raises(CloudUnreachable):
        interrupted(is_asked_for=is_asked_for, job=job, fault=CloudUnreachable("gone"))
    shown = capsys.readouterr().out
    assert said in shown if said else shown == ""


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_a_pause_is_told_beside_the_rounds(capsys, monkeypatch, on_a_terminal):
    for stream in ("sys.stdout", "sys.stderr"):
        monkeypatch.setattr(f"{stream}.isatty", lambda: on_a_terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with round_progress(Output(), 5) as screen:
        screen.tell_waiting("job-1", "waiting for disk space in /srv/cloud: full")
        screen.tell_waiting("job-1", "")
    seen = capsys.readouterr()
    said = seen.err if on_a_terminal else seen.out
    assert "job job-1 pauses: the cloud is waiting for disk space in /srv/cloud: full. It continues by itself" in said
    assert "job job-1 continues: the cloud no longer waits" in said


def test_a_reason_stays_on_its_line():
    outcome = make_report(failed=1, metrics={"a\x1b": None}, reasons={"cam\n": "\x1b[2J[red]boom\nround 2: 9 admitted"})
    shown = round_text(outcome, 3)
    assert shown.endswith("a\\x1b=- (cam : \\x1b[2J[red]boom round 2: 9 admitted)")
    assert "\n" not in shown


def test_why_a_device_did_not_evaluate_is_said_once(capsys):
    with round_progress(Output(None), 2) as screen:
        for number in (1, 2):
            screen.on_round(make_report(round=number, not_evaluated={"cam-1": "no card", "cam-2": "no card"}))
    assert capsys.readouterr().out.count("not evaluated: cam-1, cam-2: no card") == 1
