"""The agent's side of training: a child process that is started, fed, cancelled, killed and started again.

The child lives from plan to plan, so that torch is loaded once; it ends when the job does, or after an
idle minute, so that an idle agent is small. It is a process of ours on a socket pair, or a service that
systemd starts when we connect to its socket, in a slice of its own.
Invariant: a fit ends in a `Done`, a TaskError or a cancellation, and after each the next one can begin.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from edge_agent.training import trainer_wire as wire
from edgefl.errors import ProtocolError, TaskError, TrainerLost
from edgefl.logs import event

HELLO_S = 60.0  # for a child to start; a slow device takes seconds for the imports
CANCEL_GRACE_S = 1.0  # for a task to let go, before its process is killed
DEATH_S = 5.0  # for a killed process to be gone
IDLE_S = 60.0
_STDERR = 2
_BY_OTHERS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP})  # the system short of memory, or a person

_log = logging.getLogger(__name__)


class Trainer:
    """Runs one fit at a time in the child. Used from the agent's event loop."""

    def __init__(self, socket_path: Path | None = None, idle_s: float = IDLE_S) -> None:
        self._socket_path = socket_path  # systemd's; None = a process of our own
        self._idle_s = idle_s
        self._child: _Child | None = None
        self._abandoning: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._used = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.pid if self._child else None

    async def run(self) -> None:
        """End a child that has been idle; runs until cancelled, and then ends the child."""
        try:
            while True:
                await self._used.wait()
                self._used.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._idle_s):
                        await self._used.wait()
                        continue
                await self.end()
        finally:
            await self._drop()

    async def prepare(self) -> None:
        """Start the child, if there is none: while the model is on its way, its imports can run."""
        self._used.set()
        async with self._starting:
            if self._abandoning is not None:  # whoever began it may have been cancelled once more, and went
                await asyncio.wait([self._abandoning])
            if self._child is not None and not self._child.gone:
                return
            await self._drop()
            self._child = await _start(self._socket_path)
            event(_log, logging.INFO, "trainer.started", pid=self._child.pid)

    async def fit(self, fit: wire.Fit | wire.Errand) -> wire.Done:
        """Train; raises TaskError, and TrainerLost where it is not the task's fault.

        Where this is cancelled, so is the child's work.
        """
        await self.prepare()
        child = self._child
        if child is None:
            raise TrainerLost("the trainer was ended before it could begin")
        child.busy = True
        try:
            answer = await child.ask(fit)
        except asyncio.CancelledError:
            # In a task of its own: up to Python 3.11.2, time limits do not hold in one that is being cancelled.
            self._abandoning = asyncio.create_task(self._abandon(child))
            await asyncio.shield(self._abandoning)
            raise
        except (EOFError, OSError, ProtocolError) as cause:
            error = await child.obituary("while it trained")
            await self._drop()
            raise error from cause
        finally:
            child.busy = False
            self._used.set()
        if isinstance(answer, wire.Failed):
            if answer.spent:
                await self._drop()
            raise TaskError(answer.reason)
        return answer

    async def _abandon(self, child: _Child) -> None:
        if not await child.let_go():
            await self._drop()

    async def end(self) -> None:
        """End an idle child; one at work is left to its fit."""
        if self._child is not None and not self._child.busy:
            event(_log, logging.INFO, "trainer.ended", pid=self._child.pid)
            await self._drop()

    async def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.kill()


class _Child:
    """One child process and the socket to it."""

    def __init__(
        self, process: subprocess.Popen[bytes] | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid if process else 0
        self.busy = False
        self._process = process
        self._reader, self._writer = reader, writer
        self._pidfd = -1
        self._dead = asyncio.Event()

    async def greet(self) -> None:
        """Wait for the child's hello; from then on its death is noticed."""
        if self._process is not None:
            self._watch(self.pid)
        async with asyncio.timeout(HELLO_S):
            hello = await self._receive()
        if not isinstance(hello, wire.Hello):
            raise ProtocolError(f"the trainer began with {type(hello).__name__}")
        if self._process is None:
            self.pid = hello.pid
            self._watch(self.pid)

    @property
    def gone(self) -> bool:
        return self._dead.is_set() or self._reader.at_eof()

    async def ask(self, fit: wire.Fit | wire.Errand) -> wire.Done | wire.Failed:
        """Have it train; raises EOFError where it died."""
        self._writer.write(wire.frame(fit))
        await self._writer.drain()
        answer = await self._receive()
        if not isinstance(answer, wire.Done | wire.Failed):
            raise ProtocolError(f"the trainer answered with {type(answer).__name__}")
        return answer

    async def let_go(self) -> bool:
        """Ask it to give up its fit; returns whether it did, and is ready for the next."""
        with suppress(OSError, EOFError, ProtocolError, TimeoutError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGINT)
            async with asyncio.timeout(CANCEL_GRACE_S):
                answer = await self._receive()
            return not (isinstance(answer, wire.Failed) and answer.spent)
        return False

    async def kill(self) -> None:
        """End the process and all that it started; returns when it is gone."""
        self._writer.close()
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        elif self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        else:
            return  # gone already, or a service that never said who it is
        with suppress(TimeoutError):
            async with asyncio.timeout(DEATH_S):
                await self._dead.wait()
        self._unwatch()

    async def obituary(self, when: str) -> TaskError | TrainerLost:
        """Say how it died, once it has: TrainerLost where something else than its task ended it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_GRACE_S):
                await self._dead.wait()
        code = self._process.returncode if self._process else None
        of_the_machine = code is None or -code in _BY_OTHERS  # of a service, nobody tells us
        dead = self._dead.is_set()
        return (TrainerLost if dead and of_the_machine else TaskError)(f"{self.epitaph()} {when}")

    def epitaph(self) -> str:
        """Say how it died."""
        code = self._process.returncode if self._process else None
        if code is None:
            return "the trainer died"
        if code >= 0:
            return f"the trainer ended with exit status {code}"
        hint = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
        return f"the trainer was killed by {signal.Signals(-code).name}{hint}"

    async def _receive(self) -> wire.Message:
        head = await self._reader.readexactly(wire.HEAD_BYTES)
        return wire.parse(await self._reader.readexactly(wire.body_bytes(head)))

    def _watch(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._dead.set()
            return
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_death)

    def _on_death(self) -> None:
        # The socket alone would not tell: a process that the task forked may hold its other end.
        self._unwatch()
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(DEATH_S)
        self._dead.set()
        asyncio.get_running_loop().call_later(0.1, self._reader.feed_eof)  # after what it said last was read

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


async def _start(socket_path: Path | None) -> _Child:
    try:
        child = await (_spawn() if socket_path is None else _connect(socket_path))
    except OSError as cause:
        raise TrainerLost(f"the trainer could not be started: {cause}") from cause
    try:
        await child.greet()
    except (EOFError, OSError, ProtocolError) as cause:  # TimeoutError is an OSError
        error = await child.obituary(f"before it could begin ({cause or 'it did not say hello in time'})")
        await child.kill()
        raise error from cause
    except asyncio.CancelledError:
        await child.kill()
        raise
    return child


async def _spawn() -> _Child:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = _popen(theirs.fileno())
        except OSError:  # no memory, or too many processes
            ours.close()
            raise
    return _Child(process, *await asyncio.open_connection(sock=ours))


def _popen(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "edge_agent.training.trainer_main", "--fd", str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=_STDERR,  # what the user prints
        pass_fds=(descriptor,),
        start_new_session=True,  # Ctrl-C is for the agent; and all that the task starts can be killed
    )


async def _connect(path: Path) -> _Child:
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError as cause:
        raise TrainerLost(
            f"the trainer's socket {path} does not answer ({cause}); is edgefl-trainer.socket on?"
        ) from cause
    return _Child(None, reader, writer)
