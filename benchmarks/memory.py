"""Resident memory of processes, in MB of 10^6 bytes.

The kernel records each process's peak (VmHWM), so no sampling is needed during a timed run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess)


def peak_rss_mb(pid: int) -> float:
    """Return a living process's peak resident memory."""
    return _status_mb(pid, "VmHWM")


def tree_rss_mb(pid: int) -> float:
    """Return the resident memory of a process and its descendants. Shared pages count in each."""
    return sum(_each(tree(pid), "VmRSS"))


def tree_peak_rss_mb(pid: int) -> float:
    """Return the sum of the peaks of the living processes of a tree: at least the peak of the tree."""
    return sum(_each(tree(pid), "VmHWM"))


def tree(pid: int) -> list[int]:
    """Return a process and its living descendants."""
    try:
        top = psutil.Process(pid)
        return [pid, *(child.pid for child in top.children(recursive=True))]
    except _GONE:
        return []


def _each(pids: list[int], field: str) -> list[float]:
    sizes = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            sizes.append(_status_mb(pid, field))
    return sizes


def _status_mb(pid: int, field: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0  # an ending process has no memory
