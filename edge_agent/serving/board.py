"""Which models are running: a page of shared memory that outlives the process that writes it.

The serving process writes it. If that process dies, the agent reads which models were running: one of them is the
likely cause. Each thread has its own lane, so that threads need no lock.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

LANE_BYTES = 64  # the longest name of a model
NUM_LANES = 16
_EMPTY = bytes(LANE_BYTES)


class Board:
    """A page shared through a file descriptor; private to this process if there is none."""

    def __init__(self, descriptor: int = -1) -> None:
        self._page = mmap.mmap(descriptor, LANE_BYTES * NUM_LANES)

    def enter(self, lane: int, label: bytes) -> None:
        """Record that a model (`label_of` its name) runs in a lane."""
        self._page[lane * LANE_BYTES : (lane + 1) * LANE_BYTES] = label

    def leave(self, lane: int) -> None:
        """Record that nothing runs in a lane."""
        self._page[lane * LANE_BYTES : (lane + 1) * LANE_BYTES] = _EMPTY

    def running(self) -> set[str]:
        """Return the names of the models that are running."""
        lanes = (self._page[start : start + LANE_BYTES] for start in range(0, LANE_BYTES * NUM_LANES, LANE_BYTES))
        names = set()
        for lane in lanes:
            if text := lane.rstrip(b"\0"):
                with suppress(UnicodeDecodeError):
                    names.add(text.decode())
        return names

    def clear(self) -> None:
        """Clear all lanes."""
        self._page[:] = bytes(LANE_BYTES * NUM_LANES)


def label_of(name: str) -> bytes:
    """Return a model's name as a lane stores it."""
    return name.encode()[:LANE_BYTES].ljust(LANE_BYTES, b"\0")


def new_descriptor() -> int:
    """Return the descriptor of an empty page; pass it to a child, then close it."""
    descriptor = os.memfd_create("edgefl-board")
    os.ftruncate(descriptor, LANE_BYTES * NUM_LANES)
    return descriptor
