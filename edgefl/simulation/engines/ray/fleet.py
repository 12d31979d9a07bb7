"""The pool's workers as actors on a Ray cluster: many machines, or this one.

A round's parameters are put into Ray's object store once, and sent to each machine once; sums come back.
`engines/pool/round.py` distributes a round to workers; `edgefl/process/workers/pool.py` handles the loss of an
actor or a node. `peak_rss_mb` does not include Ray's own processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgefl.errors import ConfigError
from edgefl.process.workers.pool import WorkerPool
from edgefl.records import Answer, Plan, Traffic
from edgefl.simulation.engines.fleets import Meter, SimulationSetup
from edgefl.simulation.engines.pool.messages import Chunk
from edgefl.simulation.engines.pool.round import PoolHistory, train
from edgefl.simulation.engines.ray.actor import Actor, start_of
from edgefl.simulation.engines.ray.cluster import Cluster, undisturbed
from edgefl.simulation.engines.ray.worker import RayWorker, wait_for_actors
from edgefl.trees import Tree

END_S = 2.0


class RayFleet:
    """Trains a cohort on a cluster, one actor per CPU; without an address, starts a cluster on this machine."""

    def __init__(self, setup: SimulationSetup, address: str | None = None) -> None:
        if setup.states is not None:
            raise ConfigError("the engine 'ray' has no place where clients keep their state; use 'loop' or 'pool'")
        self._setup = setup
        self._meter = Meter(setup.served, setup.states)
        self._history = PoolHistory()
        self._parameters: Any = None  # references into the object store: of the changing and the frozen tensors
        self._frozen: Any = None
        self._stored: Tree | None = None  # the frozen tensors there
        self.pool: WorkerPool[RayWorker, Chunk] = WorkerPool([], wait_for_actors)
        self.cluster = Cluster(address)
        try:
            self._start()
        except BaseException:  # also on Ctrl-C: end everything that was started
            self.close()
            raise

    @property
    def peak_rss_mb(self) -> float:
        """Return the sum of the workers' peak memory, as reported so far."""
        return self.pool.peak_rss_mb

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        self._parameters = self.cluster.ray.put(dict(plan.parameters))
        if self._frozen is None or plan.frozen is not self._stored:
            self._frozen = self.cluster.ray.put(None if plan.frozen is None else dict(plan.frozen))
            self._stored = plan.frozen
        return train(self._setup, self._meter, plan, self.pool, self._history)

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """End the workers, and the cluster if we started it."""
        with undisturbed():
            leaving = [worker.leave() for worker in self.pool.ready_workers]
            if leaving:
                self.cluster.ray.wait(leaving, num_returns=len(leaving), timeout=END_S)
            self.pool.close()
            self.cluster.close()

    def _start(self) -> None:
        """Start the workers, and wait until the first is ready; the others join later. Raises ConfigError."""
        ray, num_cpus = self.cluster.ray, self.cluster.num_cpus()
        start = ray.put(start_of(self._setup, here=self.cluster.ours))
        remote = ray.remote(num_cpus=1, max_restarts=0)(Actor)

        def launch() -> RayWorker:
            return RayWorker(lambda: remote.remote(start), lambda: (self._parameters, self._frozen))

        launchers = [launch] * max(1, min(num_cpus, len(self.clients())))
        self.pool = WorkerPool(launchers, wait_for_actors, name="worker on the Ray cluster")
        self.pool.wait_until_ready(1, f"; each needs one of the {num_cpus} CPUs, and edgefl on its node")
