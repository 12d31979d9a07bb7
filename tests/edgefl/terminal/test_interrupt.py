"""The first Ctrl-C is graceful, the second interrupts."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgefl.terminal.interrupt import set_by_interrupt


def test_the_first_sets_the_event_and_the_second_interrupts():
    before, stop = signal.getsignal(signal.SIGINT), threading.Event()
    with set_by_interrupt(stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere():
        with set_by_interrupt(threading.Event()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert seen == [before]


def pressed_in_mid_run(words, folder):
    """Start the command, press Ctrl-C as a terminal does (to the whole process group) after round 2; its result."""
    edgefl, target = Path(sys.executable).with_name("edgefl"), folder / "a.json"
    command = [edgefl, "simulate", *words, "--rounds", "100000", "--json", target, "--plot", folder / "a.png"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("round 2/"):
                os.killpg(process.pid, signal.SIGINT)
                break
        process.stdout.read()
    assert process.returncode == 130
    assert (folder / "a.png").exists()
    return json.loads(target.read_text())


@pytest.mark.parametrize("engine", [pytest.param("loop", marks=pytest.mark.soak), "stacked", "pool"])
def test_the_command_keeps_what_there_is(tasks, tmp_path, engine):
    said = pressed_in_mid_run([tasks("task"), "--clients", "40", "--engine", engine], tmp_path)
    assert said["interrupted"]
    assert 2 <= len(said["rounds"]) < 100000
    assert said["engine"] == engine
    assert {"accuracy", "loss"} <= said["final"].keys()


@pytest.mark.parametrize("engine", ["loop", pytest.param("pool", marks=pytest.mark.soak)])
def test_a_flower_app_keeps_what_there_is(tmp_path, engine):
    app = Path(__file__).parents[3] / "examples" / "flower-app"
    said = pressed_in_mid_run([app, "--clients", "3", "--engine", engine], tmp_path)
    assert said["interrupted"]
    assert "accuracy" in said["rounds"][0]["metrics"]  # what the server evaluated by itself
