"""Which job gets which devices, when several want the same ones: by priority, and fair among equals.

Jobs are in an order: a higher priority first; among equals the job that has had the least device time, divided by its
weight (start-time fair queueing, Goyal et al. 1996); then the older one. A job gets its cohort when all of it is free,
and when enough devices are left for the jobs before it, also for their next rounds. So a job that wants many devices
is not starved by jobs that want few, and a job between two rounds keeps its place in the order.

Invariant: a device works for one job at most, unless a job shares devices; a device that has answered is free again.
All state is in memory: after a restart of the cloud, open rounds get their devices back, and shares begin anew.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Sharer:
    """One job that takes part."""

    priority: int
    weight: float
    order: int  # of arrival
    used_s: float  # device time, divided by the weight
    wanted: frozenset[str] = frozenset()  # devices of which it can use any
    count: int = 0  # how many of them it needs
    is_waiting: bool = False

    def place(self) -> tuple[int, float, int]:
        return -self.priority, self.used_s, self.order


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a job does not get its devices yet."""

    num_devices: int  # that it lacks
    jobs: tuple[str, ...]  # that have them, or come first
    position: int  # among the jobs that wait, from 1

    def text(self) -> str:
        """Return it for people."""
        devices = "1 device that works" if self.num_devices == 1 else f"{self.num_devices} devices that work"
        return f"waiting for {devices} for {', '.join(self.jobs)}; position {self.position} in the queue"


@dataclass(slots=True)
class DeviceShares:
    """The devices of a fleet among its jobs. Methods may be called from any thread."""

    clock: Callable[[], float] = time.monotonic
    changed: Callable[[], None] = lambda: None  # called when devices have become free
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sharers: dict[str, _Sharer] = field(default_factory=dict)
    _held: dict[str, tuple[str, float]] = field(default_factory=dict)  # device -> (its job, since when)
    _arrivals: Iterable[int] = field(default_factory=itertools.count)

    def enter(self, job: str, *, priority: int = 0, weight: float = 1.0) -> None:
        """Let a job take part, from now until it leaves."""
        with self._lock:
            least_s = min((one.used_s for one in self._sharers.values()), default=0.0)
            order = next(iter(self._arrivals))
            self._sharers.setdefault(job, _Sharer(priority=priority, weight=weight, order=order, used_s=least_s))

    def leave(self, job: str) -> None:
        """Free all devices of a job, and forget it."""
        self.release(job)
        with self._lock:
            self._sharers.pop(job, None)
        self.changed()

    def ask(self, job: str, wanted: Collection[str], count: int) -> Wait | list[str]:
        """Take all free devices among the wanted, if `count` of them can be used; return them, or why not yet.

        The caller then keeps those of its cohort by `keep`.
        """
        with self._lock:
            one = self._sharers[job]
            one.wanted, one.count, one.is_waiting = frozenset(wanted), count, True
            free = one.wanted - self._held.keys()
            before = [name for name in self._in_order(job) if self._reserves(name, free)]
            left = len(free) - sum(self._reserves(name, free) for name in before)
            if left < count:
                holders = {self._held[device][0] for device in one.wanted & self._held.keys()}
                waiting = sorted((name for name, other in self._sharers.items() if other.is_waiting),
                                 key=lambda name: self._sharers[name].place())  # fmt: skip
                return Wait(count - max(0, left), tuple(sorted(holders | {*before})), waiting.index(job) + 1)
            one.is_waiting = False
            now_s = self.clock()
            self._held |= dict.fromkeys(free, (job, now_s))
            return sorted(free)

    def rest(self, job: str) -> None:
        """Reserve nothing for a job that lacks devices which are not there."""
        with self._lock:
            if job in self._sharers:
                self._sharers[job].count, self._sharers[job].is_waiting = 0, False
        self.changed()

    def keep(self, job: str, cohort: Collection[str]) -> None:
        """Free the devices of a job that are not in its cohort; take those of a cohort from before a restart."""
        with self._lock:
            now_s = self.clock()
            for device in [device for device, (holder, _) in self._held.items() if holder == job]:
                if device not in cohort:
                    del self._held[device]  # it did not work: it costs nothing
            for device in cohort:
                self._held.setdefault(device, (job, now_s))
            if job in self._sharers:
                self._sharers[job].is_waiting = False
        self.changed()

    def release(self, job: str, devices: Collection[str] | None = None) -> None:
        """Free devices that work for a job no longer; None = all, because its round is over."""
        with self._lock:
            now_s, one = self.clock(), self._sharers.get(job)
            asked = list(self._held) if devices is None else devices
            for device in [device for device in asked if device in self._held and self._held[device][0] == job]:
                _, since_s = self._held.pop(device)
                if one is not None:
                    one.used_s += (now_s - since_s) / one.weight
            if devices is None and one is not None:
                one.is_waiting = False
        self.changed()

    def holder(self, device: str) -> str | None:
        """Return the job that a device works for, if any."""
        with self._lock:
            held = self._held.get(device)
            return None if held is None else held[0]

    # The caller has the lock.

    def _in_order(self, job: str) -> list[str]:
        """Return the jobs before this one."""
        place = self._sharers[job].place()
        return [name for name, one in self._sharers.items() if name != job and one.place() < place]

    def _reserves(self, job: str, free: Collection[str]) -> int:
        """Return how many of these free devices must be left to a job; those that it holds will be its again."""
        one = self._sharers[job]
        num_held = sum(holder == job for holder, _ in self._held.values())
        return min(max(0, one.count - num_held), len(one.wanted.intersection(free)))
