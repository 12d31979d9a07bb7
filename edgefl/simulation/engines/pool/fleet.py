"""Worker processes on this machine, one thread each, on all cores: for models whose steps are expensive.

Parameters and sums are in shared memory. `round.py` distributes a round to workers;
`edgefl/process/workers/pool.py` handles the death of a worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

from edgefl.measure import num_cores
from edgefl.process.workers.pool import START_S, ItemAnswered, RunTerms, WorkerPool
from edgefl.process.workers.process import wait_for_processes
from edgefl.process.workers.work_queue import WorkQueue
from edgefl.records import Answer, Plan, Traffic
from edgefl.simulation.engines.fleets import Meter, SimulationSetup, TrainingMethod
from edgefl.simulation.engines.pool.messages import Chunk, Tried, Try
from edgefl.simulation.engines.pool.process import TrainingProcess, launcher, memory_for
from edgefl.simulation.engines.pool.round import PoolHistory, train
from edgefl.training.parts import parts_of
from edgefl.trees import Tree


class PoolFleet:
    """Trains a cohort on worker processes; raises ConfigError if one cannot be started."""

    def __init__(self, setup: SimulationSetup, num_workers: int | None = None) -> None:
        self._setup = setup
        self._meter = Meter(setup.served, setup.states)
        self._history = PoolHistory()
        self._written: Tree | None = None  # the frozen tensors in the shared memory
        parts = parts_of(setup.task, setup.config.train.seed)
        with ExitStack() as opened:  # closed on any failure, and on Ctrl-C
            self._parameters, self._frozen, *sums = (
                opened.enter_context(closing(memory))
                for memory in memory_for(parts.moving, parts.frozen, num_workers or num_cores())
            )
            launchers = [launcher(setup, self._parameters, self._frozen, one) for one in sums]
            pool: WorkerPool[TrainingProcess, Chunk | Try] = WorkerPool(launchers, wait_for_processes)
            self.pool = opened.enter_context(closing(pool))
            self.pool.wait_until_ready()
            self._opened = opened.pop_all()

    @property
    def num_workers(self) -> int:
        return len(self.pool.workers)

    @property
    def peak_rss_mb(self) -> float:
        """Return the sum of the workers' peak memory, as reported so far."""
        return self.pool.peak_rss_mb

    @property
    def faults(self) -> Sequence[str]:
        """Return why the workers' stacks failed, so that they trained clients one by one."""
        return self._history.stack_faults

    def why_not_stacked(self) -> str | None:
        """Return why the task's clients cannot be trained in stacks, or None; a worker tests it."""
        terms = RunTerms(answer_s=START_S, max_losses=1)
        (event,) = self.pool.run(WorkQueue([Try(self._setup.method)]), terms)
        if isinstance(event, ItemAnswered):
            tried: Tried = event.answer
            return tried.why_not
        return f"the worker that tested it {event.how}"

    def use(self, method: TrainingMethod) -> None:
        """Make the workers train with another method from the next round on."""
        self._setup = dataclasses.replace(self._setup, method=method)

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        self._parameters.write(plan.parameters)
        if plan.frozen and plan.frozen is not self._written:
            self._frozen.write(plan.frozen)
            self._written = plan.frozen
        return train(self._setup, self._meter, plan, self.pool, self._history)

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """End the workers, and release their memory."""
        self._opened.close()
