"""The process itself: it hears of Ctrl-C from its parent, and ends with it."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

CODE = """
import os, sys
from edgefl.simulation.isolation.process import OwnProcess
process = OwnProcess()
print(process._child._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_the_command_whatever_ends_that(tmp_path):
    with subprocess.Popen([sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        child = psutil.Process(int(command.stdout.readline()))
        command.kill()
    child.wait(60)
    assert not child.is_running()


@pytest.mark.parametrize("whom", ["the command", "the group"])
def test_one_interrupt_ends_a_round_and_not_a_process(tasks, tmp_path, whom):
    words = ["simulate", str(tasks("task")), "--clients", "40", "--engine", "loop", "--rounds", "100000"]
    command = [sys.executable, "-m", "edgefl", *words, "--json", str(tmp_path / "a.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("round 2/"):
                (os.kill if whom == "the command" else os.killpg)(process.pid, signal.SIGINT)
                break
        process.stdout.read()
    assert process.returncode == 130
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["interrupted"]
    assert said["rounds"][-1]["admitted"] > 0
