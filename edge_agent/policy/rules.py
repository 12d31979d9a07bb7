"""A policy, such as `idle,charging,unmetered,22:00-06:00`: every one of its terms must hold.

    idle          programs other than the trainer use at most 25% of the processors
    charging      the machine has no battery, or it is on mains
    unmetered     the network is not paid by volume
    HH:MM-HH:MM   local time of the device, also over midnight

Invariant: a policy that can never hold is refused when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgefl.errors import ConfigError

IDLE_PERCENT = 25.0  # of all processors
TERMS = ("idle", "charging", "unmetered")
DAY_MIN = 24 * 60

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineState:
    """What a policy judges. None = this machine does not say."""

    busy_percent: float | None  # of all processors, used by other programs
    on_mains: bool | None
    metered: bool | None
    minute: int  # of the local day
    unknown: Mapping[str, str]  # term -> why it cannot be judged


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePolicy:
    """When a device works for the fleet."""

    text: str
    terms: frozenset[str] = frozenset()
    hours: tuple[tuple[int, int], ...] = ()  # (from, to), minutes of the day; `from` counts, `to` does not

    def refusals(self, state: MachineState) -> dict[str, str]:
        """Return why the device does not work now: codes, with what was measured; empty if it works."""
        found: dict[str, str] = {}
        for term in TERMS:
            if term in self.terms and term in state.unknown:
                found[f"{term}-unknown"] = state.unknown[term]
        if "idle" in self.terms and state.busy_percent is not None and state.busy_percent > IDLE_PERCENT:
            found["not-idle"] = f"other programs use {state.busy_percent:.0f}% of the processors"
        if "charging" in self.terms and state.on_mains is False:
            found["not-charging"] = "it runs on its battery"
        if "unmetered" in self.terms and state.metered is True:
            found["metered"] = "the network is paid by volume"
        for begin, end in self.hours:
            if not _within(begin, end, state.minute):
                found["outside-hours"] = f"it is {_clock(state.minute)}, not {_clock(begin)}-{_clock(end)}"
        return found


def parse_policy(text: str) -> DevicePolicy:
    """Read a policy; raises ConfigError for an unknown term, and for one that never holds."""
    terms, hours = set[str](), list[tuple[int, int]]()
    for part in (one.strip() for one in text.split(",")):
        if part in TERMS:
            terms.add(part)
        elif (found := _HOURS.fullmatch(part)) is not None:
            begin, end = (int(found[at]) * 60 + int(found[at + 1]) for at in (1, 3))
            hours.append((begin, end))
        else:
            raise ConfigError(
                f"--policy {text[:200]!r}: {part[:80]!r} is not one of {', '.join(TERMS)}, or hours such as 22:00-06:00"
            )
    if not any(all(_within(begin, end, minute) for begin, end in hours) for minute in range(DAY_MIN)):
        shown = ",".join(f"{_clock(begin)}-{_clock(end)}" for begin, end in hours)
        raise ConfigError(f"--policy {text[:200]!r} is never true: no minute of a day is in all of {shown}; all terms "
                          "must hold at once")  # fmt: skip
    return DevicePolicy(text=text, terms=frozenset(terms), hours=tuple(hours))


def refuse_never_true(policy: DevicePolicy, unknown: Mapping[str, str]) -> None:
    """Raise ConfigError if this machine cannot say what a term of its policy needs: it would never work."""
    for term, why in unknown.items():
        if term in policy.terms:
            raise ConfigError(
                f"--policy {policy.text!r} is never true on this device: {term} cannot be judged, because {why}. Leave "
                f"out {term}"
            )


def _within(begin: int, end: int, minute: int) -> bool:
    return begin <= minute < end if begin <= end else minute >= begin or minute < end


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
