"""kill -9 of whatever starts processes: none of them is left, not even at work."""

import os
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from cloud.broker.child import find_mosquitto

MARK = "EDGEFL_TEST_MARK"
BUSY = """
import time
from pathlib import Path

import numpy as np
from edgefl import FitResult, Task


def fit(parameters, config, options):
    print("fit begins", flush=True)
    while True:
        time.sleep(0.1)


task = Task(name="busy", initial=lambda: {"w": np.zeros(2, np.float32)}, fit=fit)
"""


def marked(mark):
    """Return every process that has inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def killed_at(tmp_path):
    """Run edgefl until it says a line, kill it with -9, and return what of it is left ten seconds later."""

    def run(line, *command, least):
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgefl", *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, MARK: mark, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        said = []
        for text in process.stdout:
            said.append(text)
            if line in text:
                break
        else:
            raise AssertionError("".join(said))
        assert len(marked(mark)) >= least, said
        process.kill()
        process.wait(10)
        process.stdout.close()
        end = time.monotonic() + 10
        while (left := marked(mark)) and time.monotonic() < end:
            time.sleep(0.1)
        names = [one.cmdline() for one in left]
        for one in left:
            one.kill()
        return names

    return run


@pytest.mark.parametrize("broker", ["builtin", "embedded", "mosquitto"])
def test_a_demo_takes_all_its_processes_along(killed_at, broker):
    if broker != "builtin" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed; deploy/system-packages.sh installs it")
    assert killed_at("round 1", "demo", "--devices", "2", "--broker", broker, least=4) == []


@pytest.mark.parametrize("engine", ["pool", "ray"])
def test_a_simulation_takes_its_workers_along(killed_at, tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray")
    task = tmp_path / "task"
    task.mkdir()
    (task / "busy_task.py").write_text(BUSY)
    (task / "pyproject.toml").write_text('[tool.edgefl]\ntask = "busy_task:task"\n')
    line = "fit begins" if engine == "pool" else "engine"
    assert killed_at(line, "simulate", str(task), "--engine", engine, "--clients", "4", least=2) == []
