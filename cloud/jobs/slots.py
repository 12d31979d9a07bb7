"""Which jobs run: so many at a time, those of higher priority first, then the older ones.

Invariant: a job has one slot at most, and is never started a second time before its first run has ended.
"""

from __future__ import annotations

import itertools
import threading


class JobSlots:
    """Slots for running jobs. Methods may be called from any thread."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._waiting: dict[str, tuple[int, int]] = {}  # job -> its place: lower is earlier
        self._running: set[str] = set()
        self._again: dict[str, int] = {}  # running job that is to run again afterwards -> priority
        self._closed = False

    def add(self, job: str, priority: int) -> None:
        """Let a job wait for a slot; one that runs now is run again afterwards."""
        with self._lock:
            if job in self._running:
                self._again[job] = priority
            else:
                self._waiting.setdefault(job, (-priority, next(self._order)))

    def next(self) -> str | None:
        """Give a free slot to the first waiting job, and return the job; None if there is no slot, or no job."""
        with self._lock:
            if self._closed or not self._waiting or len(self._running) >= self._num_slots:
                return None
            job = min(self._waiting, key=self._waiting.__getitem__)
            del self._waiting[job]
            self._running.add(job)
            return job

    def done(self, job: str) -> None:
        """Free a job's slot."""
        with self._lock:
            self._running.discard(job)
            if (priority := self._again.pop(job, None)) is not None:
                self._waiting[job] = (-priority, next(self._order))

    def waiting(self) -> list[str]:
        """Return the jobs without a slot, in their order."""
        with self._lock:
            return sorted(self._waiting, key=self._waiting.__getitem__)

    def close(self) -> None:
        """Give no more slots."""
        with self._lock:
            self._closed = True
