"""One worker process and the pipe to it, from the pool's side.

It is started as a command, not forked: torch's threads and locks do not survive a fork, and nothing of the
caller's main module is run again. It ends with its pipe, and with this process, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from edgefl.errors import ConfigError
from edgefl.measure import how_ended
from edgefl.process.guardian import guardian
from edgefl.process.workers.messages import Ready, Reply, WorkerLost

END_S = 5.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read when torch and numpy's BLAS are imported
SOCKET_BYTES = 1 << 20  # of answers, that a worker may be ahead of us; the system may grant less

P = TypeVar("P", bound="WorkerProcess")

_GONE = (EOFError, OSError)  # OSError: also of one that ended in the middle of a message
_MAIN = "import sys; sys.path[:] = {path!r}; from edgefl.process.workers.serve import main; main({descriptor})"


class WorkerProcess:
    """A process that was started, and loads what its start names (a pickled `WorkerStart`)."""

    def __init__(
        self, start: bytes, *, descriptors: Sequence[int] = (), environment: Mapping[str, str] = ONE_THREAD
    ) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            _widen(theirs)
            code = _MAIN.format(path=[str(one) for one in sys.path], descriptor=theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                pass_fds=(theirs.fileno(), *descriptors),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
            )
        guardian.watch(self._process.pid)  # before it is told anything: until then, it ends with its pipe
        self.send_bytes(start)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: Any) -> None:
        """Send a message. That the process is gone is seen where its answer is awaited."""
        with contextlib.suppress(*_GONE):
            self.pipe.send(message)

    def send_bytes(self, pickled: bytes) -> None:
        """Send a message that is pickled already."""
        with contextlib.suppress(*_GONE):
            self.pipe.send_bytes(pickled)

    def hear(self) -> Ready | Reply:
        """Return what it says next, waiting for it; raises WorkerLost, and ConfigError where it cannot start."""
        try:
            said: Ready | Reply = self.pipe.recv()
        except _GONE as cause:
            raise WorkerLost(self.how_ended()) from cause
        if isinstance(said, Ready) and said.fault:
            raise ConfigError(f"a worker process cannot start: {said.fault}")
        return said

    def how_ended(self) -> str:
        """Say how it ended, once its end of the pipe is closed."""
        try:
            return how_ended(self._process.wait(END_S))
        except subprocess.TimeoutExpired:
            return "closed its pipe"

    def end(self, *, kindly: bool = False) -> None:
        """End it at once; `kindly`: an idle one ends by itself when its pipe is closed.

        Otherwise the pipe stays open, so that a thread which waits at it is told.
        """
        if kindly:
            self.pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        self._process.kill()
        self._process.wait(END_S)
        guardian.release(self._process.pid)


def wait_for_processes(workers: Sequence[P], within_s: float) -> Sequence[P]:
    """Return the workers that have something to say, or are gone; none after so many seconds."""
    pipes: list[Connection] = [worker.pipe for worker in workers]
    answered = wait_for(pipes, within_s)
    return [worker for worker in workers if worker.pipe in answered]


def _widen(end: Connection) -> None:
    """Let the socket under a pipe hold a small model, so that its sender goes on without waiting for its reader."""
    with socket.socket(fileno=os.dup(end.fileno())) as under:
        under.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
