"""What can happen to an exchange, and what is then to be done: records, without a line of logic.

Every event carries its time in seconds, on whatever clock its driver has: monotonic or virtual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened at a time."""

    at_s: float = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Begin(Event):
    """From now on answers are waited for."""

    is_told: bool = False  # whether the devices know already, e.g. from before a restart


@dataclass(frozen=True, slots=True)
class Answered(Event):
    """A device sent what it was asked for."""

    device: str


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """A device answered that it cannot."""

    device: str


@dataclass(frozen=True, slots=True)
class Withdrawn(Event):
    """What a device sent no longer counts towards the quorum."""

    device: str


@dataclass(frozen=True, slots=True)
class Offline(Event):
    """A device is not there."""

    device: str
    heard_of: bool = True  # False = not since the asking side started: it may only be on its way back


@dataclass(frozen=True, slots=True)
class Back(Event):
    """A device is there again."""

    device: str


@dataclass(frozen=True, slots=True)
class Paused(Event):
    """Answers cannot be stored: the disk is full. No time passes until `Resumed`."""


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """Answers can be stored again."""


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """Nothing but time has passed."""


@dataclass(frozen=True, slots=True)
class Stop(Event):
    """Further answers are not wanted."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the driver is to do."""


@dataclass(frozen=True, slots=True)
class Tell(Instruction):
    """Tell a device what it is asked."""

    device: str


@dataclass(frozen=True, slots=True)
class Yield(Instruction):
    """Hand a device's answer on."""

    device: str


class Why(Enum):
    """Why a device is given up."""

    LATE = "late"  # the deadline has passed
    OFFLINE = "offline"  # for the whole grace time, as everybody else who is missing
    UNWANTED = "unwanted"  # the driver stopped it


@dataclass(frozen=True, slots=True)
class GiveUp(Instruction):
    """A device's answer is not waited for any more: tell it."""

    device: str
    why: Why


@dataclass(frozen=True, slots=True)
class Close(Instruction):
    """The exchange is over: no instruction follows."""
