"""A worker of the pool: one process with one torch thread, which trains clients on request.

Parameters and sums are passed through memory that it shares with the pool.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from edgefl.config import JobConfig
from edgefl.errors import ConfigError
from edgefl.simulation.engines.client_states import ClientStates
from edgefl.simulation.engines.fleets import PopulationMaker
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Done, Flush, Summed, Tried, Try
from edgefl.simulation.engines.shared import SharedTree
from edgefl.task import Task, load_task
from edgefl.training.local import set_threads
from edgefl.training.randomness import kept, seeded
from edgefl.trees import TensorSpec

Asked = BeginRound | Chunk | Flush | Try


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStart:
    """What a worker needs at its start."""

    reference: str | None  # of the task, or else
    task: bytes | None  # pickled
    make_population: PopulationMaker
    config: JobConfig
    states: ClientStates | None
    spec: dict[str, TensorSpec]
    frozen_spec: dict[str, TensorSpec]
    parameters: int  # descriptors
    frozen: int
    sums: int

    def begin(self) -> Callable[[Asked], Done | Summed | Tried | None]:
        """Load the task in the worker; raises ConfigError, TaskError."""
        return PoolWorker(self).answer

    def load_task(self) -> Task:
        """Return the task."""
        if self.reference is not None:
            return load_task(self.reference)
        task = pickle.loads(self.task or b"")  # noqa: S301 - our own parent's
        if not isinstance(task, Task):
            raise ConfigError(f"the pool sent a {type(task).__name__} as its task")
        return task


class PoolWorker:
    """Answers the pool's messages."""

    def __init__(self, start: PoolStart) -> None:
        self._stack = ExitStack()  # never closed: until the process ends
        self._stack.enter_context(kept())
        set_threads(1)
        self._parameters = SharedTree(start.spec, start.parameters)
        self._frozen = SharedTree(start.frozen_spec, start.frozen)
        float64 = {name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in start.spec.items()}
        self._sums = SharedTree(float64, start.sums)
        task = start.load_task()
        with seeded(start.config.train.seed):
            population = start.make_population(task)
        self._trainer = ChunkTrainer(task, population, start.config, start.states)

    def answer(self, message: Asked) -> Done | Summed | Tried | None:
        if isinstance(message, BeginRound):
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
