"""Devices whose requests were computed when a stage's process ended: the values may have ended it.

Requests of a suspect are not merged with those of others, so that the next end says more. A device whose request was
alone in the process when it ended, twice within the time, is refused for that time. Pure: the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SUSPECT_S = 60.0
MAX_ENDS = 2


class Suspects:
    """The suspects of one model."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}
        self._ends: dict[str, int] = {}  # of the process, while it computed this device's request alone

    def note_death(self, devices: Sequence[str]) -> None:
        """Note whose requests were computed when the process ended."""
        now_s = self._clock()
        for device in [one for one, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[device]
            self._ends.pop(device, None)
        for device in set(devices):
            self._until_s[device] = now_s + SUSPECT_S
        if len(set(devices)) == 1:
            self._ends[devices[0]] = self._ends.get(devices[0], 0) + 1

    def are_alone(self, device: str) -> bool:
        """Whether this device's requests are not merged with others."""
        return self._until_s.get(device, 0.0) > self._clock()

    def refusal(self, device: str) -> str:
        """Return why this device is refused; empty if it is not."""
        left_s = self._until_s.get(device, 0.0) - self._clock()
        if left_s <= 0 or self._ends.get(device, 0) < MAX_ENDS:
            return ""
        return (
            f"the stage's process ended {self._ends[device]} times while it computed a request of device {device} "
            f"alone; its requests are refused for {left_s:.0f} s. Check their values and sizes"
        )
