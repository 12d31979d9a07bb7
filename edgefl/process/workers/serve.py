"""The main loop of a worker process: load the start data, report ready, answer messages until the pipe is closed.

It ignores Ctrl-C: the process that started it handles Ctrl-C and ends it.
"""

from __future__ import annotations

import contextlib
import signal
from multiprocessing.connection import Connection

from edgefl.errors import EdgeflError
from edgefl.measure import own_peak_mb, seldom_collected
from edgefl.process.workers.messages import Ready, Reply, WorkerStart


def main(descriptor: int) -> None:
    """Serve the pool at the other end of the pipe until the pipe is closed."""
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
