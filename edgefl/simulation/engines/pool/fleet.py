"""Worker processes on this machine, one thread each: for models whose steps are real work, on all cores.

Parameters and sums lie in memory that the processes share; how a round is dealt out, and what happens
when a worker dies, stands in `round`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from edgefl.errors import ConfigError
from edgefl.measure import num_cores
from edgefl.records import Plan, Traffic
from edgefl.simulation.engines.fleets import Meter, SimulationSetup, TrainingMethod
from edgefl.simulation.engines.pool.process import WorkerProcess
from edgefl.simulation.engines.pool.round import Answer, train
from edgefl.simulation.engines.shared import SharedTree
from edgefl.training.parts import parts_of
from edgefl.trees import Tree, spec_of


class PoolFleet:
    """Trains a cohort on worker processes."""

    def __init__(self, setup: SimulationSetup, num_workers: int | None = None) -> None:
        self._setup = setup
        self._meter = Meter(setup.served)
        self._deadly: dict[str, str] = {}  # clients that end their workers, and how
        parts = parts_of(setup.task, setup.config.train.seed)
        self._parameters, self._frozen = SharedTree(spec_of(parts.moving)), SharedTree(spec_of(parts.frozen))
        self._written: Tree | None = None  # what is frozen there
        self.workers: list[WorkerProcess] = []
        try:
            for _ in range(num_workers or num_cores()):
                self.workers.append(WorkerProcess(setup, self._parameters, self._frozen))
            for worker in self.workers:
                worker.wait_until_ready()
        except ConfigError:
            self.close()
            raise

    @property
    def peak_rss_mb(self) -> float:
        """Return the sum of the workers' peaks, as far as they have told."""
        return sum(worker.peak_rss_mb for worker in self.workers)

    @property
    def faults(self) -> Sequence[str]:
        """Return what went wrong with the workers' stacks, whose clients they then trained one by one."""
        return [worker.fault for worker in self.workers if worker.fault]

    def why_not_stacked(self) -> str | None:
        """Return why the task's clients cannot be trained in stacks, or None, as a worker has tried it."""
        return self.workers[0].why_not_stacked(self._setup.method)

    def use(self, method: TrainingMethod) -> None:
        """Have the workers train in another way from the next round on."""
        self._setup = dataclasses.replace(self._setup, method=method)

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        self._parameters.write(plan.parameters)
        if plan.frozen and plan.frozen is not self._written:
            self._frozen.write(plan.frozen)
            self._written = plan.frozen
        return train(self._setup, self._meter, plan, self.workers, _wait, self._deadly)

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()
        self._parameters.close()
        self._frozen.close()


def _wait(workers: Sequence[WorkerProcess], within_s: float) -> Sequence[WorkerProcess]:
    pipes: list[Connection] = [worker.pipe for worker in workers]
    answered = wait(pipes, within_s)
    return [worker for worker in workers if worker.pipe in answered]
