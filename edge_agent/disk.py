"""Free disk space of the device, checked before anything is written, with a clear error if it is too little.

Downloads leave a small reserve, so that the agent can still write its own state.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgefl.errors import DiskFull

KEPT_BYTES = 2 << 20  # reserved for agent.db, state files and logs
_FULL = (errno.ENOSPC, errno.EDQUOT)


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise DiskFull unless `size` more bytes fit below `folder`; the message names `what`."""
    free = shutil.disk_usage(folder).free
    if size + KEPT_BYTES > free:
        raise DiskFull(
            f"{what} needs {_mb(size)} of disk space; {folder} has {_mb(free)} left, of which {_mb(KEPT_BYTES)} are "
            "reserved for the agent. Free some space on the device's disk"
        )


@contextmanager
def space_for(path: Path, size: int, what: str) -> Iterator[None]:
    """Guard a block that writes `size` bytes to `path`; if the disk is too small, the file is deleted.

    Bytes that `path` already has count as available. Raises DiskFull before the block or from it.
    """
    here = path.stat().st_size if path.exists() else 0
    try:
        require_space(path.parent, max(0, size - here), what)
    except DiskFull:
        path.unlink(missing_ok=True)  # makes room for smaller files
        raise
    try:
        yield
    except OSError as cause:
        if cause.errno not in _FULL:
            raise
        path.unlink(missing_ok=True)
        raise DiskFull(f"{what}: the disk of {path.parent} ran full. Free some space on the device's disk") from cause


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
