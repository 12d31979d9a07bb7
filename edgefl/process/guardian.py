"""Children that end with their parent, whatever ends it: kill -9, too.

A small process beside this one, the guardian, is told which children there are. When this process is gone the
guardian kills what is left of them, and ends. It is there while there are children to be watched. The kernel's own
way (PR_SET_PDEATHSIG) is for children of a thread that lasts, and for programs that ask for it themselves.

    guardian.watch(pid)                             a child that is there, and would end by itself before it is told
    Popen(gated(command), stdin=PIPE), open_gate    any program: it begins only once the guardian knows of it

This file is run by path, with the standard library alone, as the guardian itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

END_S = 5.0
# Waits for a line, which never comes from a parent that is gone; then it becomes the program, with the same pid.
_GATE = 'read -r go && exec "$@" </dev/null'

_DEAF = 'trap "" INT TERM HUP && exec "$@"'  # from its first moment


class Guardian:
    """The guarded process's side. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, str] = {}  # pid -> how it is ended: alone, or with its group
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def watch(self, pid: int, *, group: bool = False) -> None:
        """Have a child killed when this process is gone; with `group`, all of the group that it leads."""
        with self._lock:
            if self._owner != os.getpid():  # we were forked: those are our parent's
                self._owner, self._watched, self._process = os.getpid(), {}, None
            self._watched[pid] = "group" if group else "alone"
            if self._process is not None and not self._tell(f"{self._watched[pid]} {pid}"):
                self._end()  # somebody killed it
            if self._process is None:
                self._begin()

    def release(self, pid: int) -> None:
        """A child has ended, and was waited for."""
        with self._lock:
            if self._owner != os.getpid() or self._watched.pop(pid, None) is None:
                return
            if not self._watched or not self._tell(f"gone {pid}"):
                self._end()
                if self._watched:
                    self._begin()

    def _begin(self) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _DEAF, "sh", sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # what ends our group leaves it to end the rest
        )
        for pid, how in self._watched.items():
            self._tell(f"{how} {pid}")

    def _tell(self, line: str) -> bool:
        if self._process is None or self._process.stdin is None:
            return False
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.communicate(b"none\n", timeout=END_S)
        process.kill()
        process.wait(END_S)


guardian = Guardian()


def gated(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a command that waits for `open_gate` and then becomes this one. Its stdin must be a pipe."""
    return ["/bin/sh", "-c", _GATE, "sh", *(os.fspath(part) for part in command)]


def open_gate(process: subprocess.Popen[Any], *, group: bool = False) -> None:
    """Have a gated process watched, and let it begin."""
    guardian.watch(process.pid, group=group)
    stdin, process.stdin = process.stdin, None
    if stdin is None:
        raise ValueError("a gated process needs stdin=subprocess.PIPE")
    with contextlib.suppress(BrokenPipeError):  # it was killed already
        os.write(stdin.fileno(), b"go\n")
    stdin.close()


def main() -> None:
    """Read who is watched until our parent is gone, then end those who are left."""
    parent = int(sys.argv[1])
    watched: dict[int, str] = {}
    lines = b""
    while True:
        if not _is_heard(parent):
            break
        data = os.read(0, 65536)
        if not data:
            break
        *whole, lines = (lines + data).split(b"\n")
        for line in whole:
            if line == b"none":
                return
            how, _, number = line.decode().partition(" ")
            if how == "gone":
                watched.pop(int(number), None)
            else:
                watched[int(number)] = how
    for pid, how in watched.items():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if how == "group" else os.kill)(pid, signal.SIGKILL)


def _is_heard(parent: int) -> bool:
    """Wait until the parent says something; False where it is gone. A fork of it may hold the pipe open."""
    if not hasattr(os, "pidfd_open"):
        return True  # macOS: the pipe alone tells
    try:
        descriptor = os.pidfd_open(parent)
    except OSError:
        return bool(select.select([0], [], [], 0)[0])
    try:
        ready, _, _ = select.select([0, descriptor], [], [])
    finally:
        os.close(descriptor)
    return 0 in ready


if __name__ == "__main__":
    main()
