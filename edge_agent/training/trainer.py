"""The agent's side of training: starts the trainer process, sends it requests, cancels them, and restarts it.

The process stays alive between plans, and between jobs of the same task, so that torch is loaded once. It is stopped
after it was idle for a time, so that an idle agent uses little memory, and before another task uses it. It is a child
process on a socket pair, or a systemd service that starts when the agent connects to its socket, in a slice of its own.
Invariant: a request ends with a `WorkDone`, a TaskError, a TrainerLost or a cancellation; then the next one can start.
An update that is complete is not lost with its evaluation, whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from edge_agent.training import trainer_wire as wire
from edge_agent.training.split.tunnel import SplitTunnel
from edgefl.errors import ProtocolError, TaskError, TrainerLost
from edgefl.logs import event
from edgefl.protocols.fields import MAX_PROSE_CHARS
from edgefl.records import DeviceEvaluation
from edgefl.settings.split import SPLIT
from edgefl.terminal.text import one_line

HELLO_S = 60.0  # time limit to start; on a slow device the imports take seconds
CANCEL_GRACE_S = 1.0  # time to react to a cancellation before the process is killed
DEATH_S = 5.0  # time limit for a killed process to end
IDLE_S = 60.0
_STDERR = 2
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP})  # from the OOM killer, or a person

_log = logging.getLogger(__name__)


class Trainer:
    """Runs one request at a time in the trainer process. Used from the agent's event loop."""

    def __init__(self, socket_path: Path | None = None, idle_s: float = IDLE_S) -> None:
        self._socket_path = socket_path  # of a systemd service; None = start a child process
        self._idle_s = idle_s
        self._child: _TrainerChild | None = None
        self._abandoning: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._used = asyncio.Event()
        self._task = ""  # the signed bundle of the running process's last request
        self._is_spare = False  # the job that used the process has ended
        self.tunnel: SplitTunnel | None = None  # to the cloud's part of a training in parts

    @property
    def pid(self) -> int | None:
        """The trainer's process id, None if none runs."""
        return self._child.pid if self._child else None

    async def run(self) -> None:
        """Stop the process whenever it has been idle for `idle_s`; runs until cancelled, then stops it too."""
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

    async def prepare(self, task: str = "") -> None:
        """Start the process, if none runs, so that it imports torch while the model is being downloaded.

        `task` identifies what will be run: a process that has run another one for a job that has ended is replaced.
        """
        self._used.set()
        async with self._starting:
            if self._abandoning is not None:  # its caller may have been cancelled a second time and not awaited it
                await asyncio.wait([self._abandoning])
            if task:
                if self._is_spare and task != self._task:
                    await self.end()
                self._task, self._is_spare = task, False
            if self._child is not None and not self._child.gone:
                return
            await self._drop()
            self._child = await _start(self._socket_path)
            event(_log, logging.INFO, "trainer.started", pid=self._child.pid)

    async def run_request(self, request: wire.Request, evaluate_until: float | None = None) -> wire.WorkDone:
        """Train or deliver a message; raises TaskError, or TrainerLost if the task did not cause the failure.

        Cancelling this cancels the work in the process too. After training, an evaluation that fails, that costs the
        process, or that is not over at `evaluate_until` (of the event loop's clock), is a fault in the result.
        """
        if self.tunnel is None or not (isinstance(request, wire.FitRequest) and request.train.mode == SPLIT):
            return await self._run(request, evaluate_until)
        async with self.tunnel.open(request) as complete:
            return await self._run(complete, evaluate_until)

    async def _run(self, request: wire.Request, evaluate_until: float | None) -> wire.WorkDone:
        packages = "" if isinstance(request, wire.DeliverRequest) else request.packages
        if self._child is not None and self._child.packages not in {None, packages}:
            await self._drop()  # a module that was imported cannot be replaced by another version
        await self.prepare()
        child = self._child
        if child is None:
            raise TrainerLost("the trainer was stopped before it could start to work")
        child.busy, child.packages = True, packages
        try:
            evaluates = isinstance(request, wire.EvaluateRequest)
            done = await self._done(
                child, child.send(request), "while it evaluated" if evaluates else "while it trained"
            )
            return await self._evaluated(child, done, evaluate_until) if done.evaluates else done
        except asyncio.CancelledError:
            # In a separate task: up to Python 3.11.2, asyncio.timeout does not work in a task that is being cancelled.
            self._abandoning = asyncio.create_task(self._abandon(child))
            await asyncio.shield(self._abandoning)
            raise
        finally:
            child.busy = False
            self._used.set()

    async def _evaluated(self, child: _TrainerChild, update: wire.WorkDone, until: float | None) -> wire.WorkDone:
        """Wait for the evaluation of an update that is complete; return the update with it, or with its fault."""
        try:
            async with asyncio.timeout_at(until):
                return await self._done(child, child.receive_answer(), "while it evaluated")
        except TimeoutError:
            self._abandoning = asyncio.create_task(self._abandon(child))  # the next request waits for it
            fault = "the evaluation was stopped shortly before the round's deadline"
        except (TaskError, TrainerLost) as error:
            fault = str(error)
        evaluation = DeviceEvaluation(fault=one_line(fault, MAX_PROSE_CHARS))
        return dataclasses.replace(update, evaluates=False, evaluation=evaluation)

    async def _done(self, child: _TrainerChild, answering: Awaitable[wire.Answer], when: str) -> wire.WorkDone:
        try:
            answer = await answering
        except (EOFError, OSError, ProtocolError) as cause:
            error = await child.death_error(when)
            await self._drop()
            raise error from cause
        if isinstance(answer, wire.WorkDone):
            return answer
        if answer.spent:  # the process is not usable any more
            await self._drop()
        raise TaskError(answer.reason)

    async def _abandon(self, child: _TrainerChild) -> None:
        if not await child.cancel_request():
            await self._drop()

    def keep_spare(self) -> None:
        """Note that the job has ended: the process waits for another job of its task until it has been idle."""
        self._is_spare = True

    async def end(self) -> None:
        """Stop the process if it is idle; while it works, nothing happens."""
        if self._child is not None and not self._child.busy:
            event(_log, logging.INFO, "trainer.ended", pid=self._child.pid)
            await self._drop()

    async def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.kill()


class _TrainerChild:
    """One trainer process and the socket to it."""

    def __init__(
        self, process: subprocess.Popen[bytes] | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid if process else 0
        self.busy = False
        self.packages: str | None = None  # the folder of packages that its tasks use; None = no task yet
        self._process = process
        self._reader, self._writer = reader, writer
        self._pidfd = -1
        self._dead = asyncio.Event()

    async def wait_for_hello(self) -> None:
        """Wait for the process's hello message; from then on its death is noticed."""
        if self._process is not None:
            self._watch(self.pid)
        async with asyncio.timeout(HELLO_S):
            hello = await self._receive()
        if not isinstance(hello, wire.Hello):
            raise ProtocolError(f"the trainer's first message is {type(hello).__name__}; expected Hello")
        if self._process is None:
            self.pid = hello.pid
            self._watch(self.pid)

    @property
    def gone(self) -> bool:
        return self._dead.is_set() or self._reader.at_eof()

    async def send(self, request: wire.Request) -> wire.Answer:
        """Send a request and return its first answer; raises EOFError if the process died."""
        self._writer.write(wire.frame(request))
        await self._writer.drain()
        return await self.receive_answer()

    async def receive_answer(self) -> wire.Answer:
        """Return the next answer; raises EOFError if the process died."""
        answer = await self._receive()
        if not isinstance(answer, wire.WorkDone | wire.WorkFailed):
            raise ProtocolError(f"the trainer answered with {type(answer).__name__}; expected WorkDone or WorkFailed")
        return answer

    async def cancel_request(self) -> bool:
        """Ask the process to cancel its request; return whether it did so in time and can take another one."""
        with suppress(OSError, EOFError, ProtocolError, TimeoutError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGINT)
            async with asyncio.timeout(CANCEL_GRACE_S):
                answer = await self.receive_answer()
                if isinstance(answer, wire.WorkDone) and answer.evaluates:
                    answer = await self.receive_answer()
            return not (isinstance(answer, wire.WorkFailed) and answer.spent)
        return False

    async def kill(self) -> None:
        """Kill the process and all that it started; return when it has ended."""
        self._writer.close()
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        elif self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        else:
            return  # ended already, or a service that never sent its process id
        with suppress(TimeoutError):
            async with asyncio.timeout(DEATH_S):
                await self._dead.wait()
        self._unwatch()

    async def death_error(self, when: str) -> TaskError | TrainerLost:
        """Return the error for a process that died: TrainerLost if the system or a person ended it, else TaskError."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_GRACE_S):
                await self._dead.wait()
        code = self._process.returncode if self._process else None
        from_outside = code is None or -code in _FROM_OUTSIDE  # a service's exit status is unknown here
        dead = self._dead.is_set()
        return (TrainerLost if dead and from_outside else TaskError)(f"{self.how_it_died()} {when}")

    def how_it_died(self) -> str:
        """Return how the process ended, for messages."""
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
        # The socket alone does not show it: a process that the task forked may keep the other end open.
        self._unwatch()
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(DEATH_S)
        self._dead.set()
        asyncio.get_running_loop().call_later(0.1, self._reader.feed_eof)  # after its last message was read

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


async def _start(socket_path: Path | None) -> _TrainerChild:
    try:
        child = await (_spawn() if socket_path is None else _connect(socket_path))
    except OSError as cause:
        raise TrainerLost(f"the trainer could not be started: {cause}") from cause
    try:
        await child.wait_for_hello()
    except (EOFError, OSError, ProtocolError) as cause:  # TimeoutError is an OSError
        error = await child.death_error(
            f"before it could start to work ({cause or f'no hello message within {HELLO_S:g} s'})"
        )
        await child.kill()
        raise error from cause
    except asyncio.CancelledError:
        await child.kill()
        raise
    return child


async def _spawn() -> _TrainerChild:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = _popen(theirs.fileno())
        except OSError:  # no memory, or too many processes
            ours.close()
            raise
    return _TrainerChild(process, *await asyncio.open_connection(sock=ours))


def _popen(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "edge_agent.training.trainer_main", "--fd", str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=_STDERR,  # what the task prints
        pass_fds=(descriptor,),
        start_new_session=True,  # Ctrl-C goes to the agent only; and all processes of the task can be killed
    )


async def _connect(path: Path) -> _TrainerChild:
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError as cause:
        raise TrainerLost(
            f"the trainer's socket {path} cannot be connected ({cause}). Check `systemctl status edgefl-trainer.socket`"
        ) from cause
    return _TrainerChild(None, reader, writer)
