"""What this machine has, and what of it was used."""

from __future__ import annotations

import os
from pathlib import Path

from edgefl.operator.run import peak_rss_mb

_STATUS = Path("/proc/self/status")


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_peak_mb() -> float:
    """Return the most memory that this process has held. A child's rusage would begin with its parent's."""
    if not _STATUS.exists():
        return peak_rss_mb()
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
