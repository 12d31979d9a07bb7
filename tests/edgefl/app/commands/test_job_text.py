"""Text about jobs: progress, ends, and the page of one job."""

from __future__ import annotations

import pytest

from edgefl.app.commands.job_text import ended_text, print_comparison, print_job, progress_text
from edgefl.operator.history import compared
from edgefl.terminal.output import Output, time_text


def job_of(**over):
    rounds = [
        {"round": number, "metrics": {"f1": number / 4}, "reasons": {f"cam-{number}": "NaN in w"}, "admitted": 3,
         "rejected": 1, "failed": 0, "missing": 0, "seconds": 0.5, "up_bytes": 1500, "down_bytes": 0}
        for number in range(1, 6)
    ]  # fmt: skip
    return {
        "id": "job-1", "label": "first", "name": "digits", "kind": "train", "state": "done", "error": None,
        "created_s": 0.0, "ended_s": 9.0, "rounds_done": 5, "config": {"rounds": {"count": 5}}, "rounds": rounds,
    } | over  # fmt: skip


def test_progress_and_end():
    relay = {"kind": "relay", "sent": 4, "answered": 3}
    assert (progress_text(job_of()), progress_text(job_of(), " rounds")) == ("5/5", "5/5 rounds")
    assert progress_text(relay) == "3/4 messages"
    failed = job_of(state="failed", error="no quorum")
    assert ended_text(failed) == f"it failed at {time_text(9.0)}, after 5/5 rounds (no quorum)"


@pytest.mark.parametrize("columns", [80, 60])
def test_the_page_of_a_job_tells_each_reason_once(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_job(job_of(), Output())
    assert capsys.readouterr().out.splitlines() == [
        "job-1 'first' digits: done, 5/5 rounds",
        f"started {time_text(0.0)}, took 9.0 s",
        "settings: rounds.count=5, others as by default",
        "rounds 1 to 5: 15 admitted, 5 rejected; 0.50 s per round; 0 bytes down, 7.5 kB up",
        "",
        "metric\tfirst\tlast\tlowest\thighest\tcurve",
        "f1\t0.25\t1.25\t0.25\t1.25\t▁▃▅▇█",
        "",
        "refused or failed:",
        "  5 times, last in round 5 (cam-1, cam-2, cam-3 and 2 more): NaN in w",
    ]


def test_a_job_that_has_just_started_says_what_it_waits_for(capsys):
    print_job(job_of(rounds=[], rounds_done=0, state="running", ended_s=None, waiting="for disk space"), Output())
    assert capsys.readouterr().out.splitlines()[1] == "for disk space"


def test_jobs_that_are_equal_say_so(capsys):
    print_comparison(compared([job_of(), job_of(id="job-2", label=None)]), Output())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["A: job-1 'first'", "B: job-2"]
    assert "the settings are the same" in lines
    assert lines[-1] == "f1\t1.25\t1.25\t+0"
