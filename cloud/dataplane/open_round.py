"""Rounds that wait for answers: where the network's threads, presence and time meet their exchange.

Invariant: an answer is accepted only while its round is open, once for each device of the cohort, and is in the
database before it is yielded; both happen under the round's lock, so that the order in which answers are yielded is
the database's, and nothing is acknowledged that the round will not see.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from cloud.broker.link import CloudLink
from cloud.state.enrolment import REMOVED
from cloud.state.jobs import AnswerRow
from cloud.state.storage import LOOK_S, Storage
from edgefl.config import MAX_SECONDS
from edgefl.errors import EdgeflError
from edgefl.exchange import (
    Answered,
    Back,
    Begin,
    Event,
    Exchange,
    Failed,
    GiveUp,
    Instruction,
    Offline,
    Paused,
    Resumed,
    Stop,
    Terms,
    Tick,
    Withdrawn,
)
from edgefl.protocols.messages import Assignment

Clock = Callable[[], float]  # seconds, monotonic


class Standing(Enum):
    """How it is with a device."""

    ONLINE = "online"
    OFFLINE = "offline"
    UNHEARD = "unheard"  # since the cloud's start


@dataclass(frozen=True, slots=True)
class Presence:
    """Who is there, at one moment."""

    online: frozenset[str]
    heard_of: frozenset[str]  # and said to be offline
    is_known: bool  # without a broker nobody is known to be gone

    @classmethod
    def of(cls, link: CloudLink) -> Presence:
        return cls(link.online(), link.offline(), not link.reason)

    def standing(self, device: str) -> Standing:
        """Return how it is with one device."""
        if not self.is_known or device in self.online:
            return Standing.ONLINE
        return Standing.OFFLINE if device in self.heard_of else Standing.UNHEARD


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """Where a round has the time and pauses from, and who carries its instructions out."""

    clock: Clock = time.monotonic
    storage: Storage = field(default_factory=Storage)
    act: Callable[[Instruction], None] | None = None  # at once, under the round's lock; None = they wait in a queue


class OpenRound:
    """One round of one job, or one message of a relay, while it collects."""

    def __init__(
        self, assignment: Assignment, asked: Iterable[str], terms: Terms, around: Surroundings | None = None
    ) -> None:
        self.assignment = assignment
        asked = tuple(asked)
        self.asked = frozenset(asked)
        self.up_bytes = self.down_bytes = 0
        self.record: Callable[[AnswerRow], None] | None = (
            None  # makes an answer durable; None = as an update of its job
        )
        self.source: Path | None = None  # of what a device fetches for it; None = it is a blob
        self._around = around or Surroundings()
        self._lock = threading.RLock()  # whoever acts may ask
        self._exchange = Exchange(asked, terms)
        self._answers: dict[str, AnswerRow] = {}  # that were not taken yet
        # Bounded by what is put in: a few instructions for each device, and calls to look that are merged.
        self._items: queue.SimpleQueue[Instruction | EdgeflError | None] = queue.SimpleQueue()
        self._act = self._around.act or self._items.put
        self._is_stirred = False
        self._seen_s = self._around.clock()
        self._paused_s: float = self._around.storage.pause_times()[0]
        self._paused_since_s: float | None = None

    def begin(self, *, is_told: bool = False) -> None:
        """Begin to wait, and have the devices told, unless they are."""
        with self._lock:
            self._do(Begin(is_told=is_told, at_s=self._now_s()))

    def accept(self, answer: AnswerRow, make_durable: Callable[[AnswerRow], None]) -> bool:
        """Take a device's answer, once; False where the round is over or has one from it."""
        with self._lock:
            at_s = self._now_s()
            if not self._exchange.waits_for(answer.device, at_s):
                return False
            self._take(answer, make_durable, at_s)
            return True

    def forget(self, device: str, make_durable: Callable[[AnswerRow], None]) -> None:
        """Refuse a device that was removed from the fleet, also where its answer waits to be taken."""
        refusal = AnswerRow(device=device, reason=REMOVED)
        with self._lock:
            at_s = self._now_s()
            if device in self._answers:
                self._answers[device] = refusal
                self._do(Withdrawn(device, at_s=at_s))
            elif self._exchange.waits_for(device, at_s):
                self._take(refusal, make_durable, at_s)

    def take(self, device: str) -> AnswerRow:
        """Return the answer that is to be handed on, as it counts now."""
        with self._lock:
            return self._answers.pop(device)

    def note(self, presence: Presence) -> None:
        """Hear who is there."""
        with self._lock:
            at_s, exchange, online = self._now_s(), self._exchange, Standing.ONLINE
            back = [device for device in exchange.offline if presence.standing(device) is online]
            gone = [device for device in exchange.waiting if presence.standing(device) is not online]
            self._do(*(Back(device, at_s=at_s) for device in back))
            self._do(*(Offline(device, heard_of=device in presence.heard_of, at_s=at_s) for device in gone))

    def look(self) -> None:
        """Look at the clock, and whether answers can be stored."""
        with self._lock:
            self._do(Tick(at_s=self._now_s()))

    def stir(self) -> None:
        """Have whoever waits in `next` look again: at who is there, and at the disk."""
        if not self._is_stirred:
            self._is_stirred = True
            self._items.put(None)

    def interrupt(self, error: EdgeflError) -> None:
        """Have `next` raise this."""
        self._items.put(error)

    def next(self, who_is_there: Callable[[], Presence]) -> Instruction:
        """Wait for what is to be done next; raises what the round is interrupted with."""
        while True:
            try:
                item = self._items.get(timeout=min(self.wait_s(), MAX_SECONDS))
            except queue.Empty:
                self._around.storage.look()
                self.look()
                continue
            if isinstance(item, EdgeflError):
                raise item
            if item is not None:
                return item
            self._is_stirred = False
            self.note(who_is_there())

    def given_up(self) -> Iterator[GiveUp]:
        """Yield whom nobody has told yet that the round, which is closed, is over."""
        while not self._items.empty():
            if isinstance(item := self._items.get(), GiveUp):
                yield item

    def wait_s(self) -> float:
        """Return for how long there is nothing to look at: in a pause, not long."""
        with self._lock:
            if self._exchange.is_paused:
                return LOOK_S
            return max(0.0, self._exchange.due_s - self._around.clock())

    def close(self) -> None:
        """Accept nothing more, and give up whoever has not answered."""
        with self._lock:
            self._do(Stop(at_s=self._now_s()))

    def waits_for(self, device: str) -> bool:
        """Whether this device has not answered, and still can."""
        return device in self._exchange.waiting

    def has_answered(self, device: str) -> bool:
        return device in self.asked and device not in self._exchange.missing

    def waiting(self) -> frozenset[str]:
        """Return the devices that are waited for."""
        with self._lock:
            return frozenset(self._exchange.waiting)

    @property
    def is_paused(self) -> bool:
        return self._exchange.is_paused

    def asks_for(self, sha256: str) -> bool:
        """Whether a device needs this blob to take part."""
        return any(ref.sha256 == sha256 for ref in self.assignment.blobs())

    # With the lock.

    def _take(self, answer: AnswerRow, make_durable: Callable[[AnswerRow], None], at_s: float) -> None:
        make_durable(answer)
        self._answers[answer.device] = answer
        event = Answered if answer.file is not None else Failed
        self._do(event(answer.device, at_s=at_s))

    def _now_s(self) -> float:
        """Return the time, once the exchange knows of the pauses until then."""
        now_s = self._around.clock()
        self._do(*self._pauses())
        self._seen_s = now_s
        return now_s

    def _pauses(self) -> Iterator[Event]:
        """Yield what the storage has to tell since it was asked last: how long a pause took is what counts."""
        over_s, since_s = self._around.storage.pause_times()
        if (paused_s := over_s - self._paused_s) > 0:
            begin_s = self._seen_s if self._paused_since_s is None else self._paused_since_s
            yield Paused(at_s=begin_s)
            yield Resumed(at_s=begin_s + paused_s)
        if since_s is not None:
            yield Paused(at_s=since_s)
        self._paused_s, self._paused_since_s = over_s, since_s

    def _do(self, *events: Event) -> None:
        for instruction in self._exchange.handle(*events):
            self._act(instruction)
