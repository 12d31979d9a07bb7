"""A worker of the pool: `python -m edgefl.simulation.pool_worker DESCRIPTOR`.

One process with one torch thread. It trains what it is handed and, where the rule merges, keeps a sum
instead of sending each update: admitted by the same guard, folded by the same rule as at the centre.
It ends when its pipe does. Ctrl-C is for its parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from edgefl.aggregation import Rule, make_rule
from edgefl.aggregation.rule import Merging
from edgefl.errors import EdgeflError, UpdateRejected
from edgefl.guards import RoundGuard
from edgefl.records import Failure, Plan, Update
from edgefl.rounds import MetricSums
from edgefl.simulation.machine import own_peak_mb
from edgefl.simulation.pool_wire import Begin, Chunk, Done, Flush, Ready, Start, Summed
from edgefl.simulation.shared import SharedTree
from edgefl.simulation.trainer import LocalTrainer
from edgefl.training import set_threads
from edgefl.trees import TensorSpec


class Worker:
    """Answers the pool's messages, one at a time."""

    def __init__(self, start: Start) -> None:
        self._config = start.config
        self._parameters = SharedTree(start.spec, start.parameters)
        float64 = {name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in start.spec.items()}
        self._sums = SharedTree(float64, start.sums)
        task = start.load_task()
        self._trainer = LocalTrainer(task, start.make_population(task))
        self._tally: _Tally | None = None

    def answer(self, message: Any) -> Done | Summed | None:
        if isinstance(message, Begin):
            plan = dataclasses.replace(message.plan, parameters=self._parameters.tree)
            self._trainer.begin(plan)
            self._tally = _Tally(plan, self._config.aggregation.rule) if message.sums else None
            return None
        if isinstance(message, Chunk):
            return self._chunk(message)
        if isinstance(message, Flush) and self._tally is not None:
            return self._tally.flush(self._sums)
        raise TypeError(f"a worker cannot answer a {type(message).__name__}")

    def _chunk(self, chunk: Chunk) -> Done:
        answers = (self._trainer.train(client) for client in chunk.clients)
        if self._tally is None:
            return Done(tuple(answers))
        for answer in answers:
            self._tally.take(answer)
        return Done()


class _Tally:
    """The sum of a round so far."""

    def __init__(self, plan: Plan, rule: str) -> None:
        self._plan, self._rule_name = plan, rule
        self._reset()

    def take(self, answer: Update | Failure) -> None:
        """Fold an update that the guard admits; put aside what the centre has to see singly."""
        if isinstance(answer, Failure):
            self._aside.append(answer)
            return
        try:
            self._guard.admit(answer)
        except UpdateRejected:
            self._aside.append(answer)
            return
        self._rule.add(answer)
        self._metrics.add(answer.weight, answer.metrics)
        self._any = True

    def flush(self, sums: SharedTree) -> Summed:
        partial = self._rule.partial() if self._any and isinstance(self._rule, Merging) else None
        if partial is not None:
            sums.write(partial.total)
            partial = dataclasses.replace(partial, total={}, metrics=self._metrics.sums)
        summed = Summed(partial, tuple(self._aside), own_peak_mb())
        self._reset()
        return summed

    def _reset(self) -> None:
        self._guard = RoundGuard(self._plan)
        self._rule: Rule = make_rule(self._rule_name, self._plan.parameters)
        self._metrics = MetricSums()
        self._aside: list[Update | Failure] = []
        self._any = False


def main() -> None:
    """Serve the pool at the other end of the pipe until it goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        start: Start = pipe.recv()
        sys.path[:] = start.import_path
        try:
            set_threads(1)
            worker = Worker(start)
        except EdgeflError as error:
            pipe.send(Ready(str(error)))
            return
        pipe.send(Ready())
        while True:
            if (answer := worker.answer(pipe.recv())) is not None:
                pipe.send(answer)


if __name__ == "__main__":
    main()
