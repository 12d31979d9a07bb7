"""Child processes that always end with their parent, even after kill -9.

This process tells a small second process, the guardian, which children it has. When this process is gone, the
guardian kills the remaining children and ends. It runs only while there are children to watch. The kernel's
PR_SET_PDEATHSIG does not fit: it follows the parent's thread, and the child itself must request it.

    guardian.watch(pid)                             a running child, which ends by itself until then
    Popen(gated(command), stdin=PIPE), open_gate    any program: it begins only after the guardian knows it

The guardian runs this file by its path, with the standard library only.
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
# Wait for a line, which a dead parent never sends; then become the program, with the same pid.
_GATE = 'read -r go && exec "$@" </dev/null'

_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # by a guardian, from its first instruction on


class Guardian:
    """The side of the process with the children. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, str] = {}  # pid -> whether it is killed alone or with its group
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def watch(self, pid: int, *, group: bool = False) -> None:
        """Have a child killed when this process is gone; with `group`, the whole process group that it leads."""
        with self._lock:
            if self._owner != os.getpid():  # after a fork: these children belong to our parent
                self._owner, self._watched, self._process = os.getpid(), {}, None
            self._watched[pid] = "group" if group else "alone"
            if self._process is not None and not self._tell(f"{self._watched[pid]} {pid}"):
                self._end()  # it was killed
            if self._process is None:
                self._begin()

    def release(self, pid: int) -> None:
        """Forget a child that has ended and was waited for."""
        with self._lock:
            if self._owner != os.getpid() or self._watched.pop(pid, None) is None:
                return
            if not self._watched or not self._tell(f"gone {pid}"):
                self._end()
                if self._watched:
                    self._begin()

    def _begin(self) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)  # a child inherits its parent thread's mask
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # survives a signal to our group
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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
    """Return a command that waits for `open_gate` and then runs this one. Its stdin must be a pipe."""
    return ["/bin/sh", "-c", _GATE, "sh", *(os.fspath(part) for part in command)]


def open_gate(process: subprocess.Popen[Any], *, group: bool = False) -> None:
    """Have the guardian watch a gated process, then let it begin."""
    guardian.watch(process.pid, group=group)
    stdin, process.stdin = process.stdin, None
    if stdin is None:
        raise ValueError("a gated process needs stdin=subprocess.PIPE")
    with contextlib.suppress(BrokenPipeError):  # it was already killed
        os.write(stdin.fileno(), b"go\n")
    stdin.close()


def main() -> None:
    """Read the children to watch until the parent is gone, then kill the remaining ones."""
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
    """Wait for the parent's next line; False if it is gone. A fork of it may keep the pipe open."""
    if not hasattr(os, "pidfd_open"):
        return True  # macOS: only the pipe shows it
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
