"""A child process that is started again whenever it ends, after longer and longer pauses."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from edgefl.process.children import Child
from edgefl.protocols.backoff import Backoff

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # before the process starts again
STEADY_S = 30.0  # a process that lived so long is started again without a longer pause
STOP_S = 2.0
STOPPED = "the stage server is stopping"

_Facts = TypeVar("_Facts")


class RestartedProcess(ABC, Generic[_Facts]):
    """Keeps a process running. Used in the event loop only.

    A class of it starts the process and talks to it in `_run_child`, and tells in `_note_down` what was lost with it.
    """

    def __init__(self) -> None:
        self.is_up = False
        self.reason = "it is starting"  # why it is not up
        self.pid = 0
        self.first_load: asyncio.Future[_Facts] = asyncio.get_running_loop().create_future()
        self._child: Child | None = None
        self._killed_for = ""  # why this process is ended; empty = it ends by itself

    async def run(self) -> None:
        """Keep the process running until cancelled."""
        loop, pauses = asyncio.get_running_loop(), Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            begun_s = loop.time()
            try:
                await self._run_child()
            except OSError as error:  # no process, no descriptor
                self._note_down(f"it cannot be started: {error}")
            if loop.time() - begun_s > STEADY_S:
                pauses.reset()
            await asyncio.sleep(pauses.next_s())

    @abstractmethod
    async def _run_child(self) -> None:
        """Run one process to its end; raises OSError if it cannot be started."""

    @abstractmethod
    def _note_down(self, reason: str) -> None:
        """The process is not up, for this reason: what it was given is lost."""

    def _begin(self, child: Child) -> None:
        """A process was started."""
        self._child, self.pid, self._killed_for = child, child.pid, ""

    async def _ended(self, child: Child) -> None:
        """Wait until a process has ended; end it when this is cancelled."""
        try:
            await child.ended.wait()
        except asyncio.CancelledError:
            self._killed_for = STOPPED
            with contextlib.suppress(TimeoutError):
                await asyncio.shield(asyncio.create_task(child.stop(STOP_S)))
            raise

    def _why_ended(self, child: Child) -> str:
        return self._killed_for or f"its process {child.end}"

    def _kill(self, reason: str) -> None:
        if self._child is not None:
            self._killed_for = reason
            self._child.signal(signal.SIGKILL)
