"""One worker process, from the pool's side: started, spoken to, replaced.

It is started as a command, not forked: torch's threads and locks do not survive a fork, and nothing of
the caller's main module is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
from multiprocessing import Pipe
from typing import Any

import numpy as np

from edgefl.errors import ConfigError
from edgefl.measure import how_ended
from edgefl.process.guardian import guardian
from edgefl.simulation.engines.fleets import SimulationSetup, TrainingMethod
from edgefl.simulation.engines.pool.messages import (
    Begin,
    Chunk,
    Done,
    Flush,
    Gone,
    Ready,
    Start,
    Summed,
    Tried,
    Try,
    import_path,
    pickled_task,
)
from edgefl.simulation.engines.pool.round import START_S
from edgefl.simulation.engines.shared import SharedTree
from edgefl.trees import TensorSpec, spec_of

END_S = 5.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_GONE = (EOFError, OSError)  # OSError: also of one that ended in the middle of a message


class WorkerProcess:
    """A worker and the pipe to it. Raises ConfigError where it cannot be started."""

    def __init__(self, setup: SimulationSetup, parameters: SharedTree, frozen: SharedTree | None = None) -> None:
        spec = spec_of(parameters.tree)
        self.sums = SharedTree({name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in spec.items()})
        frozen_at = parameters.descriptor if frozen is None else frozen.descriptor  # of nothing, any file will do
        self._descriptors = (*{parameters.descriptor, frozen_at}, self.sums.descriptor)
        start = Start(
            reference=setup.reference,
            task=pickled_task(setup),
            make_population=setup.make_population,
            config=setup.config,
            spec=spec,
            frozen_spec={} if frozen is None else spec_of(frozen.tree),
            parameters=parameters.descriptor,
            frozen=frozen_at,
            sums=self.sums.descriptor,
            import_path=import_path(),
        )
        try:
            self._start = pickle.dumps(start)
        except (pickle.PicklingError, AttributeError, TypeError) as cause:
            raise ConfigError(f"the population cannot be sent to worker processes: {cause}") from cause
        self.peak_rss_mb, self.fault = 0.0, ""
        self._run()

    def wait_until_ready(self) -> None:
        """Wait until it has loaded its task; raises ConfigError where it cannot."""
        if not self.pipe.poll(START_S):
            raise ConfigError(f"a worker process was not ready within {START_S:g} s")
        if isinstance(gone := self.hear(), Gone):
            raise ConfigError(f"a worker process {gone.how} before it was ready")

    def why_not_stacked(self, method: TrainingMethod) -> str | None:
        """Have it try whether clients can be trained in stacks; return why not, or None."""
        if not self.ready:  # it was started anew; its first word is that it is there
            self.wait_until_ready()
        self._send(Try(method))
        how = f"did not answer within {START_S:g} s"
        if self.pipe.poll(START_S):
            try:
                tried: Tried = self.pipe.recv()
            except _GONE:
                how = self.ended()
            else:
                return tried.why_not
        self.restart()
        return f"the worker that tried it {how}"

    def begin(self, begin: Begin) -> None:
        """Tell it of a round, once it has done what it owes of one that was ended early."""
        while self._owes and self.ready:
            if not self.pipe.poll(begin.plan.deadline_s) or isinstance(self.hear(), Gone):
                self.restart()
        if self.ready:
            self._send(begin)

    def ask(self, message: Chunk | Flush) -> None:
        """Send what will be answered."""
        self._owes = True
        self._send(message)

    def hear(self) -> Ready | Done | Summed | Gone:
        """Return its answer; raises ConfigError where it cannot load its task."""
        try:
            answer: Ready | Done | Summed = self.pipe.recv()
        except _GONE:
            return Gone(self.ended())
        self._owes = False
        if isinstance(answer, Ready):
            if answer.fault:
                raise ConfigError(f"a worker process cannot start: {answer.fault}")
            self.ready = True
        if isinstance(answer, Summed):
            self.peak_rss_mb = max(self.peak_rss_mb, answer.peak_rss_mb)
            self.fault = self.fault or answer.fault
            if answer.partial is not None:  # a copy: the worker may sum again, if another dies
                total = {name: array.copy() for name, array in self.sums.tree.items()}
                answer = dataclasses.replace(answer, partial=dataclasses.replace(answer.partial, total=total))
        return answer

    def restart(self) -> None:
        """End it, and start another in its place."""
        self._end()
        self._run()

    def ended(self) -> str:
        """Say how it ended."""
        return how_ended(self._process.wait(END_S))

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
                [sys.executable, "-P", "-m", f"{__package__}.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *self._descriptors),
                env=os.environ | ONE_THREAD,
            )
        guardian.watch(self._process.pid)  # before it knows its task: until then, it ends with its pipe
        self.ready = self._owes = False
        with contextlib.suppress(*_GONE):
            self.pipe.send_bytes(self._start)  # what `recv` unpickles

    def _send(self, message: Any) -> None:
        with contextlib.suppress(*_GONE):  # that it is gone is seen where an answer is awaited
            self.pipe.send(message)

    def _end(self) -> None:
        self.pipe.close()
        if self._owes:
            self._process.kill()  # it is at work on what nobody wants
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        guardian.release(self._process.pid)
