"""A worker of the pool: `python -m edgefl.simulation.engines.pool.worker DESCRIPTOR`.

One process with one torch thread, which trains what it is handed (see `chunks`).
It ends when its pipe does. Ctrl-C is for its parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from edgefl.errors import EdgeflError
from edgefl.measure import seldom_collected
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import Begin, Chunk, Done, Flush, Ready, Start, Summed, Tried, Try
from edgefl.simulation.engines.shared import SharedTree
from edgefl.training.local import set_threads
from edgefl.training.randomness import kept, seeded
from edgefl.trees import TensorSpec


class PoolWorker:
    """Answers the pool's messages: parameters come, and sums go, through shared memory."""

    def __init__(self, start: Start) -> None:
        self._parameters = SharedTree(start.spec, start.parameters)
        self._frozen = SharedTree(start.frozen_spec, start.frozen)
        float64 = {name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in start.spec.items()}
        self._sums = SharedTree(float64, start.sums)
        task = start.load_task()
        with seeded(start.config.train.seed):
            population = start.make_population(task)
        self._trainer = ChunkTrainer(task, population, start.config)

    def answer(self, message: Begin | Chunk | Flush | Try) -> Done | Summed | Tried | None:
        if isinstance(message, Begin):
            frozen = None if message.plan.frozen is None else self._frozen.tree
            plan = dataclasses.replace(message.plan, parameters=self._parameters.tree, frozen=frozen)
            self._trainer.begin(plan, sums=message.sums, method=message.method)
            return None
        if isinstance(message, Try):
            return self._trainer.try_stacks(message.method)
        answer = self._trainer.answer(message)
        if isinstance(answer, Summed) and answer.partial is not None:
            self._sums.write(answer.partial.total)
            answer = dataclasses.replace(answer, partial=dataclasses.replace(answer.partial, total={}))
        return answer


def main() -> None:
    """Serve the pool at the other end of the pipe until it goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    with kept(), seldom_collected(), contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        start: Start = pipe.recv()
        sys.path[:] = start.import_path
        try:
            set_threads(1)
            worker = PoolWorker(start)
        except EdgeflError as error:
            pipe.send(Ready(str(error)))
            return
        pipe.send(Ready())
        while True:
            if (answer := worker.answer(pipe.recv())) is not None:
                pipe.send(answer)


if __name__ == "__main__":
    main()
