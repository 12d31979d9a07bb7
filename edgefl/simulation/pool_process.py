"""One worker process, from the pool's side: started, spoken to, replaced.

It is started as a command, not forked: torch's threads and locks do not survive a fork, and nothing of
the caller's main module is run again.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from edgefl.errors import ConfigError
from edgefl.simulation.fleets import Setup
from edgefl.simulation.pool_wire import Done, Ready, Start, Summed, import_path, pickled_task
from edgefl.simulation.shared import SharedTree
from edgefl.trees import TensorSpec, spec_of

START_S = 120.0
END_S = 5.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_GONE = (EOFError, ConnectionResetError, BrokenPipeError)


class WorkerProcess:
    """A worker and the pipe to it. Raises ConfigError where it cannot be started."""

    def __init__(self, setup: Setup, parameters: SharedTree) -> None:
        spec = spec_of(parameters.tree)
        self.sums = SharedTree({name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in spec.items()})
        self._descriptors = (parameters.descriptor, self.sums.descriptor)
        start = Start(
            reference=setup.reference,
            task=pickled_task(setup),
            make_population=setup.make_population,
            config=setup.config,
            spec=spec,
            parameters=parameters.descriptor,
            sums=self.sums.descriptor,
            import_path=import_path(),
        )
        try:
            self._start = pickle.dumps(start)
        except (pickle.PicklingError, AttributeError, TypeError) as cause:
            raise ConfigError(f"the population cannot be sent to worker processes: {cause}") from cause
        self.peak_rss_mb = 0.0
        self._run()

    def wait_until_ready(self) -> None:
        """Wait until it has loaded its task; raises ConfigError where it cannot."""
        if not self.pipe.poll(START_S):
            raise ConfigError(f"a worker process was not ready within {START_S:g} s")
        try:
            ready = self.pipe.recv()
        except _GONE as cause:
            raise ConfigError(f"a worker process {self.ended()} before it was ready") from cause
        if isinstance(ready, Ready) and ready.fault:
            raise ConfigError(f"a worker process cannot start: {ready.fault}")

    def send(self, message: Any) -> None:
        """Send what wants no answer. That it is gone is seen where an answer is awaited."""
        try:
            self.pipe.send(message)
        except _GONE:
            return

    def ask(self, message: Any) -> None:
        """Send what will be answered."""
        self._owes = True
        self.send(message)

    def hear(self) -> Done | Summed | None:
        """Return its answer; None where it is gone."""
        try:
            answer: Done | Summed = self.pipe.recv()
        except _GONE:
            return None
        self._owes = False
        if isinstance(answer, Summed):
            self.peak_rss_mb = max(self.peak_rss_mb, answer.peak_rss_mb)
        return answer

    def settle(self, within_s: float) -> None:
        """Wait for what it still owes of a round that was ended early, and drop it; replace it where it is gone."""
        while self._owes:
            if not self.pipe.poll(within_s) or self.hear() is None:
                self.restart()

    def restart(self) -> None:
        """End it, and start another in its place; raises ConfigError where that cannot be done."""
        self._end()
        self._run()
        self.wait_until_ready()

    def ended(self) -> str:
        """Say how it ended."""
        code = self._process.wait(END_S)
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End it, kindly at first."""
        self._end()
        self.sums.close()

    def _run(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.pool_worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *self._descriptors),
                env=os.environ | ONE_THREAD,
            )
        self._owes = False
        _send_bytes(self.pipe, self._start)

    def _end(self) -> None:
        self.pipe.close()
        if self._owes:
            self._process.kill()  # it is at work on what nobody wants
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)


def _send_bytes(pipe: Connection, data: bytes) -> None:
    try:
        pipe.send_bytes(data)  # what `recv` unpickles
    except _GONE:
        return
