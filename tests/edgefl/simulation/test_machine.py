"""What the machine has and what was used."""

import subprocess
import sys

import numpy as np

from edgefl.simulation.machine import num_cores, own_peak_mb


def test_there_is_a_core():
    assert num_cores() >= 1


def test_the_peak_holds_what_was_held():
    held = np.ones(30_000_000, np.uint8)
    assert own_peak_mb() > held.nbytes / 2**20


def test_a_childs_peak_is_its_own():
    held = np.ones(300_000_000, np.uint8)
    script = "from edgefl.simulation.machine import own_peak_mb; print(own_peak_mb())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert 0 < float(done.stdout) < held.nbytes / 2**20
