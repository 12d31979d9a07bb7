"""A job's training process as the server sees it: started when a device needs it, and again after it has ended.

All sessions of a job share one process, which handles their frames in the order in which they come; each session has
a few frames there at a time. If the process ends, its sessions end with UNAVAILABLE, and devices begin again. A device
whose frame was being handled when it ended, twice within a minute, is refused for a minute.
Invariant: a session gets one END, whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import signal
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloud.beside.suspects import Suspects
from cloud.split.records import END, FORGET, FRAME, GONE, HEAD, OPEN, READY, TAKEN, SessionSpec, record
from edgefl.logs import event
from edgefl.process.children import Child

STOP_S = 5.0
IN_PROCESS = 6  # frames of one session that are handled or wait in the process

_log = logging.getLogger(__name__)


class SessionEnded(Exception):
    """A session is over: the name of a gRPC status code, and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ServerSession:
    """One device's stream on its way to the training process and back."""

    def __init__(self, number: int, spec: SessionSpec, process: JobProcess) -> None:
        self.number, self.spec, self._process = number, spec, process
        self._answers: asyncio.Queue[bytes | SessionEnded] = asyncio.Queue()  # as many as frames are taken in
        self._places = asyncio.Semaphore(IN_PROCESS)
        self.in_process = 0
        self.is_over = False

    async def send(self, body: bytes) -> None:
        """Pass on a device's frame when there is a place for it."""
        await self._places.acquire()
        if not self.is_over:
            self.in_process += 1
            await self._process.send_frame(self, body)

    async def answer(self) -> bytes:
        """Return the next frame for the device; raises SessionEnded."""
        found = await self._answers.get()
        if isinstance(found, SessionEnded):
            raise found
        return found

    def taken(self) -> None:
        """Note that a frame is handled."""
        self.in_process -= 1
        self._places.release()

    def deliver(self, frame: bytes) -> None:
        self._answers.put_nowait(frame)

    def end(self, status: str, reason: str) -> None:
        """End the session, unless it is over."""
        if not self.is_over:
            self.is_over = True
            self._answers.put_nowait(SessionEnded(status, reason))
            self._places.release()


class JobProcess:
    """One job's process and its sessions. Used in the event loop only."""

    def __init__(self, job: str, settings: Mapping[str, Any], folder: Path, *, load_s: float, run_s: float) -> None:
        self.job, self._settings, self._folder = job, settings, folder
        self._load_s, self._run_s = load_s, run_s
        self._numbers = itertools.count(1)
        self._sessions: dict[int, ServerSession] = {}
        self._order: deque[int] = deque()  # sessions of the frames in the process, the oldest first
        self._starting: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._child: Child | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._loop = asyncio.get_running_loop()
        self._suspects = Suspects(self._loop.time)
        self._limit: asyncio.TimerHandle | None = None
        self._killed_for = ""
        self.idle_since_s = self._loop.time()

    @property
    def pid(self) -> int:
        return 0 if self._child is None else self._child.pid

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def open(self, spec: SessionSpec) -> ServerSession:
        """Begin a session, with a process if there is none; raises SessionEnded."""
        if reason := self._suspects.refusal(spec.device):
            raise SessionEnded("RESOURCE_EXHAUSTED", reason)
        for other in [one for one in self._sessions.values() if one.spec.device == spec.device]:
            other.end("CANCELLED", "the device has begun again on another connection")
            self.leave(other)
        if self._writer is None:
            if self._starting is None or self._starting.done():
                self._starting = asyncio.create_task(self._start(), name=f"split-{self.job}-start")
            await asyncio.shield(self._starting)
        session = ServerSession(next(self._numbers), spec, self)
        self._sessions[session.number] = session
        await self._send(session.number, OPEN, spec.encode())
        return session

    def leave(self, session: ServerSession) -> None:
        """Note that a device's stream is over."""
        if self._sessions.pop(session.number, None) is not None and self._writer is not None:
            self._writer.write(record(session.number, GONE))
        self.idle_since_s = self._loop.time()

    async def forget(self, before: int) -> None:
        """Let the process forget rounds before this one."""
        if self._writer is not None:
            await self._send(0, FORGET, str(before).encode())

    async def send_frame(self, session: ServerSession, body: bytes) -> None:
        self._order.append(session.number)
        self._limit_oldest()
        await self._send(session.number, FRAME, body)

    async def stop(self) -> None:
        """End the process and its sessions."""
        self._killed_for = "the server is stopping, or the job is over"
        if self._child is not None:
            await self._child.stop(STOP_S)
        for task in (self._starting, self._reading):
            if task is not None:
                await asyncio.gather(task, return_exceptions=True)

    async def _send(self, session: int, kind: int, content: bytes) -> None:
        if self._writer is None:
            return  # the process has ended, and so has the session
        self._writer.write(record(session, kind, content))
        with contextlib.suppress(ConnectionError):  # `_read` sees that it has ended
            await self._writer.drain()

    async def _start(self) -> None:
        """Start the process and wait until it is ready; raises SessionEnded."""
        settings = self._folder / "settings.json"
        await asyncio.to_thread(settings.write_text, json.dumps(dict(self._settings)))
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = Child("cloud.split.trainer_main", f"--control={theirs.fileno()}", f"--settings={settings}",
                              descriptors=(theirs.fileno(),))  # fmt: skip
            except OSError as cause:
                ours.close()
                raise SessionEnded("UNAVAILABLE", f"the training process cannot be started: {cause}") from cause
        self._child, self._killed_for = child, ""
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(self._load_s):
                kind, content = await self._first(reader)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as cause:
            writer.close()
            await child.kill()
            self._child = None
            late = f"it was not ready within {self._load_s:g} s" if isinstance(cause, TimeoutError) else child.end
            raise SessionEnded("UNAVAILABLE", f"the training process did not start: {late}") from cause
        if kind != READY:
            writer.close()
            await child.kill()
            self._child = None
            said = json.loads(content)
            raise SessionEnded(said["status"], said["reason"])
        self._writer = writer
        event(_log, logging.INFO, "split.up", job=self.job, pid=child.pid)
        self._reading = asyncio.create_task(self._read(reader, child), name=f"split-{self.job}")

    @staticmethod
    async def _first(reader: asyncio.StreamReader) -> tuple[int, bytes]:
        _, kind, length = HEAD.unpack(await reader.readexactly(HEAD.size))
        return kind, await reader.readexactly(length)

    async def _read(self, reader: asyncio.StreamReader, child: Child) -> None:
        """Deliver what the process says until it ends."""
        try:
            while True:
                number, kind, length = HEAD.unpack(await reader.readexactly(HEAD.size))
                content = await reader.readexactly(length)
                session = self._sessions.get(number)
                if kind in {TAKEN, END}:
                    with contextlib.suppress(ValueError):
                        self._order.remove(number)
                    self._limit_oldest()
                if session is None:
                    continue
                if kind == FRAME:
                    session.deliver(content)
                elif kind == TAKEN:
                    session.taken()
                elif kind == END:
                    said = json.loads(content)
                    session.end(said["status"], said["reason"])
        except (asyncio.IncompleteReadError, ConnectionError):
            await child.kill()
        finally:
            self._note_end(child)

    def _note_end(self, child: Child) -> None:
        reason = self._killed_for or f"the training process {child.end}"
        writer, self._writer, self._child = self._writer, None, None
        if writer is not None:
            writer.close()
        if self._limit is not None:
            self._limit.cancel()
        if self._order and (working := self._sessions.get(self._order[0])) is not None and not self._killed_for:
            self._suspects.note_death([working.spec.device])
        self._order.clear()
        event(_log, logging.WARNING, "split.ended", job=self.job, pid=child.pid, reason=reason,
              lost=len(self._sessions))  # fmt: skip
        for session in list(self._sessions.values()):
            session.end("UNAVAILABLE", f"{reason}; begin again")
        self._sessions.clear()
        self.idle_since_s = self._loop.time()

    def _limit_oldest(self) -> None:
        """Begin the time limit of the frame that is handled now."""
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        if self._order:
            self._limit = self._loop.call_later(
                self._run_s, self._kill, f"a message took longer than {self._run_s:g} s"
            )

    def _kill(self, reason: str) -> None:
        if self._child is not None:
            if self._order and (working := self._sessions.get(self._order[0])) is not None:
                self._suspects.note_death([working.spec.device])
            self._killed_for = reason
            self._child.signal(signal.SIGKILL)
