"""Readers that follow a job's rounds, and the last round that each has read: unread rounds are not deleted.

After a lost connection a reader's position is kept for GRACE_S. After a restart of the cloud, all rounds of running
jobs are kept for that time, until their readers have reconnected.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator

GRACE_S = 150.0  # longer than an operator waits for a silent cloud


class Followers:
    """The readers of all jobs. Methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._seen: dict[str, dict[int, int]] = {}  # job -> reader -> the last round it has read
        self._left: dict[int, float] = {}  # disconnected reader -> when its position is dropped
        self._resumed: dict[str, float] = {}  # job -> until when readers from before a restart may reconnect

    def expect_back(self, jobs: Iterable[str]) -> None:
        """Keep all rounds of jobs that continue after a restart, until their readers have reconnected."""
        with self._lock:
            self._resumed = dict.fromkeys(jobs, self._clock() + GRACE_S)

    @contextlib.contextmanager
    def reading(self, job: str, after: int) -> Iterator[Callable[[int], None]]:
        """Follow a job's rounds above `after`; gives a function to report the last round read."""
        with self._lock:
            number = next(self._numbers)
            self._seen.setdefault(job, {})[number] = after

        def confirm(to: int) -> None:
            with self._lock:
                if number in self._seen.get(job, {}):  # else the job has ended, and its rows stay
                    self._seen[job][number] = to

        try:
            yield confirm
        finally:
            with self._lock:
                if number in self._seen.get(job, {}):
                    self._left[number] = self._clock() + GRACE_S
                now_s = self._clock()
                for of_job, readers in list(self._seen.items()):  # also readers of jobs that had already ended
                    for gone in [one for one in readers if self._left.get(one, now_s) < now_s]:
                        del readers[gone], self._left[gone]
                    if not readers:
                        del self._seen[of_job]

    def prunable(self, job: str, done: int, kept: int) -> int:
        """Return the last round that may be deleted: `kept` rounds before the slowest reader; 0 = none."""
        now_s = self._clock()
        with self._lock:
            if now_s < self._resumed.get(job, now_s):
                return 0
            readers = self._seen.get(job, {})
            for number in [one for one in readers if self._left.get(one, now_s) < now_s]:
                del readers[number], self._left[number]
            return max(0, min([done, *readers.values()]) - kept)

    def forget(self, job: str) -> None:
        """Drop the readers of a job that has ended; its rounds are no longer deleted."""
        with self._lock:
            self._resumed.pop(job, None)
            for number in self._seen.pop(job, {}):
                self._left.pop(number, None)
