import sys

import psutil
import pytest

from benchmarks.family import Family
from edgefl.local_fleet import LoggedProcess

# A child in a session of its own, ignoring SIGTERM, whose parent ends first.
DETACHES = """
import subprocess, sys
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
"""
SLEEPS = "import time; print('up', flush=True); time.sleep(60)"


def test_the_last_grandchild_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.family.ASK_S", 0.2)
    with Family(tmp_path) as family:
        parent = family.start("parent", [sys.executable, "-c", DETACHES])
        parent.wait_for("deaf", 30)
        parent.popen.wait(30)
        (grandchild,) = family.members()
        assert grandchild.pid != parent.pid
    assert not psutil.pid_exists(grandchild.pid) or grandchild.status() == psutil.STATUS_ZOMBIE


def test_leaving_by_ctrl_c_ends_it_too(tmp_path) -> None:
    def interrupted() -> None:
        with Family(tmp_path) as family:
            started.append(family.start("sleeper", [sys.executable, "-c", SLEEPS]))
            raise KeyboardInterrupt

    started: list[LoggedProcess] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].popen.poll() is not None


def test_another_family_is_left_alone(tmp_path) -> None:
    code = [sys.executable, "-c", SLEEPS]
    with Family(tmp_path) as ours:
        other = ours.start("other", code)
        other.wait_for("up", 30)
        with Family(tmp_path) as theirs:
            theirs.start("mine", code)
        assert other.popen.poll() is None


def test_its_environment_reaches_the_process(tmp_path) -> None:
    with Family(tmp_path, {"COLOUR": "green"}) as family:
        process = family.start("env", [sys.executable, "-c", "import os; print(os.environ['COLOUR'])"])
        process.wait_for("green", 30)
