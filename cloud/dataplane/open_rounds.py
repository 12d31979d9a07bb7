"""All open rounds: lookups by job, number or device, and calls to all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from cloud.dataplane.open_round import OpenRound
from edgefl.errors import EdgeflError
from edgefl.protocols.messages import ASSIGNMENTS
from edgefl.records import Traffic

_KINDS = frozenset(ASSIGNMENTS)


class OpenRounds:
    """All open rounds, by job and number."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._resuming: set[str] = set()
        self._open: dict[tuple[str, int], OpenRound] = {}
        self._traffic: dict[str, Traffic] = {}
        self._moved = Traffic()  # in all closed rounds
        self._stopped: dict[str | None, EdgeflError] = {}  # None = all jobs
        self._halted: set[str] = set()  # jobs that are to open no further round
        self._held: dict[str, tuple[int, frozenset[str]]] = {}  # job -> its last round, and who may still answer it
        self._kinds: dict[str, frozenset[str]] = {}  # device -> the kinds of assignment that its agent knows

    def expect(self, jobs: Iterable[str]) -> None:
        """Register jobs that will reopen their round after the cloud's restart."""
        with self._lock:
            self._resuming |= set(jobs)

    def resumed(self, job: str) -> None:
        """Report that a job has reopened its round, or never will."""
        with self._lock:
            self._resuming.discard(job)
            self._lock.notify_all()

    def wait_resumed(self, timeout_s: float) -> bool:
        """Wait for the expected rounds; until they are open, no device may be told that a round is over."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._resuming, timeout_s)

    @property
    def stopping(self) -> bool:
        """Whether all jobs were interrupted; their rounds will be reopened."""
        with self._lock:
            return None in self._stopped

    def add(self, opened: OpenRound) -> None:
        """Add an open round; raises the error that interrupted its job."""
        with self._lock:
            self._refuse_stopped(opened.assignment.job)
            self._open[opened.assignment.job, opened.assignment.round] = opened
            self._held.pop(opened.assignment.job, None)
        self.resumed(opened.assignment.job)

    def remove(self, closed: OpenRound) -> None:
        with self._lock:
            self._open.pop((closed.assignment.job, closed.assignment.round), None)
            moved = Traffic(up_bytes=closed.up_bytes, down_bytes=closed.down_bytes)
            self._traffic[closed.assignment.job] = self._traffic.get(closed.assignment.job, Traffic()) + moved
            self._moved += moved

    def traffic(self, job: str) -> Traffic:
        """Return the bytes moved in the job's closed rounds."""
        with self._lock:
            return self._traffic.get(job, Traffic())

    def moved(self) -> Traffic:
        """Return the bytes moved in all rounds since the start, open ones included."""
        with self._lock:
            opened = [Traffic(up_bytes=one.up_bytes, down_bytes=one.down_bytes) for one in self._open.values()]
            return sum(opened, self._moved)

    def get(self, job: str, number: int) -> OpenRound | None:
        with self._lock:
            return self._open.get((job, number))

    def regional(self, job: str) -> OpenRound | None:
        """Return the job's open round, if regions train several rounds for it: the numbers of devices' are others."""
        with self._lock:
            found = [one for (of, _), one in self._open.items() if of == job and one.region_rounds > 1]
        return found[0] if found else None

    def hold(self, job: str, number: int, owed: Iterable[str]) -> None:
        """Note which devices may still answer a round that is over, when the next one is open."""
        with self._lock:
            self._held[job] = number, frozenset(owed)

    def wants_late(self, job: str, number: int, device: str) -> bool:
        """Whether a device's answer of a round that is over is taken by the next one, open or not yet."""
        with self._lock:
            later, (held, owed) = self._open.get((job, number + 1)), self._held.get(job, (0, frozenset()))
        return later.takes_late(device) if later is not None else held == number and device in owed

    def all(self) -> list[OpenRound]:
        """Return the open rounds."""
        with self._lock:
            return list(self._open.values())

    def waiting_for(self, device: str) -> list[OpenRound]:
        """Return the open rounds that wait for this device's answer."""
        with self._lock:
            return [one for one in self._open.values() if one.waits_for(device)]

    def asking_for(self, sha256: str) -> list[OpenRound]:
        """Return the open rounds whose devices need this blob."""
        with self._lock:
            return [one for one in self._open.values() if one.asks_for(sha256)]

    def having(self, device: str) -> list[OpenRound]:
        """Return the open rounds that have this device in their cohort."""
        with self._lock:
            return [one for one in self._open.values() if device in one.asked]

    def note_kinds(self, device: str, kinds: Iterable[str]) -> None:
        """Record which kinds of assignment a device's agent knows, as far as the cloud knows them, too."""
        with self._lock:
            self._kinds[device] = _KINDS.intersection(kinds)

    def lacks(self, device: str, kind: str) -> bool:
        """Whether a device's agent said that it knows other kinds of assignment only; False if it said nothing yet."""
        with self._lock:
            return kind not in self._kinds.get(device, _KINDS)

    def wake(self) -> None:
        """Make every open round check presence and the storage."""
        with self._lock:
            for one in self._open.values():
                one.wake()

    def interrupt(self, error: EdgeflError, job: str | None = None) -> None:
        """Make a job, or all jobs, raise this error, in the open round or before the next."""
        with self._lock:
            self._stopped[job] = error
            for one in self._open.values():
                if job in {None, one.assignment.job}:
                    one.interrupt(error)

    def halt(self, job: str, *, halted: bool = True) -> None:
        """Let a job open no further round, or again; its open round goes on."""
        with self._lock:
            (self._halted.add if halted else self._halted.discard)(job)

    def is_halted(self, job: str) -> bool:
        """Whether the job is to open no further round; also if it was interrupted."""
        with self._lock:
            return job in self._halted or not self._stopped.keys().isdisjoint({job, None})

    def is_stopped(self, job: str) -> bool:
        """Whether the job was interrupted."""
        with self._lock:
            return not self._stopped.keys().isdisjoint({job, None})

    def refuse_stopped(self, job: str) -> None:
        """Raise the error that interrupted the job, if any."""
        with self._lock:
            self._refuse_stopped(job)

    def refuse_stopping(self) -> None:
        """Raise the error that interrupted all jobs, if any."""
        with self._lock:
            if (error := self._stopped.get(None)) is not None:
                raise error

    def forget(self, job: str) -> None:
        """Drop a job's state, after the job has ended."""
        self.resumed(job)
        with self._lock:
            self._stopped.pop(job, None)
            self._halted.discard(job)
            self._traffic.pop(job, None)
            self._held.pop(job, None)

    def _refuse_stopped(self, job: str) -> None:
        error = self._stopped.get(job) or self._stopped.get(None)
        if error is not None:
            raise error
