import signal
import socket
import sys
import time

import psutil
import pytest

from edgefl.errors import ProcessFailed
from edgefl.local_fleet import LocalFleet, LoggedProcess, free_ports

CHILD = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"


def start(tmp_path, code):
    return LoggedProcess([sys.executable, "-c", code], tmp_path / "child.log")


def test_a_line_is_waited_for_and_all_are_kept(tmp_path):
    process = start(tmp_path, "print('one'); print('two ready'); print('three')")
    assert process.wait_for("ready", 10) == 2
    assert process.wait_for("three", 10, after=2) == 3
    process.popen.wait(10)
    assert process.stop() == 0
    assert (tmp_path / "child.log").read_text() == "one\ntwo ready\nthree\n"


def test_a_process_that_ends_or_says_nothing_is_reported_with_its_last_lines(tmp_path):
    ended = start(tmp_path, "print('no such port')")
    with pytest.raises(ProcessFailed, match=r"(?s)did not say 'ready' \(it ended\).*no such port"):
        ended.wait_for("ready", 10)
    silent = start(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ProcessFailed, match=r"not within 0.05 s"):
        silent.wait_for("ready", 0.05)
    assert silent.stop() == -signal.SIGTERM
    ended.stop()


def test_kill_takes_the_children_too(tmp_path):
    process = start(tmp_path, CHILD + "print(p.pid, 'ready', flush=True); time.sleep(60)")
    process.wait_for("ready", 10)
    child = psutil.Process(int((tmp_path / "child.log").read_text().split()[0]))
    process.kill()
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone


def test_a_process_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("edgefl.local_fleet.STOP_S", 0.3)
    process = start(tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)")
    process.wait_for("up", 10)
    start_s = time.monotonic()
    assert process.stop() == -signal.SIGKILL
    assert time.monotonic() - start_s < 10


def test_free_ports_differ():
    assert len(set(free_ports(5))) == 5


def test_a_free_port_is_not_given_to_an_outgoing_connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getsockname()[1] > max(free_ports(20))


def test_a_failing_command_shows_what_it_said(tmp_path):
    with LocalFleet(tmp_path) as fleet, pytest.raises(ProcessFailed, match=r"cloud token failed: error: .*home"):
        fleet.token()
