"""The disks of a simulation: real files and real SQLite, each node in a folder of its own, and what can happen to them.

A kill leaves the folder as it is at that moment: the next process gets a copy, so nothing that the dead one's cleanup
does can reach it. A commit is a point at which a node can be killed, right before it or right after it. A power cut
also loses the ends of files that are not complete, and may damage them: only what was flushed is sure. A full disk
refuses what is written, until it has space again.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from edgefl.faults.machine.kernel import Killed
from edgefl.faults.machine.threads import kernel

_NOT_KEPT = shutil.ignore_patterns("*-shm", "lock")  # memory of SQLite's processes, and locks: neither survives


class SimConnection(sqlite3.Connection):
    """A connection whose commits the simulation sees."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._hooks = None
        named["timeout"] = 0.0  # nobody else uses the file; to wait in C would stop the simulation
        super().__init__(*arguments, **named)
        node = kernel().node
        self._hooks = node
        if node is not None:
            node.connections.append(self)

    def commit(self) -> None:
        self._guarded(super().commit)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if kind is not None:
            self.rollback()
            return False
        try:
            self.commit()
        except sqlite3.Error:
            self.rollback()
            raise
        return False

    def close(self) -> None:
        node = self._hooks
        if node is not None and self in node.connections:
            node.connections.remove(self)
        super().close()

    def shut(self) -> None:
        """Close it after its node is dead."""
        super().close()

    def _guarded(self, commit: Callable[[], None]) -> None:
        node = self._hooks
        if node is None or not self.in_transaction:
            commit()
            return
        if not node.is_alive:
            raise Killed
        if node.is_disk_full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
            raise error
        commits = getattr(node, "commits", None)
        if commits is not None:
            commits.before()
        commit()
        if commits is not None:
            commits.after()


class SimSqlite:
    """The module `sqlite3` with connections of the simulation."""

    Connection = SimConnection

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)

    @staticmethod
    def connect(database: Any, *arguments: Any, **named: Any) -> sqlite3.Connection:
        """Open a database."""
        opened: sqlite3.Connection = sqlite3.connect(database, *arguments, **{"factory": SimConnection, **named})
        return opened


class SimOs:
    """The module `os` on a node's disk, for what writes and flushes there."""

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        refuse_full()
        return os.pwrite(descriptor, data, offset)

    def fsync(self, descriptor: int) -> None:
        refuse_full()
        os.fsync(descriptor)

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        refuse_full()
        os.ftruncate(descriptor, offset + length)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def refuse_full() -> None:
    """Raise OSError if the disk of the running node is full."""
    node = kernel().node
    if node is not None and node.is_disk_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def damage_parts(home: Path, chance: random.Random) -> None:
    """Let a power cut shorten the files that were not complete, or damage a byte of them."""
    for path in sorted(one for one in home.rglob("*") if one.name.endswith((".part", "~part", ".draft"))):
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        if data:
            data = data[: chance.randint(0, len(data))]
            if data and chance.random() < 0.5:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)


def copy_home(home: Path, to: Path) -> None:
    """Copy a home as a kill leaves it."""
    shutil.copytree(home, to, symlinks=True, ignore=_NOT_KEPT)
