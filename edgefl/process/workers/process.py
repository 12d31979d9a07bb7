"""One worker process and the pipe to it, on the pool's side.

It is started as a command, not forked: torch's threads and locks do not survive a fork, and the caller's
main module must not run again. It ends when its pipe is closed, and always with this process.
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
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read by torch and numpy's BLAS at their import
SOCKET_BYTES = 1 << 20  # buffer for answers that are not read yet; the system may grant less

P = TypeVar("P", bound="WorkerProcess")

_GONE = (EOFError, OSError)  # OSError: also if it ended in the middle of a message
_MAIN = "import sys; sys.path[:] = {path!r}; from edgefl.process.workers.serve import main; main({descriptor})"


class WorkerProcess:
    """A started process, which loads its `WorkerStart` (pickled)."""

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
        guardian.watch(self._process.pid)  # before its first message: until then, it ends with its pipe
        self.send_bytes(start)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: Any) -> None:
        """Send a message. If the process is gone, `receive` notices it."""
        with contextlib.suppress(*_GONE):
            self.pipe.send(message)

    def send_bytes(self, pickled: bytes) -> None:
        """Send a pickled message."""
        with contextlib.suppress(*_GONE):
            self.pipe.send_bytes(pickled)

    def receive(self) -> Ready | Reply:
        """Wait for its next message and return it; raises WorkerLost, and ConfigError if it cannot start."""
        try:
            said: Ready | Reply = self.pipe.recv()
        except _GONE as cause:
            raise WorkerLost(self.how_ended()) from cause
        if isinstance(said, Ready) and said.fault:
            raise ConfigError(f"a worker process cannot start: {said.fault}")
        return said

    def how_ended(self) -> str:
        """Return how it ended, after its end of the pipe is closed."""
        try:
            return how_ended(self._process.wait(END_S))
        except subprocess.TimeoutExpired:
            return "closed its pipe"

    def end(self, *, kindly: bool = False) -> None:
        """End it at once; `kindly`: close the pipe, so that an idle process ends by itself.

        Otherwise the pipe stays open, so that a thread waiting on it notices the end.
        """
        if kindly:
            self.pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        self._process.kill()
        self._process.wait(END_S)
        guardian.release(self._process.pid)


def wait_for_processes(workers: Sequence[P], within_s: float) -> Sequence[P]:
    """Return the workers with a message, or that are gone; none after `within_s` seconds."""
    pipes: list[Connection] = [worker.pipe for worker in workers]
    answered = wait_for(pipes, within_s)
    return [worker for worker in workers if worker.pipe in answered]


def _widen(end: Connection) -> None:
    """Enlarge the socket buffer of a pipe to hold a small model, so that the sender need not wait for the reader."""
    with socket.socket(fileno=os.dup(end.fileno())) as under:
        under.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
