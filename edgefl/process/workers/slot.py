"""The place of one worker in a pool: what it was asked, what it owes, and how its loss leaves the place empty."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from edgefl.process.workers.messages import Ready, Reply
from edgefl.process.workers.work_queue import M, WorkItem

IN_FLIGHT = 2  # items under way for one worker, where it may be sent one ahead


class PooledWorker(Protocol):
    """One worker, from its start to its end."""

    def ask(self, message: Any) -> None:
        """Send a message; that the worker is lost is said where it is heard."""

    def hear(self) -> Ready | Reply:
        """Return what it says next, waiting for it; raises WorkerLost, and ConfigError where it cannot start."""

    def end(self, *, kindly: bool) -> None:
        """End it; `kindly`: it is idle, and may end by itself."""


W = TypeVar("W", bound=PooledWorker)


class Slot(Generic[W, M]):
    """The place of one worker, and of those that replace it."""

    def __init__(self, launch: Callable[[], W]) -> None:
        self._launch = launch
        self._lock = threading.Lock()  # of starting against closing
        self._closed = False
        self.worker: W | None = None
        self.ready = False  # whether the worker has said so
        self.asked: deque[WorkItem[M] | None] = deque()  # in the order of its answers; None: nobody waits for it
        self.kept: list[WorkItem[M]] = []  # done, with results that are still in the worker
        self.collecting = False
        self.opened = False  # whether it has had the run's opening message
        self.failed_starts = 0  # in this run, since it was ready
        self.since_s = 0.0  # that it has been at what it is at: its start, or an item
        self.peak_rss_mb = 0.0

    @property
    def free(self) -> bool:
        """Whether it could begin at once."""
        return self.ready and not self.asked

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for an answer of it."""
        return any(self.asked)

    def start(self, now_s: float) -> None:
        """Start a worker, where there is none and the pool is not closed."""
        with self._lock:
            if self.worker is None and not self._closed:
                self.since_s = now_s
                self.worker = self._launch()

    def ask(self, item: WorkItem[M], message: Any, now_s: float) -> None:
        if self.worker is None:
            raise RuntimeError("start comes before ask")
        if not self.asked:
            self.since_s = now_s
        self.asked.append(item)
        self.worker.ask(message)

    def hear(self, now_s: float) -> Reply | None:
        """Return the reply that is there, or None where the worker says that it is ready; raises WorkerLost."""
        if self.worker is None:
            raise RuntimeError("start comes before hear")
        said = self.worker.hear()
        self.since_s = now_s
        if isinstance(said, Ready):
            self.ready, self.failed_starts = True, 0
            return None
        self.peak_rss_mb = max(self.peak_rss_mb, said.peak_rss_mb)
        return said

    def take_back(self) -> WorkItem[M] | None:
        """Want no more what it was sent ahead and has hardly begun; return that."""
        if len(self.asked) < IN_FLIGHT:
            return None
        last, self.asked[-1] = self.asked[-1], None
        return last

    def leave_run(self) -> None:
        """Want no more what it owes the run that ends."""
        self.asked = deque([None] * len(self.asked))
        self.kept, self.collecting, self.opened, self.failed_starts = [], False, False, 0

    def drop(self) -> None:
        """End the worker, and forget what it had."""
        with self._lock:
            if self.worker is not None:
                self.worker.end(kindly=False)
            self.worker, self.ready = None, False
        self.asked.clear()
        self.kept, self.collecting, self.opened = [], False, False

    def close(self) -> None:
        """End the worker for good; a thread that waits for it hears that it is lost."""
        with self._lock:
            self._closed = True
            if self.worker is not None:
                self.worker.end(kindly=self.free)
