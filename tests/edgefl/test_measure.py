"""What the machine has and what was used."""

import gc
import platform
import subprocess
import sys

import numpy as np
import psutil
import pytest

from edgefl.measure import give_back_memory, how_ended, num_cores, own_peak_mb, seldom_collected


def test_there_is_a_core():
    assert num_cores() >= 1


def test_the_peak_holds_what_was_held():
    held = np.ones(30_000_000, np.uint8)
    assert own_peak_mb() > held.nbytes / 2**20


def test_a_childs_peak_is_its_own():
    held = np.ones(300_000_000, np.uint8)
    script = "from edgefl.measure import own_peak_mb; print(own_peak_mb())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert 0 < float(done.stdout) < held.nbytes / 2**20


def test_garbage_is_collected_as_before_in_the_end():
    before = gc.get_threshold()
    with seldom_collected():
        assert gc.get_threshold() > before
    assert gc.get_threshold() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_free_goes_back():
    process, held = (
        psutil.Process(),
        [bytearray(60_000) for _ in range(2000)],
    )  # each too small for a mapping of its own
    kept = bytearray(60_000)  # what lies above would keep the heap as it is
    held_bytes = process.memory_info().rss
    held.clear()
    give_back_memory()
    assert process.memory_info().rss < held_bytes - 60_000_000
    assert len(kept) == 60_000


def test_a_status_is_told_as_a_signal_or_a_number():
    assert how_ended(-9) == "was ended by SIGKILL"
    assert how_ended(1) == "ended with status 1"
