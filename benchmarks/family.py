"""All processes of one run, including grandchildren.

Flower starts children in their own sessions, outside of any process group. So every process gets a
mark in its environment, which children inherit, and all processes with the mark are ended.
Invariant: after the context, by return, failure or Ctrl-C, none of its processes is alive.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from edgefl.local_fleet import LoggedProcess

ASK_S = 5.0  # time to end by themselves after SIGTERM
KILL_S = 10.0
_MARK = "EDGEFL_BENCHMARK_FAMILY"


class Family:
    """Starts processes with logs in a folder, and ends them all."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._mark = secrets.token_hex(16)
        self._env = {**(env or {}), _MARK: self._mark}
        self._started: list[LoggedProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self, name: str, command: Sequence[str | Path]) -> LoggedProcess:
        """Start a process whose output goes to NAME.log."""
        process = LoggedProcess(command, self.folder / f"{name}.log", self._env)
        self._started.append(process)
        return process

    def members(self) -> list[psutil.Process]:
        """Return all living processes with the family's mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    found.append(process)
        return found

    def end(self) -> None:
        """Send SIGTERM to all, wait, then kill the rest."""
        for process in self._started:
            if process.popen.poll() is None:
                process.popen.terminate()
        psutil.wait_procs(self.members(), ASK_S)
        deadline_s = time.monotonic() + KILL_S
        while (rest := self.members()) and time.monotonic() < deadline_s:  # one may have started another
            for member in rest:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(rest, KILL_S)
        for process in self._started:
            process.stop()
        self._started.clear()
