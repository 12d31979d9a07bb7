"""How long devices take from a round's start to their answer, estimated from earlier rounds.

    deviation += (|took - mean| - deviation) / 4,   mean += (took - mean) / 4,   late after mean + 4 * deviation

This is TCP's estimate of a round trip (Jacobson 1988; RFC 6298, section 2), with a faster mean because a device's
training takes seconds and rounds are few. A device that did not answer in time is expected after twice as long as
before, like a timer that backs off (RFC 6298, section 5.5), until it answers again.
A device without an answer so far is as slow as the slowest of the others; in a job's first round, where nothing is
known, it is waited for until the deadline.
Memory: a few numbers for each device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SHARE = 0.25  # of a new duration in the estimates
FIRST_DEVIATION = 0.25  # of the first duration
DEVIATIONS = 4.0
BACK_OFF = 2.0
MOST = 2.0  # times the usual time: a device that is later than this is not expected any more


@dataclass(frozen=True, slots=True, order=True)
class Expectation:
    """When an answer is expected, in seconds from a round's start."""

    at_s: float  # the next time by which it may come: at first the usual time, then the latest, then later ones
    usual_s: float  # the mean
    late_s: float  # after this it is late
    chance: float = 1.0  # that it comes by `at_s`

    def later(self) -> Expectation | None:
        """Return what to expect of a device that has not come by `at_s`; None = nothing.

        After its usual time it is still on time; then there is half the chance in as much time again.
        """
        if self.at_s < self.late_s:
            return Expectation(self.late_s, self.usual_s, self.late_s)
        at_s = self.at_s + (self.at_s - self.usual_s)
        if not self.at_s < at_s <= MOST * self.usual_s:
            return None
        return Expectation(at_s, self.usual_s, self.late_s, self.chance / 2)


class Durations:
    """The devices of one job."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}  # device -> (mean, deviation) in seconds
        self._missed: dict[str, float] = {}  # device that missed its last round -> when it is expected

    def learn(self, took_s: Mapping[str, float], missed_s: Mapping[str, float]) -> None:
        """Take from one round how long its devices took, and how long those that were given up had."""
        for device, seconds in missed_s.items():
            expected = self._expected(device)
            if expected is None or seconds >= expected.late_s:  # else it was given up before its time
                self._missed[device] = max(seconds, 0.0 if expected is None else BACK_OFF * expected.late_s)
        for device, seconds in took_s.items():
            mean_s, deviation_s = self._known.get(device, (seconds, FIRST_DEVIATION * seconds))
            deviation_s += SHARE * (abs(seconds - mean_s) - deviation_s)
            self._known[device] = mean_s + SHARE * (seconds - mean_s), deviation_s
            self._missed.pop(device, None)

    def expected(self, devices: Iterable[str]) -> dict[str, Expectation]:
        """Return when each of these devices is expected; without those of which nothing can be said."""
        slowest = max(map(_expectation, self._known.values()), key=lambda one: one.late_s, default=None)
        found = {device: self._expected(device) or slowest for device in devices}
        return {device: one for device, one in found.items() if one is not None}

    def as_json(self) -> dict[str, list[float]]:
        """Return what `from_json` reads: for each device mean, deviation, and when it is expected after it missed."""
        devices = {**self._known, **self._missed}
        return {one: [*self._known.get(one, (0.0, 0.0)), self._missed.get(one, 0.0)] for one in devices}

    @classmethod
    def from_json(cls, said: Mapping[str, Sequence[float]]) -> Durations:
        """Read the result of `as_json`."""
        durations = cls()
        durations._known = {device: (mean, deviation) for device, (mean, deviation, _) in said.items() if mean > 0}
        durations._missed = {device: missed for device, (_, _, missed) in said.items() if missed > 0}
        return durations

    def _expected(self, device: str) -> Expectation | None:
        if device in self._missed:
            return Expectation(*[self._missed[device]] * 3)
        return _expectation(self._known[device]) if device in self._known else None


def _expectation(known: tuple[float, float]) -> Expectation:
    mean_s, deviation_s = known
    return Expectation(mean_s, mean_s, mean_s + DEVIATIONS * deviation_s)
