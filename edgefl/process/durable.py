"""What survives a power cut: bytes and names are on disk after a flush, not when they are written."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
