"""The parts of a running cloud: how each of them is, and what becomes of the process where one ends for good.

A part that raises in its thread is started again, with pauses that grow; where that does not help, or a part says
that it has ended, the process ends with the reason, so that whatever supervises it starts a whole one.
Invariant: no part ends in silence: it is kept, or `failure` is set and `on_end` was called.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from edgefl.errors import PartFailed
from edgefl.protocols.backoff import Backoff
from edgefl.terminal.text import one_line

MAX_FAULTS, FAULTS_S = 5, 60.0  # a part that raises so often within such a time is not started again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
LOW_DISK_BYTES = 64 << 20
LOCK_PATIENCE_S = 2.0
FRESH_S = 1.0  # for so long one look serves all who ask: anybody may
MAX_REASON_CHARS = 300

_log = logging.getLogger(__name__)

Check = Callable[[], str]  # why a part is not well; empty = it is


class Parts:
    """Names, checks and ends of a cloud's parts. Methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checks: dict[str, Check] = {}
        self._ended: dict[str, str] = {}
        self._lock = threading.Lock()
        self._seen: tuple[float, Mapping[str, str]] | None = None
        self._closing = threading.Event()
        self.failure: PartFailed | None = None
        self.on_end: Callable[[], object] = lambda: None

    def check(self, name: str, check: Check) -> None:
        """Say how a part is looked at."""
        self._checks[name] = check

    def reasons(self) -> Mapping[str, str]:
        """Return why each part is not well; empty for one that is."""
        with self._lock:
            if self._seen is None or self._clock() - self._seen[0] >= FRESH_S:
                self._seen = self._clock(), {name: self._look(name) for name in {**self._checks, **self._ended}}
            return self._seen[1]

    def ended(self, name: str, error: BaseException) -> None:
        """A part has ended and does not come back: so does the process."""
        _log.critical("part.ended part=%s", name, exc_info=error)
        self._ended[name] = f"it has ended: {error!r}"
        why = one_line(repr(error), MAX_REASON_CHARS)
        self.failure = self.failure or PartFailed(
            f"the cloud ends, since a part of it did: {name}, {why}. Its log says more; jobs go on at the next start"
        )
        self.on_end()

    def keep(self, name: str, work: Callable[[], None]) -> None:
        """Run a part in this thread until it returns, again after each error, unless there were too many of late."""
        faults_s: deque[float] = deque(maxlen=MAX_FAULTS)
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            try:
                return work()
            except Exception as error:  # noqa: BLE001 - the outermost line of a thread
                faults_s.append(self._clock())
                if len(faults_s) == MAX_FAULTS and faults_s[-1] - faults_s[0] < FAULTS_S:
                    return self.ended(name, error)
                _log.exception("part.fault part=%s: it starts again", name)
            if self._closing.wait(pauses.next_s()):
                return None

    def close(self) -> None:
        """The process ends: nothing is started again."""
        self._closing.set()

    def _look(self, name: str) -> str:
        if name in self._ended:
            return one_line(self._ended[name], MAX_REASON_CHARS)
        try:
            return one_line(self._checks[name](), MAX_REASON_CHARS)
        except OSError as error:
            return one_line(f"it cannot be looked at: {error}", MAX_REASON_CHARS)


def database_fault(path: Path) -> str:
    """Return why the database cannot be written now, without writing to it."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", LOCK_PATIENCE_S, uri=True)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            db.execute("ROLLBACK")
    except sqlite3.Error as error:
        return f"{path.name}: {error}"
    return ""


def disk_fault(folder: Path) -> str:
    """Return why there is too little space."""
    free = shutil.disk_usage(folder).free
    if free >= LOW_DISK_BYTES:
        return ""
    return f"{free >> 20} MB are free where {folder} is, expected {LOW_DISK_BYTES >> 20} or more; make space there"
