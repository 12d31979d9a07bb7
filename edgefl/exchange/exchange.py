"""One exchange: devices get assignments, and each answers, fails or is given up. A state machine without I/O.

Its input are events, each with its time; its output are instructions, which a driver executes: the cloud's rounds
(`cloud/dataplane/grpc_fleet.py`), its relays (`relays.py`) and the virtual clock (`simulation/world/clock.py`).
An exchange is over when every device has answered, at its deadline, or, after the quorum has sent updates, when
all missing devices have been offline for the grace time.
The design is that of dask/distributed's `worker_state_machine.py`, so that a test is a table of events.

Invariants: it reads no clock, and the same events give the same instructions. An answer is yielded once, in the
order of arrival, and never after `Close`. An event exactly at the deadline still counts. A pause stops its time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from edgefl.exchange.events import (
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

    def __init__(self, asked: Iterable[str], terms: Terms) -> None:
        self._terms = terms
        self._missing = dict.fromkeys(asked)  # in the order of their `Announce`
        self._updates: set[str] = set()  # devices whose updates count towards the quorum
        self._now_s = -math.inf  # time of the latest event
        # Below: times on the exchange's own clock, which is stopped in a pause.
        self._end_s = math.inf
        self._offline_since_s: dict[str, float] = {}  # missing devices only
        self._paused_since_s: float | None = None
        self._paused_s = 0.0  # total duration of finished pauses
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
        return min(self._end_s, self._given_up_s()) + self._paused_s

    def waits_for(self, device: str, at_s: float) -> bool:
        """Whether an answer of this device at this time would be accepted."""
        return device in self.waiting and at_s <= self.due_s

    def handle(self, *events: Event) -> list[Instruction]:
        """Process events in order, and return the instructions."""
        instructions: list[Instruction] = []
        for event in events:
            if self.due_s < event.at_s:
                instructions += self._close_in_time()
            self._now_s = max(self._now_s, event.at_s)
            if self.closed_s is None:
                instructions += self._take(event)
        return instructions

    def _take(self, event: Event) -> list[Instruction]:
        match event:
            case Begin():
                return self._begin(event)
            case Answered() | Failed():
                return self._answer(event)
            case Joined() | Resumed():
                return self._ask(event)
            case Withdrawn():
                self._updates.discard(event.device)
            case Offline():
                self._note_offline(event)
            case Back():
                self._offline_since_s.pop(event.device, None)
            case Paused():
                self._paused_since_s = self._now_s if self._paused_since_s is None else self._paused_since_s
            case Tick():
                return self._close_in_time() if self.due_s <= self._now_s else []
            case Stop():
                return self._close(GiveUpReason.STOPPED)
        return []

    def _begin(self, event: Begin) -> list[Instruction]:
        self._end_s = self._own_s() + self._terms.deadline_s
        if not self._missing:
            return self._close(GiveUpReason.STOPPED)
        return [] if event.is_announced else self._announce()

    def _answer(self, event: Answered | Failed) -> list[Instruction]:
        if event.device not in self._missing:
            return []
        del self._missing[event.device]
        self._offline_since_s.pop(event.device, None)
        if isinstance(event, Answered):
            self._updates.add(event.device)
        return [Yield(event.device), *(() if self._missing else self._close(GiveUpReason.STOPPED))]

    def _note_offline(self, event: Offline) -> None:
        if event.device in self._missing:
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

    def _close_in_time(self) -> list[Instruction]:
        self._now_s = max(self._now_s, self.due_s)
        return self._close(GiveUpReason.OFFLINE if self._given_up_s() <= self._end_s else GiveUpReason.LATE)

    def _close(self, reason: GiveUpReason) -> list[Instruction]:
        self.closed_s = self._now_s
        return [*(GiveUp(device, reason) for device in self._missing), Close()]
