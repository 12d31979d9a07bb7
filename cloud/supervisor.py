"""Supervises the parts of a running cloud: their health checks, restarts, and the stop of the process.

A part that raises in its thread is restarted, with growing pauses. If that does not help, or a part reports that it
has failed, the process stops with the reason, so that systemd can start it again.
Invariant: no part stops unnoticed: it is restarted, or `failure` is set and `on_end` is called.
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

MAX_FAULTS, FAULTS_S = 5, 60.0  # a part that raises this often within this time is not restarted
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
LOW_DISK_BYTES = 64 << 20
LOCK_PATIENCE_S = 2.0
FRESH_S = 1.0  # results of the checks are cached this long, because anybody may request them
MAX_REASON_CHARS = 300

_log = logging.getLogger(__name__)

Check = Callable[[], str]  # why a part is unhealthy; empty = it is healthy


class Supervisor:
    """Health checks, restarts and failures of a cloud's parts. Methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checks: dict[str, Check] = {}
        self._ended: dict[str, str] = {}
        self._lock = threading.Lock()
        self._seen: tuple[float, Mapping[str, str]] | None = None
        self._closing = threading.Event()
        self.failure: PartFailed | None = None
        self.on_end: Callable[[], object] = lambda: None

    def add_check(self, name: str, check: Check) -> None:
        """Register the health check of a part."""
        self._checks[name] = check

    def reasons(self) -> Mapping[str, str]:
        """Return why each part is unhealthy; empty for a healthy one."""
        with self._lock:
            if self._seen is None or self._clock() - self._seen[0] >= FRESH_S:
                self._seen = self._clock(), {name: self._look(name) for name in {**self._checks, **self._ended}}
            return self._seen[1]

    def report_failure(self, name: str, error: BaseException) -> None:
        """Report that a part has stopped for good: the process stops, too."""
        _log.critical("part.ended part=%s", name, exc_info=error)
        self._ended[name] = f"it has ended: {error!r}"
        why = one_line(repr(error), MAX_REASON_CHARS)
        self.failure = self.failure or PartFailed(
            f"the cloud stopped because a part failed: {name}, {why}. See its log; jobs continue at the next start"
        )
        self.on_end()

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Run a part in this thread until it returns; restart it after an error, unless errors are too frequent."""
        faults_s: deque[float] = deque(maxlen=MAX_FAULTS)
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            try:
                return work()
            except Exception as error:  # noqa: BLE001 - the outermost line of a thread
                faults_s.append(self._clock())
                if len(faults_s) == MAX_FAULTS and faults_s[-1] - faults_s[0] < FAULTS_S:
                    return self.report_failure(name, error)
                _log.exception("part.fault part=%s: it starts again", name)
            if self._closing.wait(pauses.next_s()):
                return None

    def close(self) -> None:
        """Restart nothing from now on: the process is stopping."""
        self._closing.set()

    def _look(self, name: str) -> str:
        if name in self._ended:
            return one_line(self._ended[name], MAX_REASON_CHARS)
        try:
            return one_line(self._checks[name](), MAX_REASON_CHARS)
        except OSError as error:
            return one_line(f"its health cannot be checked: {error}", MAX_REASON_CHARS)


def database_fault(path: Path) -> str:
    """Return why the database cannot be written now (empty if it can), without writing to it."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", LOCK_PATIENCE_S, uri=True)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            db.execute("ROLLBACK")
    except sqlite3.Error as error:
        return f"{path.name}: {error}"
    return ""


def disk_fault(folder: Path) -> str:
    """Return an error text if there is too little disk space, else an empty one."""
    free = shutil.disk_usage(folder).free
    if free >= LOW_DISK_BYTES:
        return ""
    return (
        f"the disk of {folder} has {free >> 20} MB free, expected at least {LOW_DISK_BYTES >> 20} MB. Free some space"
    )
