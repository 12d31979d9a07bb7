"""Resident memory of processes, in MB of 10^6 bytes.

The kernel keeps each process's peak (VmHWM), so most peaks cost nothing to read. A peak over a tree of
short-lived processes needs the sampler, which takes time of its own: never sample in a run that is timed.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess)


def peak_rss_mb(pid: int) -> float:
    """Return the highest resident memory that a living process has had."""
    return _status_mb(pid, "VmHWM")


def rss_mb(pid: int) -> float:
    """Return the resident memory of a living process."""
    return _status_mb(pid, "VmRSS")


def tree_rss_mb(pid: int) -> float:
    """Return the resident memory of a process and all below it. Pages they share count in each."""
    return sum(_each(tree(pid), "VmRSS"))


def tree_peak_rss_mb(pid: int) -> float:
    """Return the sum of the peaks of the living processes of a tree: at least the peak of the tree."""
    return sum(_each(tree(pid), "VmHWM"))


def tree(pid: int) -> list[int]:
    """Return a process and all below it that are alive."""
    try:
        top = psutil.Process(pid)
        return [pid, *(child.pid for child in top.children(recursive=True))]
    except _GONE:
        return []


class RssSampler:
    """The peak of a process tree's memory while the context lasts, by samples."""

    def __init__(self, pid: int, period_s: float = 0.05) -> None:
        self._pid, self._period_s = pid, period_s
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._sample, name=f"rss of {pid}", daemon=True)
        self.peak_mb = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        self._thread.join(10)

    def _sample(self) -> None:
        self.peak_mb = tree_rss_mb(self._pid)
        while not self._leave.wait(self._period_s):
            self.peak_mb = max(self.peak_mb, tree_rss_mb(self._pid))


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
    return 0.0  # a process that is ending has no memory
