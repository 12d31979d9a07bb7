"""Whether the home's disk and database can be written. A full disk pauses the work until there is space.

Code whose write fails reports it (`refused`), or retries (`insist`). This starts a pause: `waiting` returns its reason,
and the deadlines of rounds stand still, until a write or a trial succeeds.
A file system does not notify us when it has space again, so it is tried at most every LOOK_S seconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from edgefl.logs import event
from edgefl.protocols.backoff import Backoff

FIRST_PAUSE_S, LOOK_S = 0.1, 1.0
LEAST_BYTES = 1 << 20  # a disk with less free space counts as full
DISK_SPACE = "disk space"

_ERRNOS = {
    errno.ENOSPC: DISK_SPACE,
    errno.EDQUOT: f"{DISK_SPACE} (of its quota)",
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOMEM: "memory",
    errno.EAGAIN: "the system",
}
_SQLITE = {
    sqlite3.SQLITE_FULL: DISK_SPACE,
    sqlite3.SQLITE_IOERR: DISK_SPACE,
    sqlite3.SQLITE_CANTOPEN: "the database's files",
    sqlite3.SQLITE_BUSY: "the database",
    sqlite3.SQLITE_LOCKED: "the database",
    sqlite3.SQLITE_PROTOCOL: "the database",
    sqlite3.SQLITE_NOMEM: "memory",
}
_DAMAGED = frozenset({sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS})

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def waits_for(error: BaseException) -> str:
    """Return what must become available after a temporary error of disk or database; empty if it is permanent."""
    if isinstance(error, DBAPIError):
        code = getattr(error.orig, "sqlite_errorcode", None)
        return "" if code is None or code in _DAMAGED else _SQLITE.get(code & 0xFF, "")
    if isinstance(error, OSError):
        return _ERRNOS.get(error.errno or 0, "")
    return ""


class Storage:
    """Pauses of one home's disk and database. Methods may be called from any thread."""

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._changed = threading.Condition()
        self._waits_for = ""
        self._why = ""
        self._needed_bytes = 0
        self._since_s = self._looked_s = 0.0
        self._paused_s = 0.0  # total duration of finished pauses
        self.changed: Callable[[], None] = lambda: None  # called when a pause begins or ends

    def waiting(self) -> str:
        """Return the reason of the pause as a text; empty if there is none."""
        self.look()
        with self._changed:
            where = f" in {self._folder.absolute()}" if self._folder and self._waits_for.startswith(DISK_SPACE) else ""
            return f"waiting for {self._waits_for}{where}: {self._why}" if self._waits_for else ""

    def paused_s(self) -> float:
        """Return the total duration of pauses (s), including the current one."""
        with self._changed:
            return self._paused_s + (self._clock() - self._since_s if self._waits_for else 0.0)

    def pauses(self, before_s: float) -> dict[str, Any]:
        """Return the reason of the pause, and the duration of pauses in excess of `before_s`, as JSON."""
        return {"waiting": self.waiting() or None, "paused_s": self.paused_s() - before_s}

    def pause_times(self) -> tuple[float, float | None]:
        """Return the total duration of finished pauses (s), and the start of the current one, if any."""
        with self._changed:
            return self._paused_s, self._since_s if self._waits_for else None

    def refused(self, error: BaseException, num_bytes: int = 0) -> bool:
        """Start or extend a pause after an error; False if the error is permanent."""
        awaited = waits_for(error)
        if not awaited:
            return False
        with self._changed:
            begins = not self._waits_for
            now_s = self._clock()
            self._since_s = now_s if begins else self._since_s
            self._looked_s = now_s
            self._needed_bytes = max(num_bytes, 0 if begins else self._needed_bytes)
            self._waits_for, self._why = awaited, str(getattr(error, "orig", None) or error)
            self._changed.notify_all()
        if begins:
            event(_log, logging.WARNING, "storage.refused", waiting_for=awaited, error=self._why)
            self.changed()
        return True

    def worked(self, num_bytes: int = LEAST_BYTES) -> None:
        """Report a successful write: it ends the pause, unless more bytes are needed."""
        with self._changed:
            if not self._waits_for or self._needed_bytes > max(num_bytes, LEAST_BYTES):
                return
            seconds, awaited = self._clock() - self._since_s, self._waits_for
            self._paused_s += seconds
            self._waits_for = self._why = ""
            self._changed.notify_all()
        event(_log, logging.INFO, "storage.back", waited_for=awaited, seconds=seconds)
        self.changed()

    def look(self) -> bool:
        """Whether there is no pause; ends it if a trial succeeds, at most one per LOOK_S."""
        with self._changed:
            if not self._waits_for:
                return True
            if self._clock() < self._looked_s + LOOK_S:
                return False
            self._looked_s = self._clock()
            needed_bytes = max(self._needed_bytes, LEAST_BYTES)
        if not self._has_room(needed_bytes):
            return False
        self.worked(needed_bytes)
        return True

    def insist(self, call: Callable[[], _T], refuse_stopped: Callable[[], None], num_bytes: int = 0) -> _T:
        """Call, and retry after temporary errors; raises permanent ones, and those of `refuse_stopped`."""
        pauses = Backoff(FIRST_PAUSE_S, LOOK_S)
        while True:
            try:
                done = call()
            except (OSError, DBAPIError) as error:
                if not self.refused(error, num_bytes):
                    raise
            else:
                self.worked(num_bytes)
                return done
            refuse_stopped()
            with self._changed:
                self._changed.wait(pauses.next_s())  # or until `wake`
            refuse_stopped()

    def wake(self) -> None:
        """Wake all waiting threads, so that they check whether to stop."""
        with self._changed:
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes can be written now; tried, because free-space figures ignore quotas and reserves."""
        if self._folder is None:
            return True
        trial = self._folder / ".trial"
        try:
            with trial.open("wb") as file:
                _reserve(file.fileno(), num_bytes)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                trial.unlink(missing_ok=True)
        return True


def _reserve(descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    elif shutil.disk_usage(descriptor).free < num_bytes:  # macOS
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
