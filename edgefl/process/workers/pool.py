"""A pool of workers: it distributes work, receives answers, and repeats the work of lost workers.

Simulated clients and Flower apps run on it, each with their own messages. A worker is a process on this
machine (`process.py`), or an actor on a cluster. It first reports that it is ready, then answers messages
in order. It can get its next item while it works on one (`ahead`), and can keep results until they are
requested together (`collect`), such as a sum over many clients.
Invariants: each item ends in one `ItemAnswered` or `ItemGivenUp`, even if workers are lost; an item that has cost
`max_losses` workers is not tried again; every wait has a deadline; no worker outlives the pool.
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
MAX_STARTS = 3  # failed starts of one worker, before the run continues without it
START_S = 120.0
MAX_WAIT_S = 1e6  # in one wait; the operating system cannot count far beyond


@dataclass(frozen=True, slots=True)
class ItemAnswered(Generic[M]):
    """An answer; `message` is None for the results that were requested with `collect`."""

    message: M | None
    answer: Any


@dataclass(frozen=True, slots=True)
class ItemGivenUp(Generic[M]):
    """A message that will not be answered, and how its last worker was lost."""

    message: M
    how: str
    died: bool  # else its time was up


@dataclass(frozen=True, slots=True)
class NoWorkerLeft:
    """No worker can be started, and how the last one failed. The rest of the queue is not done."""

    how: str
    died: bool  # else its time was up


PoolEvent = ItemAnswered[M] | ItemGivenUp[M] | NoWorkerLeft


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTerms:
    """The terms of a run: timeout, retries, first and last message."""

    answer_s: float  # timeout for one item, without its worker's start
    max_losses: int = MAX_LOSSES
    retry_late: bool = True  # whether an item is retried after a timeout, as after any other loss
    opening: Any = None  # a message without an answer, before a worker's first item of the run
    collect: Any = None  # sent at the end to each worker that has kept results


class WorkerPool(Generic[W, M]):
    """Workers, each started when it is first needed, and again after it was lost. Thread-safe."""

    def __init__(
        self, launchers: Sequence[Callable[[], W]], wait: Callable[[Sequence[W], float], Collection[W]], *,
        name: str = "worker process", start_s: float = START_S,
        ahead: Callable[[W, M], bool] = lambda _worker, _message: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.wait, self.start_s, self.ahead, self.clock, self._name = wait, start_s, ahead, clock, name
        self._slots = [Slot[W, M](launch) for launch in launchers]
        self.idle: queue.SimpleQueue[Slot[W, M]] = queue.SimpleQueue()  # slots that no run uses
        for slot in self._slots:
            self.idle.put(slot)
        self.closed = False

    @property
    def peak_rss_mb(self) -> float:
        """The sum of the workers' peak memory."""
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
        """The workers that have reported that they are ready."""
        return [slot.worker for slot in self._slots if slot.worker is not None and slot.ready]

    @property
    def ready(self) -> bool:
        """Whether each worker is ready, or has failed to start."""
        return all(slot.ready or (slot.worker is not None and self.wait([slot.worker], 0.0)) for slot in self._slots)

    def start(self) -> None:
        """Start them all, without waiting."""
        for slot in self._slots:
            slot.start(self.clock())

    def wait_until_ready(self, number: int | None = None, hint: str = "") -> None:
        """Start all, and wait until `number` are ready (default: all); raises ConfigError if one cannot be started."""
        self.start()
        number, end_s = len(self._slots) if number is None else number, self.clock() + self.start_s
        while len(self.ready_workers) < number:
            starting = {id(slot.worker): slot for slot in self._slots if slot.worker is not None and not slot.ready}
            answered = self.wait([w for w in self.workers if id(w) in starting], max(0.0, end_s - self.clock()))
            if not answered:
                raise ConfigError(f"a {self._name} was not ready within {self.start_s:g} s{hint}")
            for worker in answered:
                try:
                    starting[id(worker)].receive(self.clock())
                except WorkerLost as lost:
                    raise ConfigError(f"a {self._name} {lost} before it was ready{hint}") from lost

    def run(self, work: WorkQueue[M], terms: RunTerms) -> Iterator[PoolEvent[M]]:
        """Run the work, and yield the outcome of each item as it ends. Closing the iterator cancels the rest."""
        return _PoolRun(self, work, terms).events()

    def close(self) -> None:
        """End the workers; a run in another thread ends too."""
        self.closed = True
        for slot in self._slots:
            slot.close()


class _PoolRun(Generic[W, M]):
    """One run of a queue's work, on the workers that no other run uses."""

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
                yield from self._receive(owing)
        finally:
            for slot in (*self._slots, *self._unusable):
                slot.leave_run()
                self._pool.idle.put(slot)

    def _hand_out(self) -> None:
        """Give work to every available worker, and release those that are done."""
        if self._work.more():
            self._take_idle()
        for slot in list(self._slots):
            if slot.free and not self._work.more():  # another worker may have two
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
        """Take the workers that no other run uses; waits for one if this run has none."""
        with suppress(queue.Empty):
            if not self._slots and not self._unusable:
                self._slots.append(self._pool.idle.get(timeout=MAX_WAIT_S))
            while True:
                self._slots.append(self._pool.idle.get_nowait())

    def _may_ask(self, slot: Slot[W, M]) -> bool:
        """Whether a worker can get the next item now."""
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

    def _receive(self, slots: Sequence[Slot[W, M]]) -> Iterator[PoolEvent[M]]:
        """Read the workers' messages, and give up workers whose time is up."""
        now_s = self._pool.clock()
        within_s = min(min(map(self._late_s, slots)) - now_s, MAX_WAIT_S)
        answered = self._pool.wait([slot.worker for slot in slots if slot.worker is not None], max(0.0, within_s))
        for slot in slots:
            if slot.worker is not None and slot.worker in answered:
                yield from self._received(slot)
        for slot in slots:
            if slot.worker is None or self._pool.clock() < self._late_s(slot):
                continue
            if not self._pool.wait([slot.worker], 0.0):  # an available answer counts, even if it is read late
                allowed_s = self._terms.answer_s if slot.ready else self._start_s
                yield from self._lost(slot, f"did not answer within {allowed_s:g} s", died=False)

    @property
    def _start_s(self) -> float:
        return max(self._pool.start_s, self._terms.answer_s)

    def _late_s(self, slot: Slot[W, M]) -> float:
        """Return when a worker's current work times out."""
        return slot.since_s + (self._terms.answer_s if slot.ready else self._start_s)

    def _received(self, slot: Slot[W, M]) -> Iterator[PoolEvent[M]]:
        try:
            reply = slot.receive(self._pool.clock())
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
        """End a worker, put its items back, and yield those that have cost too many workers."""
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
