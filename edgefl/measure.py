"""The machine's resources, and how much of them this process uses."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SELDOM = (20_000, 50, 1000)  # gc.set_threshold
_STATUS = Path("/proc/self/status")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_mb() -> float:
    """Return this process's peak memory, or its parent's at the fork if that was higher."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def own_peak_mb() -> float:
    """Return this process's own peak memory. A child's rusage would start from its parent's."""
    if not _STATUS.exists():
        return peak_rss_mb()
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def how_ended(status: int) -> str:
    """Say how a process ended. `status` is Python's return code: a negative one is minus the signal's number."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def give_back_memory() -> None:
    """Release unused memory to the system, if the C library can do so (musl cannot).

    glibc keeps the freed buffers of a transfer, tens of megabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Run the cyclic garbage collector less often inside, and not at the process's end.

    Torch and its compiler create a million lasting objects: scanning them takes a third of their import time.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*before)
