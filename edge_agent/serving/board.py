"""Which models are being computed: a page of memory that outlives the process that writes it.

The serving process writes it. If that process dies, the agent reads which models were running: one of them is the
likely cause. Each thread has its own lane, so that threads need no lock.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

LANE_BYTES = 64  # a model's name is no longer
NUM_LANES = 16
_EMPTY = bytes(LANE_BYTES)


class Board:
    """A page shared through a descriptor; without one it is this process's own."""

    def __init__(self, descriptor: int = -1) -> None:
        self._page = mmap.mmap(descriptor, LANE_BYTES * NUM_LANES)

    def enter(self, lane: int, label: bytes) -> None:
        """A model (`label_of` its name) is at work in a lane."""
        self._page[lane * LANE_BYTES : (lane + 1) * LANE_BYTES] = label

    def leave(self, lane: int) -> None:
        """Nothing is at work in a lane."""
        self._page[lane * LANE_BYTES : (lane + 1) * LANE_BYTES] = _EMPTY

    def at_work(self) -> set[str]:
        """Return the names of the models that are at work."""
        lanes = (self._page[start : start + LANE_BYTES] for start in range(0, LANE_BYTES * NUM_LANES, LANE_BYTES))
        names = set()
        for lane in lanes:
            if text := lane.rstrip(b"\0"):
                with suppress(UnicodeDecodeError):
                    names.add(text.decode())
        return names

    def clear(self) -> None:
        """Nothing is at work anywhere."""
        self._page[:] = bytes(LANE_BYTES * NUM_LANES)


def label_of(name: str) -> bytes:
    """Return a model's name as it stands in a lane."""
    return name.encode()[:LANE_BYTES].ljust(LANE_BYTES, b"\0")


def new_descriptor() -> int:
    """Return a descriptor of an empty page, to be passed to a child and closed."""
    descriptor = os.memfd_create("edgefl-board")
    os.ftruncate(descriptor, LANE_BYTES * NUM_LANES)
    return descriptor
