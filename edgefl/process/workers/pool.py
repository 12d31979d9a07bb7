"""A pool of workers: work is handed out, answers are heard, and what a lost worker had is done again.

Simulated clients and Flower apps run on it, each with messages of their own. A worker is a process on this
machine (`process.py`), or an actor on a cluster. It says first that it is ready, then answers what it is asked,
in order. It can be sent its next item while it is at work on one (`ahead`), and can keep results until it is
asked for them together (`collect`), such as a sum over many clients.
Invariants: each item ends in one `ItemAnswered` or `ItemGivenUp`, whichever worker is lost when; an item that has cost
`max_losses` workers is not tried again; no wait is without a deadline; no worker outlives the pool.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import WorkerLost
from edgefl.process.workers.slot import IN_FLIGHT, Slot, W
from edgefl.process.workers.work_queue import M, WorkItem, WorkQueue

MAX_LOSSES = 2  # workers that one item may cost
MAX_STARTS = 3  # of one worker in a run that fail, before it is left out of the run
START_S = 120.0
MAX_WAIT_S = 1e6  # in one wait; the operating system cannot count far beyond


@dataclass(frozen=True, slots=True)
class ItemAnswered(Generic[M]):
    """An answer; to what keeping workers were asked for together, the message is None."""

    message: M | None
    answer: Any


@dataclass(frozen=True, slots=True)
class ItemGivenUp(Generic[M]):
    """A message that will not be answered, and how the last worker over it was lost."""

    message: M
    how: str
    died: bool  # or its time was up


@dataclass(frozen=True, slots=True)
class NoWorkerLeft:
    """No worker can be started, and how the last one failed. What is left in the queue is not done."""

    how: str
    died: bool  # or its time was up


PoolEvent = ItemAnswered[M] | ItemGivenUp[M] | NoWorkerLeft


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTerms:
    """What a run asks of its workers."""

    answer_s: float  # for one item; its worker's start is not counted
    max_losses: int = MAX_LOSSES
    retry_late: bool = True  # whether an item whose time was up is tried again, as after any other loss
    opening: Any = None  # a message without an answer, before a worker's first item of the run
    collect: Any = None  # asked for in the end of each worker that did items, whose results it has kept


class WorkerPool(Generic[W, M]):
    """Workers, each started when it is first needed, and again after it was lost. Runs may be in several threads."""

    def __init__(
        self, launchers: Sequence[Callable[[], W]], wait: Callable[[Sequence[W], float], Collection[W]], *,
        name: str = "worker process", start_s: float = START_S,
        ahead: Callable[[W, M], bool] = lambda _worker, _message: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.wait, self.start_s, self.ahead, self.clock, self._name = wait, start_s, ahead, clock, name
        self._slots = [Slot[W, M](launch) for launch in launchers]
        self.idle: queue.SimpleQueue[Slot[W, M]] = queue.SimpleQueue()  # slots that no run has
        for slot in self._slots:
            self.idle.put(slot)
        self.closed = False

    @property
    def peak_rss_mb(self) -> float:
        """The most memory that each worker has held, added up."""
        return sum(slot.peak_rss_mb for slot in self._slots)

    @property
    def size(self) -> int:
        """How many workers there are, started or not."""
        return len(self._slots)

    @property
    def workers(self) -> list[W]:
        """The workers that are started."""
        return [slot.worker for slot in self._slots if slot.worker is not None]

    @property
    def ready_workers(self) -> list[W]:
        """The workers that have said that they are ready."""
        return [slot.worker for slot in self._slots if slot.worker is not None and slot.ready]

    @property
    def ready(self) -> bool:
        """Whether each can be asked without waiting for its start, or has failed to start."""
        return all(slot.ready or (slot.worker is not None and self.wait([slot.worker], 0.0)) for slot in self._slots)

    def start(self) -> None:
        """Start them all, without waiting."""
        for slot in self._slots:
            slot.start(self.clock())

    def wait_until_ready(self, number: int | None = None, hint: str = "") -> None:
        """Start all, and wait until so many are ready, or all; raises ConfigError where one cannot be started."""
        self.start()
        number, end_s = len(self._slots) if number is None else number, self.clock() + self.start_s
        while len(self.ready_workers) < number:
            starting = {id(slot.worker): slot for slot in self._slots if slot.worker is not None and not slot.ready}
            answered = self.wait([w for w in self.workers if id(w) in starting], max(0.0, end_s - self.clock()))
            if not answered:
                raise ConfigError(f"a {self._name} was not ready within {self.start_s:g} s{hint}")
            for worker in answered:
                try:
                    starting[id(worker)].hear(self.clock())
                except WorkerLost as lost:
                    raise ConfigError(f"a {self._name} {lost} before it was ready{hint}") from lost

    def run(self, work: WorkQueue[M], terms: RunTerms) -> Iterator[PoolEvent[M]]:
        """Have work done, and yield how each item ends, as it ends. Closing the iterator leaves the rest undone."""
        return _PoolRun(self, work, terms).events()

    def close(self) -> None:
        """End the workers; a run in another thread ends too."""
        self.closed = True
        for slot in self._slots:
            slot.close()


class _PoolRun(Generic[W, M]):
    """One run of a queue's work on the workers that no other run has."""

    def __init__(self, pool: WorkerPool[W, M], work: WorkQueue[M], terms: RunTerms) -> None:
        self._pool, self._work, self._terms = pool, work, terms
        self._slots: list[Slot[W, M]] = []
        self._unusable: list[Slot[W, M]] = []  # cannot be started
        self._no_worker_left = NoWorkerLeft("", died=True)

    def events(self) -> Iterator[PoolEvent[M]]:
        try:
            while not self._pool.closed:
                self._hand_out()
                if self._unusable and not self._slots and self._work.more():
                    yield self._no_worker_left
                    return
                owing = [slot for slot in self._slots if slot.worker is not None and not slot.free]
                if not owing:
                    return
                yield from self._hear(owing)
        finally:
            for slot in (*self._slots, *self._unusable):
                slot.leave_run()
                self._pool.idle.put(slot)

    def _hand_out(self) -> None:
        """Give every worker that we can have something to do, and let go of those that are done."""
        if self._work.more():
            self._take_idle()
        for slot in list(self._slots):
            if slot.free and not self._work.more():  # another may be behind with two
                self._work.put_back(next(([one] for other in self._slots if (one := other.take_back())), []))
            if slot.worker is None and self._work.more():
                slot.start(self._pool.clock())
            while self._may_ask(slot):
                self._ask(slot)
            if slot.kept and slot.free and not self._work.more():
                slot.collecting = True
                slot.ask(WorkItem(self._terms.collect), self._terms.collect, self._pool.clock())
            if not slot.awaited and not self._work.more():
                self._slots.remove(slot)
                slot.leave_run()
                self._pool.idle.put(slot)

    def _take_idle(self) -> None:
        """Take the workers that no other run has; waits for one where this run has none."""
        with suppress(queue.Empty):
            if not self._slots and not self._unusable:
                self._slots.append(self._pool.idle.get(timeout=MAX_WAIT_S))
            while True:
                self._slots.append(self._pool.idle.get_nowait())

    def _may_ask(self, slot: Slot[W, M]) -> bool:
        """Say whether a worker can be sent the next item now."""
        if slot.worker is None or not slot.ready or not self._work.more():
            return False
        if not slot.asked:
            return self._work.may_begin() or not any(other.awaited for other in self._slots)
        more_than_workers = self._work.more(len(self._slots))
        return len(slot.asked) < IN_FLIGHT and more_than_workers and self._pool.ahead(slot.worker, self._work.first())

    def _ask(self, slot: Slot[W, M]) -> None:
        item = self._work.take()
        if not slot.opened and slot.worker is not None and self._terms.opening is not None:
            slot.worker.ask(self._terms.opening)
        slot.opened = True
        slot.ask(item, item.message, self._pool.clock())

    def _hear(self, slots: Sequence[Slot[W, M]]) -> Iterator[PoolEvent[M]]:
        """Hear the workers that have something to say, and give up those whose time is up."""
        now_s = self._pool.clock()
        within_s = min(min(map(self._late_s, slots)) - now_s, MAX_WAIT_S)
        answered = self._pool.wait([slot.worker for slot in slots if slot.worker is not None], max(0.0, within_s))
        for slot in slots:
            if slot.worker is not None and slot.worker in answered:
                yield from self._heard(slot)
        for slot in slots:
            if slot.worker is None or self._pool.clock() < self._late_s(slot):
                continue
            if not self._pool.wait([slot.worker], 0.0):  # an answer that is there counts, however late we look
                allowed_s = self._terms.answer_s if slot.ready else self._start_s
                yield from self._lost(slot, f"did not answer within {allowed_s:g} s", died=False)

    @property
    def _start_s(self) -> float:
        return max(self._pool.start_s, self._terms.answer_s)

    def _late_s(self, slot: Slot[W, M]) -> float:
        """Return when a worker has been too long at what it is at."""
        return slot.since_s + (self._terms.answer_s if slot.ready else self._start_s)

    def _heard(self, slot: Slot[W, M]) -> Iterator[PoolEvent[M]]:
        try:
            reply = slot.hear(self._pool.clock())
        except WorkerLost as lost:
            if not self._pool.closed:
                yield from self._lost(slot, str(lost), died=True)
            return
        if reply is None:
            return
        item = slot.asked.popleft()
        if item is None:
            return
        if slot.collecting:
            slot.kept, slot.collecting = [], False
            yield ItemAnswered(None, reply.answer)
            return
        if self._terms.collect is not None:
            slot.kept.append(item)
        yield ItemAnswered(item.message, reply.answer)

    def _lost(self, slot: Slot[W, M], how: str, *, died: bool) -> Iterator[PoolEvent[M]]:
        """End a worker, have done again what it had, and yield what has cost too many."""
        blamed = slot.kept if slot.collecting else [*slot.asked][:1]
        spared = [] if slot.collecting else [*slot.kept, *[*slot.asked][1:]]
        if not slot.ready:
            slot.failed_starts += 1
            if not died or slot.failed_starts >= MAX_STARTS:
                self._slots.remove(slot)
                self._unusable.append(slot)
                self._no_worker_left = NoWorkerLeft(how, died)
        slot.drop()
        self._work.put_back(item for item in spared if item is not None)
        for item in blamed:
            if item is None:
                continue
            item.losses += 1
            if item.losses < self._terms.max_losses and (died or self._terms.retry_late):
                self._work.retry(item)
            else:
                yield ItemGivenUp(item.message, how, died)
