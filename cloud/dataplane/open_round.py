"""Rounds that wait for answers: they pass answers, presence and time to their exchange.

Invariant: an answer is accepted only while its round is open, once per device of the cohort, and is in the database
before it is yielded. Both happen under the round's lock, so answers are yielded in the database's order, and no
answer is acknowledged that the round will not yield.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from cloud.broker.link import DeviceLink
from cloud.jobs.answers import AnswerRow
from cloud.state.enrolment import REMOVED
from cloud.state.storage import LOOK_S, Storage
from edgefl.errors import EdgeflError
from edgefl.exchange import (
    Admitted,
    Answered,
    Back,
    Begin,
    Event,
    Exchange,
    Failed,
    GiveUp,
    Instruction,
    Joined,
    Late,
    Left,
    Offline,
    Paused,
    Resumed,
    Stop,
    Terms,
    Tick,
    Withdrawn,
)
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import Assignment, Evaluate, Fit
from edgefl.terminal.bounds import MAX_SECONDS

_K = TypeVar("_K")
Clock = Callable[[], float]  # seconds, monotonic


class OnlineState(Enum):
    """Whether a device is online."""

    ONLINE = "online"
    OFFLINE = "offline"
    UNKNOWN = "unknown"  # no message since the cloud's start


@dataclass(frozen=True, slots=True)
class Presence:
    """The devices that are online at one time."""

    online: frozenset[str]
    offline: frozenset[str]  # devices that have reported, and are not online
    is_connected: bool  # to the broker; if not, every device counts as online

    @classmethod
    def of(cls, link: DeviceLink) -> Presence:
        return cls(link.online(), link.offline(), not link.reason)

    def online_state(self, device: str) -> OnlineState:
        """Return whether one device is online."""
        if not self.is_connected or device in self.online:
            return OnlineState.ONLINE
        return OnlineState.OFFLINE if device in self.offline else OnlineState.UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """A round's clock and storage, and what executes its instructions."""

    clock: Clock = time.monotonic
    storage: Storage = field(default_factory=Storage)
    act: Callable[[Instruction], None] | None = None  # at once, under the round's lock; None = `next` returns them


class OpenRound:
    """One round of a job, or one message of a relay, until it is closed."""

    def __init__(
        self, assignment: Assignment, asked: Iterable[str], terms: Terms, around: Surroundings | None = None,
        owed: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """`owed` are devices whose answer of the round before is also taken."""
        self.assignment = assignment
        asked = tuple(asked)
        self.asked, self.owed = frozenset(asked), frozenset(owed)
        self.terms = terms
        self.region_rounds = 1  # rounds in each region for this one
        # Why a device that is connected through a region ("" = directly) cannot answer; empty = it can.
        self.unreachable: Callable[[str], str] = lambda _region: ""
        self.up_bytes = self.down_bytes = 0
        self.record: Callable[[AnswerRow], None] | None = None  # makes an answer durable; None = `Jobs.record`
        self.source: Path | None = None  # the file that devices download for it; None = blobs
        self._around = around or Surroundings()
        self._lock = threading.RLock()  # `act` may call methods of the round
        self._exchange = Exchange(asked, terms, self.owed)
        self._answers: dict[str, AnswerRow] = {}  # accepted, not taken yet
        self._late: dict[str, AnswerRow] = {}  # the same, of the round before
        # Bounded: it gets a few instructions per device, and `wake` puts in one None at a time.
        self._items: queue.SimpleQueue[Instruction | EdgeflError | None] = queue.SimpleQueue()
        self._act = self._around.act or self._items.put
        self._is_woken = False
        self._seen_s = self._around.clock()
        self._paused_s: float = self._around.storage.pause_times()[0]
        self._paused_since_s: float | None = None

    def begin(self, *, is_announced: bool = False) -> None:
        """Start waiting for answers, and send the assignment unless the devices have it already (`is_announced`)."""
        with self._lock:
            self._do(Begin(is_announced=is_announced, at_s=self._now_s()))

    def accept(self, answer: AnswerRow, make_durable: Callable[[AnswerRow], None]) -> bool:
        """Accept a device's answer once; False if the round is over, or has an answer of the device."""
        with self._lock:
            at_s = self._now_s()
            if not self._awaits(answer, at_s):
                return False
            self._take(answer, make_durable, at_s)
            return True

    def accept_each(
        self, answers: Mapping[_K, AnswerRow], make_durable: Callable[[Collection[_K]], Collection[_K]]
    ) -> Collection[_K]:
        """Accept those answers that the round waits for and that `make_durable` could keep; return their keys.

        `make_durable` gets the keys of the answers that are waited for, and returns some of them in their order.
        """
        with self._lock:
            at_s = self._now_s()
            awaited = [key for key, answer in answers.items() if self._awaits(answer, at_s)]
            awaited.sort(key=lambda key: not answers[key].late)  # the last answer of the round itself ends it
            kept = make_durable(awaited) if awaited else ()
            for answer in map(answers.__getitem__, kept):
                (self._late if answer.late else self._answers)[answer.device] = answer
            self._do(*(_event_of(answers[key])(answers[key].device, at_s=at_s) for key in kept))
        return kept

    def accept_all(
        self, answers: Sequence[AnswerRow], make_durable: Callable[[Sequence[AnswerRow]], None]
    ) -> list[str]:
        """Accept the answers of several devices, or none of them; return the devices whose answers are not awaited."""
        with self._lock:
            at_s = self._now_s()
            if others := [one.device for one in answers if not self._exchange.waits_for(one.device, at_s)]:
                return others
            make_durable(answers)
            for answer in answers:
                self._answers[answer.device] = answer
            self._do(*(_event_of(answer)(answer.device, at_s=at_s) for answer in answers))
        return []

    def join(self, devices: Iterable[str]) -> None:
        """Ask more devices, unless the round is over; also those that have left it."""
        with self._lock:
            more = [one for one in devices if one not in self.asked] if self._exchange.closed_s is None else []
            self.asked |= frozenset(more)
            self._do(*(Joined(device, at_s=self._now_s()) for device in more))

    def leave(self, devices: Iterable[str]) -> None:
        """Do not ask these devices any more, and do not take their answers."""
        with self._lock:
            left = [one for one in devices if one in self._exchange.waiting]
            self.asked -= frozenset(left)
            self._do(*(Left(device, at_s=self._now_s()) for device in left))

    def forget(self, device: str, make_durable: Callable[[AnswerRow], None]) -> None:
        """Record a refusal for a device that was removed from the fleet, also if its answer is not taken yet."""
        refusal = AnswerRow(device=device, reason=REMOVED)
        with self._lock:
            at_s = self._now_s()
            if device in self._late:
                self._late[device] = dataclasses.replace(refusal, late=True)
            if device in self._answers:
                self._answers[device] = refusal
                self._do(Withdrawn(device, at_s=at_s))
            elif self._exchange.waits_for(device, at_s):
                self._take(refusal, make_durable, at_s)

    def settle(self, devices: Iterable[str], *, admitted: bool) -> None:
        """Report that a guard has admitted the update of these devices, or refused it."""
        kind = Admitted if admitted else Withdrawn
        with self._lock:
            at_s = self._now_s()
            self._do(*(kind(device, at_s=at_s) for device in devices))

    def durations(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Return how long devices took, and how long those had that were given up, for `Durations.learn`."""
        with self._lock:
            return dict(self._exchange.took_s), self._exchange.missed_s

    def take(self, device: str, *, is_late: bool = False) -> AnswerRow:
        """Remove and return a device's answer, or that of the round before."""
        with self._lock:
            return (self._late if is_late else self._answers).pop(device)

    def note(self, presence: Presence) -> None:
        """Pass changes of presence to the exchange."""
        with self._lock:
            at_s, exchange, online = self._now_s(), self._exchange, OnlineState.ONLINE
            back = [device for device in exchange.offline if presence.online_state(device) is online]
            gone = [device for device in exchange.waiting if presence.online_state(device) is not online]
            self._do(*(Back(device, at_s=at_s) for device in back))
            self._do(*(Offline(device, was_seen=device in presence.offline, at_s=at_s) for device in gone))

    def look(self) -> None:
        """Pass the time, and pauses of the storage, to the exchange."""
        with self._lock:
            self._do(Tick(at_s=self._now_s()))

    def wake(self) -> None:
        """Wake the thread in `next`, so that it checks presence and the disk."""
        if not self._is_woken:
            self._is_woken = True
            self._items.put(None)

    def interrupt(self, error: EdgeflError) -> None:
        """Make `next` raise this error."""
        self._items.put(error)

    def next(self, presence: Callable[[], Presence]) -> Instruction:
        """Wait for the next instruction; raises the error that interrupts the round."""
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
            self._is_woken = False
            self.note(presence())

    def given_up(self) -> Iterator[GiveUp]:
        """Yield the pending instructions to give up a device, once the round is closed."""
        while not self._items.empty():
            if isinstance(item := self._items.get(), GiveUp):
                yield item

    def wait_s(self) -> float:
        """Return the time until the next `look` is due (s), which is short in a pause."""
        with self._lock:
            if self._exchange.is_paused:
                return LOOK_S
            return max(0.0, self._exchange.due_s - self._around.clock())

    def left_s(self) -> float:
        """Return how long answers are accepted from now on (s), if nothing ends the round earlier."""
        with self._lock:  # a round that is about to begin has all its time
            return max(0.0, min(self._exchange.end_s - self._around.clock(), self.terms.deadline_s))

    def close(self) -> None:
        """Accept no more answers, and give up the devices that have not answered."""
        with self._lock:
            self._do(Stop(at_s=self._now_s()))

    def is_of(self, key: pb.UpdateKey) -> bool:
        """Whether an answer began with this round's model: that of another parent's round of this number may not."""
        assignment = self.assignment
        if not key.model or key.round != assignment.round or not isinstance(assignment, Fit | Evaluate):
            return True
        return key.model == assignment.model.sha256

    def is_around(self, key: pb.UpdateKey) -> bool:
        """Whether a device's round is one of the regional rounds for this one."""
        return (key.round - 1) // self.region_rounds + 1 == self.assignment.round

    def waits_for(self, device: str) -> bool:
        """Whether the device has not answered yet, and the round is open."""
        return device in self._exchange.waiting

    def has_answered(self, device: str) -> bool:
        return device in self.asked and device not in self._exchange.missing

    def takes_late(self, device: str) -> bool:
        """Whether the device may still send its answer of the round before."""
        with self._lock:
            return self._exchange.takes_late(device, self._now_s())

    def has_late(self, device: str) -> bool:
        """Whether the device has sent its answer of the round before in this one."""
        return device in self.owed and device not in self._exchange.owed

    def missing(self) -> frozenset[str]:
        """Return the devices that have not answered, also after the round is closed."""
        with self._lock:
            return frozenset(self._exchange.missing)

    def still_owed(self) -> list[str]:
        """Return the devices that have not sent their answer of the round before."""
        with self._lock:
            return sorted(self._exchange.owed)

    def waiting(self) -> frozenset[str]:
        """Return the devices that are waited for."""
        with self._lock:
            return frozenset(self._exchange.waiting)

    @property
    def is_paused(self) -> bool:
        return self._exchange.is_paused

    def asks_for(self, sha256: str) -> bool:
        """Whether a device needs this blob for the assignment."""
        return any(ref.sha256 == sha256 for ref in self.assignment.blobs())

    # Below: the caller has the lock.

    def _awaits(self, answer: AnswerRow, at_s: float) -> bool:
        exchange = self._exchange
        return (exchange.takes_late if answer.late else exchange.waits_for)(answer.device, at_s)

    def _take(self, answer: AnswerRow, make_durable: Callable[[AnswerRow], None], at_s: float) -> None:
        make_durable(answer)
        (self._late if answer.late else self._answers)[answer.device] = answer
        self._do(_event_of(answer)(answer.device, at_s=at_s))

    def _now_s(self) -> float:
        """Return the time, after passing the pauses until now to the exchange."""
        now_s = self._around.clock()
        self._do(*self._pauses())
        self._seen_s = now_s
        return now_s

    def _pauses(self) -> Iterator[Event]:
        """Yield the storage's pauses since the last call; those that are over as one pause of their total duration."""
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


def _event_of(answer: AnswerRow) -> type[Answered | Failed | Late]:
    if answer.late:
        return Late
    return Answered if answer.file is not None else Failed
