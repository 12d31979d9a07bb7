"""The events of an exchange, and its instructions: records without logic.

Every event has its time in seconds, on the driver's clock: monotonic or virtual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events."""

    at_s: float = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Begin(Event):
    """The exchange starts to wait for answers."""

    is_announced: bool = False  # whether the devices already have their assignments, e.g. from before a restart


@dataclass(frozen=True, slots=True)
class Joined(Event):
    """One more device is asked."""

    device: str


@dataclass(frozen=True, slots=True)
class Left(Event):
    """A device is no longer asked: it is not waited for, and may join again."""

    device: str


@dataclass(frozen=True, slots=True)
class Answered(Event):
    """A device sent an update, or a reply."""

    device: str


@dataclass(frozen=True, slots=True)
class Late(Event):
    """A device sent its update of the exchange before, which is over."""

    device: str


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """A device answered without an update."""

    device: str


@dataclass(frozen=True, slots=True)
class Admitted(Event):
    """The guard has admitted the update of a device: it is one of the quorum after which the grace window begins."""

    device: str


@dataclass(frozen=True, slots=True)
class Withdrawn(Event):
    """The update of a device no longer counts towards the quorum."""

    device: str


@dataclass(frozen=True, slots=True)
class Offline(Event):
    """A device is offline."""

    device: str
    was_seen: bool = True  # False = no message since the asking side started; it may be about to reconnect


@dataclass(frozen=True, slots=True)
class Back(Event):
    """A device is online again."""

    device: str


@dataclass(frozen=True, slots=True)
class Paused(Event):
    """Answers cannot be stored: the disk is full. No time passes until `Resumed`."""


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """Answers can be stored again."""


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop(Event):
    """No more answers are needed."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """The base of all instructions to the driver."""


@dataclass(frozen=True, slots=True)
class Announce(Instruction):
    """Send a device its assignment."""

    device: str


@dataclass(frozen=True, slots=True)
class Yield(Instruction):
    """Yield a device's answer."""

    device: str
    is_late: bool = False  # it is that of the exchange before


class GiveUpReason(Enum):
    """Why a device is given up."""

    LATE = "late"  # the deadline has passed
    OFFLINE = "offline"  # all missing devices have been offline for the grace time
    GRACE = "grace"  # the quorum has answered, and the grace window after it is over
    STOPPED = "stopped"  # the driver stopped the exchange


@dataclass(frozen=True, slots=True)
class GiveUp(Instruction):
    """Tell a device that its answer is no longer needed."""

    device: str
    reason: GiveUpReason


@dataclass(frozen=True, slots=True)
class Close(Instruction):
    """The exchange is over; this is its last instruction."""
