"""One exchange: devices get assignments, and each answers, fails or is given up. A state machine without I/O.

Its input are events, each with its time; its output are instructions, which a driver executes: the cloud's rounds
(`cloud/dataplane/grpc_fleet.py`), its relays (`relays.py`) and the virtual clock (`simulation/world/clock.py`).
An exchange is over when every device has answered, at its deadline, or, after the quorum has sent updates, when
all missing devices have been offline for the grace time, or when the grace window is over: some seconds, or as long as
waiting pays: while the missing devices, by when they are expected (`durations`), would make the number of updates per
second of the round at least as large as it is without them. So one that is nearly there is waited for, a slow one not.
Devices that are owed their answer to the exchange before (`rounds.late`) may give it while this one is open; none is
waited for, and it changes nothing else.
The design is that of dask/distributed's `worker_state_machine.py`, so that a test is a table of events.

Invariants: it reads no clock, and the same events give the same instructions. An answer is yielded once, in the
order of arrival, and never after `Close`. An event exactly at the deadline still counts. A pause stops its time.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate

from edgefl.exchange.durations import Expectation
from edgefl.exchange.events import (
    Admitted,
    Announce,
    Answered,
    Back,
    Begin,
    Close,
    Event,
    Failed,
    GiveUp,
    GiveUpReason,
    Instruction,
    Joined,
    Late,
    Left,
    Offline,
    Paused,
    Resumed,
    Stop,
    Tick,
    Withdrawn,
    Yield,
)
from edgefl.exchange.terms import Terms


class Exchange:
    """The state of one exchange. Not thread-safe."""

    def __init__(self, asked: Iterable[str], terms: Terms, owed: Iterable[str] = ()) -> None:
        self._terms = terms
        self._owed = set(owed)
        self._missing = dict.fromkeys(asked)  # in the order of their `Announce`
        self._updates: set[str] = set()  # devices whose updates count towards the quorum
        self._admitted: set[str] = set()  # those that a guard has admitted
        self._now_s = -math.inf  # time of the latest event
        # Below: times on the exchange's own clock, which is stopped in a pause.
        self._begin_s, self._end_s = math.inf, math.inf
        self._quorum_s = math.inf  # when the quorum was admitted
        self._window_s: float | None = None  # when waiting no longer pays; None = not computed since the last event
        self._took_s: dict[str, float] = {}  # device -> from the start to its update
        self._offline_since_s: dict[str, float] = {}  # missing devices only
        self._paused_since_s: float | None = None
        self._paused_s = 0.0  # total duration of finished pauses
        self._reason: GiveUpReason | None = None  # why it closed
        self.closed_s: float | None = None  # when it closed, on the driver's clock

    @property
    def missing(self) -> Collection[str]:
        """The devices that have not answered, also after the exchange is over."""
        return self._missing.keys()

    @property
    def waiting(self) -> Collection[str]:
        """The devices that are waited for."""
        return self._missing.keys() if self.closed_s is None else ()

    @property
    def offline(self) -> Collection[str]:
        """The missing devices that are offline."""
        return self._offline_since_s.keys()

    @property
    def is_paused(self) -> bool:
        return self._paused_since_s is not None

    @property
    def end_s(self) -> float:
        """The deadline, on the driver's clock, if there is no further pause."""
        return self._end_s + self._paused_s

    @property
    def due_s(self) -> float:
        """When the next `Tick` is needed, which ends the exchange, on the driver's clock. Infinite in a pause."""
        if self.closed_s is not None or self.is_paused:
            return math.inf
        return min(self._end_s, self._given_up_s(), self._grace_end_s()) + self._paused_s

    @property
    def took_s(self) -> Mapping[str, float]:
        """How long each device took from the start to its update, without pauses."""
        return self._took_s

    @property
    def missed_s(self) -> Mapping[str, float]:
        """How long each device had that was given up while it was online, without pauses, once it is over."""
        if self.closed_s is None or self._reason not in {GiveUpReason.LATE, GiveUpReason.GRACE}:
            return {}
        had_s = self.closed_s - self._paused_s - self._begin_s
        return {device: had_s for device in self._missing if device not in self._offline_since_s}

    def waits_for(self, device: str, at_s: float) -> bool:
        """Whether an answer of this device at this time would be accepted."""
        return device in self.waiting and at_s <= self.due_s

    @property
    def owed(self) -> Collection[str]:
        """The devices that have not given their answer to the exchange before, also after this one is over."""
        return self._owed

    def takes_late(self, device: str, at_s: float) -> bool:
        """Whether an answer of this device to the exchange before would be accepted at this time."""
        return device in self._owed and self.closed_s is None and at_s <= self.due_s

    def handle(self, *events: Event) -> list[Instruction]:
        """Process events in order, and return the instructions.

        Events of one call with the same time are simultaneous: the time ends the exchange before or after all of them.
        """
        instructions: list[Instruction] = []
        before_s = -math.inf
        for event in events:
            if before_s < event.at_s and self.due_s < event.at_s:
                instructions += self._close_in_time()
            before_s = event.at_s
            self._now_s = max(self._now_s, event.at_s)
            if self.closed_s is None:
                self._window_s = None
                instructions += self._take(event)
        return instructions

    def _take(self, event: Event) -> list[Instruction]:
        match event:
            case Begin():
                return self._begin(event)
            case Answered() | Failed() | Late() | Left():
                return self._answer(event)
            case Joined() | Resumed():
                return self._ask(event)
            case Admitted() | Withdrawn():
                self._count(event)
            case Offline() | Back():
                self._note_presence(event)
            case Paused():
                self._paused_since_s = self._now_s if self._paused_since_s is None else self._paused_since_s
            case Tick():
                return self._close_in_time() if self.due_s <= self._now_s else []
            case Stop():
                return self._close(GiveUpReason.STOPPED)
        return []

    def _begin(self, event: Begin) -> list[Instruction]:
        self._begin_s = self._own_s()
        self._end_s = self._begin_s + self._terms.deadline_s
        if not self._missing:
            return self._close(GiveUpReason.STOPPED)
        return [] if event.is_announced else self._announce()

    def _answer(self, event: Answered | Failed | Late | Left) -> list[Instruction]:
        if isinstance(event, Late):
            return self._take_late(event.device)
        if event.device not in self._missing:
            return []
        del self._missing[event.device]
        self._offline_since_s.pop(event.device, None)
        if isinstance(event, Answered):
            self._updates.add(event.device)
            if self._begin_s < math.inf:  # not from before a restart
                self._took_s[event.device] = self._own_s() - self._begin_s
        given = [] if isinstance(event, Left) else [Yield(event.device)]
        return [*given, *(() if self._missing else self._close(GiveUpReason.STOPPED))]

    def _take_late(self, device: str) -> list[Instruction]:
        if device not in self._owed:
            return []
        self._owed.remove(device)
        return [Yield(device, is_late=True)]

    def _count(self, event: Admitted | Withdrawn) -> None:
        """Note whether an update counts towards the quorum; the grace window begins when enough are admitted."""
        if isinstance(event, Withdrawn):
            self._updates.discard(event.device)
            self._admitted.discard(event.device)
        elif event.device in self._updates:
            self._admitted.add(event.device)
        has_quorum = len(self._admitted) >= max(1, self._terms.quorum)
        self._quorum_s = min(self._quorum_s, self._own_s()) if has_quorum else math.inf

    def _note_presence(self, event: Offline | Back) -> None:
        if isinstance(event, Back):
            self._offline_since_s.pop(event.device, None)
        elif event.device in self._missing:
            since_s = self._own_s() + (0.0 if event.was_seen else self._terms.return_s)
            self._offline_since_s[event.device] = min(since_s, self._offline_since_s.get(event.device, since_s))

    def _ask(self, event: Joined | Resumed) -> list[Instruction]:
        """Send a device its assignment; after a pause to all again, because they may have stopped trying to send."""
        if isinstance(event, Joined):
            self._missing[event.device] = None
            return [] if self.is_paused else [Announce(event.device)]
        if self._paused_since_s is None:
            return []
        self._paused_s += self._now_s - self._paused_since_s
        self._paused_since_s = None
        return self._announce()

    def _announce(self) -> list[Instruction]:
        return [Announce(device) for device in self._missing]

    def _own_s(self) -> float:
        now_s = self._now_s if self._paused_since_s is None else self._paused_since_s
        return now_s - self._paused_s

    def _given_up_s(self) -> float:
        """Return when all missing devices have been offline for the grace time, on the exchange's own clock."""
        gone = self._offline_since_s
        if not gone or len(gone) < len(self._missing) or len(self._updates) < self._terms.quorum:
            return math.inf
        return max(gone.values()) + self._terms.offline_grace_s

    def _grace_end_s(self) -> float:
        """Return when the grace window ends, on the exchange's own clock."""
        if self._quorum_s == math.inf:
            return math.inf
        if self._terms.expected is None:
            return self._quorum_s + self._terms.grace_s
        if self._window_s is None:
            self._window_s = self._begin_s + self._pays_until_s(self._terms.expected)
        return max(self._quorum_s, self._window_s)

    def _pays_until_s(self, expected: Mapping[str, Expectation]) -> float:
        """Return how long after the start the window ends, if no further update comes.

        A device that is late is expected a little later, as long as that pays.
        """
        here = [device for device in self._missing if device not in self._offline_since_s]
        if not expected.keys() >= set(here):
            return math.inf  # of one of them nothing is known
        count, until_s = len(self._updates), max(self._took_s.get(device, 0.0) for device in self._updates)
        left = sorted(one for device in here if (one := _after(expected[device], until_s)) is not None)
        while any(
            (count + more) * until_s >= count * one.at_s
            for one, more in zip(left, accumulate(one.chance for one in left), strict=True)
        ):
            until_s = left[0].at_s
            if (later := left.pop(0).later()) is not None:
                bisect.insort(left, later)
        return until_s

    def _close_in_time(self) -> list[Instruction]:
        self._now_s = max(self._now_s, self.due_s)
        ends = {
            GiveUpReason.OFFLINE: self._given_up_s(),
            GiveUpReason.GRACE: self._grace_end_s(),
            GiveUpReason.LATE: self._end_s,
        }
        return self._close(min(ends, key=lambda reason: ends[reason]))

    def _close(self, reason: GiveUpReason) -> list[Instruction]:
        self.closed_s, self._reason = self._now_s, reason
        return [*(GiveUp(device, reason) for device in self._missing), Close()]


def _after(expected: Expectation, now_s: float) -> Expectation | None:
    """Return the first expectation of a device that is after this time; None if it is given up."""
    later: Expectation | None = expected
    while later is not None and later.at_s <= now_s:
        later = later.later()
    return later
