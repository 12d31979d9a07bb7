"""A worker process's whole life: load what it was started with, say so, answer messages until its pipe ends.

Ctrl-C is for the process that started it, which ends it.
"""

from __future__ import annotations

import contextlib
import signal
from multiprocessing.connection import Connection

from edgefl.errors import EdgeflError
from edgefl.measure import own_peak_mb, seldom_collected
from edgefl.process.workers.messages import Ready, Reply, WorkerStart


def main(descriptor: int) -> None:
    """Serve the pool at the other end of the pipe until it goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(descriptor)
    with seldom_collected(), contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        start: WorkerStart = pipe.recv()
        try:
            answer = start.begin()
        except EdgeflError as error:
            pipe.send(Ready(str(error)))
            return
        pipe.send(Ready())
        while True:
            if (answered := answer(pipe.recv())) is not None:
                pipe.send(Reply(answered, own_peak_mb()))
