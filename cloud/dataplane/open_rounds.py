"""Rounds that wait for answers: the one place where the network's threads and a round's thread meet.

Invariant: an answer is accepted only while its round is open, once for each device of the cohort, and
is in the database before it is in the queue; both happen under the round's lock, so that the queue's
order is the database's and nothing is acknowledged that the round will not see.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cloud.state.enrolment import REMOVED
from cloud.state.jobs import Answer
from edgefl.errors import EdgeflError
from edgefl.protocols.messages import WirePlan
from edgefl.records import Traffic

PRESENCE_CHANGED = "presence changed"
Event = Answer | EdgeflError | str  # an answer; why the round must stop; a device came or went


@dataclass(slots=True)
class OpenRound:
    """One round of one job while it collects."""

    plan: WirePlan
    cohort: frozenset[str]
    answered: set[str] = field(default_factory=set)
    closed: bool = False
    up_bytes: int = 0
    down_bytes: int = 0
    # Bounded by what is put in: an answer for each device, and presence changes that are merged.
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    presence_pending: bool = False
    removed: set[str] = field(default_factory=set)  # devices whose answers count no more
    record: Callable[[Answer], None] | None = None  # makes an answer durable; None = as an update of its job
    source: Path | None = None  # of what the plan names as its model; None = a blob

    def accept(self, answer: Answer, make_durable: Callable[[Answer], None]) -> bool:
        """Take a device's answer, once; False where the round is over or has one from it."""
        with self.lock:
            if self.closed or answer.device in self.answered:
                return False
            make_durable(answer)
            self.answered.add(answer.device)
            self.events.put(answer)
            return True

    def forget(self, device: str, make_durable: Callable[[Answer], None]) -> None:
        """Refuse a device that was removed from the fleet, also where its answer waits to be folded."""
        with self.lock:
            if self.closed or device not in self.cohort:
                return
            self.removed.add(device)
            if device not in self.answered:
                answer = Answer(device=device, reason=REMOVED)
                make_durable(answer)
                self.answered.add(device)
                self.events.put(answer)

    def counted(self, answer: Answer) -> Answer:
        """Return an answer as it counts now: that of a device that was removed meanwhile is refused."""
        with self.lock:
            return Answer(device=answer.device, reason=REMOVED) if answer.device in self.removed else answer

    def asks_for(self, sha256: str) -> bool:
        """Whether a device needs this blob to take part."""
        return sha256 == self.plan.model.sha256 or (self.plan.frozen is not None and sha256 == self.plan.frozen.sha256)

    def waiting(self) -> frozenset[str]:
        """Return the devices that have not answered."""
        with self.lock:
            return self.cohort - self.answered

    def close(self) -> frozenset[str]:
        """Accept nothing more; return the devices that have not answered."""
        with self.lock:
            self.closed = True
            return self.cohort - self.answered


class OpenRounds:
    """All open rounds, by job and number."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._resuming: set[str] = set()
        self._open: dict[tuple[str, int], OpenRound] = {}
        self._traffic: dict[str, Traffic] = {}
        self._stopped: dict[str | None, EdgeflError] = {}  # None = all jobs

    def expect(self, jobs: Iterable[str]) -> None:
        """Say which jobs are about to open again the round that they were in when the cloud ended."""
        with self._lock:
            self._resuming |= set(jobs)

    def resumed(self, job: str) -> None:
        """Say that a job has its round open, or will not open it."""
        with self._lock:
            self._resuming.discard(job)
            self._lock.notify_all()

    def wait_resumed(self, timeout_s: float) -> bool:
        """Whether all expected rounds are open: until then nobody may be told that a round is over."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._resuming, timeout_s)

    @property
    def stopping(self) -> bool:
        """Whether all jobs were interrupted: a round that is not open now will be again."""
        with self._lock:
            return None in self._stopped

    def add(self, opened: OpenRound) -> None:
        """Open a round; raises what its job was interrupted with."""
        with self._lock:
            self._refuse_stopped(opened.plan.job)
            self._open[opened.plan.job, opened.plan.round] = opened
        self.resumed(opened.plan.job)

    def remove(self, closed: OpenRound) -> None:
        with self._lock:
            self._open.pop((closed.plan.job, closed.plan.round), None)
            before = self._traffic.get(closed.plan.job, Traffic())
            self._traffic[closed.plan.job] = Traffic(
                up_bytes=before.up_bytes + closed.up_bytes, down_bytes=before.down_bytes + closed.down_bytes
            )

    def traffic(self, job: str) -> Traffic:
        """Return the bytes moved in the job's closed rounds."""
        with self._lock:
            return self._traffic.get(job, Traffic())

    def get(self, job: str, number: int) -> OpenRound | None:
        with self._lock:
            return self._open.get((job, number))

    def waiting_for(self, device: str) -> list[OpenRound]:
        """Return the open rounds that wait for this device's answer."""
        with self._lock:
            opened = list(self._open.values())
        return [one for one in opened if device in one.waiting()]

    def having(self, device: str) -> list[OpenRound]:
        """Return the open rounds whose cohort this device is in."""
        with self._lock:
            return [one for one in self._open.values() if device in one.cohort]

    def presence_changed(self) -> None:
        """Tell every open round that a device came or went."""
        with self._lock:
            for one in self._open.values():
                if not one.presence_pending:
                    one.presence_pending = True
                    one.events.put(PRESENCE_CHANGED)

    def interrupt(self, error: EdgeflError, job: str | None = None) -> None:
        """Make a job, or all, raise this error: in the open round, or before the next."""
        with self._lock:
            self._stopped[job] = error
            for one in self._open.values():
                if job in {None, one.plan.job}:
                    one.events.put(error)

    def is_stopped(self, job: str) -> bool:
        """Whether the job was interrupted."""
        with self._lock:
            return not self._stopped.keys().isdisjoint({job, None})

    def refuse_stopped(self, job: str) -> None:
        """Raise what the job was interrupted with, if it was."""
        with self._lock:
            self._refuse_stopped(job)

    def refuse_stopping(self) -> None:
        """Raise what all jobs were interrupted with, if they were."""
        with self._lock:
            if (error := self._stopped.get(None)) is not None:
                raise error

    def forget(self, job: str) -> None:
        """The job has ended: it opens no round any more."""
        self.resumed(job)
        with self._lock:
            self._stopped.pop(job, None)
            self._traffic.pop(job, None)

    def _refuse_stopped(self, job: str) -> None:
        error = self._stopped.get(job) or self._stopped.get(None)
        if error is not None:
            raise error
