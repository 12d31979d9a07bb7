"""The place of one worker in a pool: its pending items, and its replacement after a loss."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from edgefl.process.workers.messages import Ready, Reply
from edgefl.process.workers.work_queue import M, WorkItem

IN_FLIGHT = 2  # items in flight per worker, if it may get one ahead


class PooledWorker(Protocol):
    """One worker, from its start to its end."""

    def ask(self, message: Any) -> None:
        """Send a message; if the worker is lost, `receive` raises it."""

    def receive(self) -> Ready | Reply:
        """Wait for its next message and return it; raises WorkerLost, and ConfigError if it cannot start."""

    def end(self, *, kindly: bool) -> None:
        """End it; `kindly`: it is idle, and may end by itself."""


W = TypeVar("W", bound=PooledWorker)


class Slot(Generic[W, M]):
    """The place of one worker, and of its replacements."""

    def __init__(self, launch: Callable[[], W]) -> None:
        self._launch = launch
        self._lock = threading.Lock()  # start and close exclude each other
        self._closed = False
        self.worker: W | None = None
        self.ready = False  # whether the worker has reported it
        self.asked: deque[WorkItem[M] | None] = (
            deque()
        )  # in the order of its answers; None: the answer is no longer needed
        self.kept: list[WorkItem[M]] = []  # done; their results are still in the worker
        self.collecting = False
        self.opened = False  # whether it got the run's opening message
        self.failed_starts = 0  # in this run, since it was ready
        self.since_s = 0.0  # start time of its current work: its start, or an item
        self.peak_rss_mb = 0.0

    @property
    def free(self) -> bool:
        """Whether it could begin an item at once."""
        return self.ready and not self.asked

    @property
    def awaited(self) -> bool:
        """Whether an answer of it is still needed."""
        return any(self.asked)

    def start(self, now_s: float) -> None:
        """Start a worker, if there is none and the pool is not closed."""
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

    def receive(self, now_s: float) -> Reply | None:
        """Read its message: return a reply, or None if it reports that it is ready; raises WorkerLost."""
        if self.worker is None:
            raise RuntimeError("start comes before receive")
        said = self.worker.receive()
        self.since_s = now_s
        if isinstance(said, Ready):
            self.ready, self.failed_starts = True, 0
            return None
        self.peak_rss_mb = max(self.peak_rss_mb, said.peak_rss_mb)
        return said

    def take_back(self) -> WorkItem[M] | None:
        """Drop the item that was sent ahead, and return it."""
        if len(self.asked) < IN_FLIGHT:
            return None
        last, self.asked[-1] = self.asked[-1], None
        return last

    def leave_run(self) -> None:
        """Drop all pending answers of the run that ends."""
        self.asked = deque([None] * len(self.asked))
        self.kept, self.collecting, self.opened, self.failed_starts = [], False, False, 0

    def drop(self) -> None:
        """End the worker, and forget its items."""
        with self._lock:
            if self.worker is not None:
                self.worker.end(kindly=False)
            self.worker, self.ready = None, False
        self.asked.clear()
        self.kept, self.collecting, self.opened = [], False, False

    def close(self) -> None:
        """End the worker and start no other; a thread that waits for it gets WorkerLost."""
        with self._lock:
            self._closed = True
            if self.worker is not None:
                self.worker.end(kindly=self.free)
