"""The pool's workers as actors on a Ray cluster: many machines, or this one.

A round's parameters go into Ray's object store once, and reach each machine once; sums come back. How
a round is dealt out, and what happens when an actor or a node is lost, stands in `pool.round`.
Not in `peak_rss_mb`: Ray's own processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from edgefl.errors import ConfigError
from edgefl.records import Plan, Traffic
from edgefl.simulation.engines.fleets import Meter, SimulationSetup
from edgefl.simulation.engines.pool.messages import Gone
from edgefl.simulation.engines.pool.round import START_S, Answer, train
from edgefl.simulation.engines.ray.actor import Actor, start_of
from edgefl.simulation.engines.ray.cluster import Cluster, undisturbed
from edgefl.simulation.engines.ray.worker import RayWorker, wait_for_any
from edgefl.trees import Tree

END_S = 2.0


class RayFleet:
    """Trains a cohort on a cluster, one actor a CPU; without an address, on a cluster of its own on this machine."""

    def __init__(self, setup: SimulationSetup, address: str | None = None) -> None:
        self._setup = setup
        self._meter = Meter(setup.served)
        self._deadly: dict[str, str] = {}  # clients that end their workers, and how
        self._parameters: Any = None  # references into the object store: of what moves, and of what is frozen
        self._frozen: Any = None
        self._stored: Tree | None = None  # what is frozen there
        self.workers: list[RayWorker] = []
        self.cluster = Cluster(address)
        try:
            self._start_workers()
            self._wait_for_one()
        except BaseException:  # Ctrl-C too: nothing that was started may outlive it
            self.close()
            raise

    @property
    def peak_rss_mb(self) -> float:
        """Return the sum of the workers' peaks, as far as they have told."""
        return sum(worker.peak_rss_mb for worker in self.workers)

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        self._parameters = self.cluster.ray.put(dict(plan.parameters))
        if self._frozen is None or plan.frozen is not self._stored:
            self._frozen = self.cluster.ray.put(None if plan.frozen is None else dict(plan.frozen))
            self._stored = plan.frozen
        return train(self._setup, self._meter, plan, self.workers, wait_for_any, self._deadly)

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """End the workers, and the cluster where it is ours."""
        with undisturbed():
            leaving = [worker.leave() for worker in self.workers if worker.ready]
            if leaving:
                self.cluster.ray.wait(leaving, num_returns=len(leaving), timeout=END_S)
            for worker in self.workers:
                worker.end()
            self.cluster.close()

    def _start_workers(self) -> None:
        ray = self.cluster.ray
        start = ray.put(start_of(self._setup, here=self.cluster.ours))
        remote = ray.remote(num_cpus=1, max_restarts=0)(Actor)
        for _ in range(max(1, min(self.cluster.num_cpus(), len(self.clients())))):
            self.workers.append(RayWorker(lambda: remote.remote(start), lambda: (self._parameters, self._frozen)))

    def _wait_for_one(self) -> None:
        """Wait until somebody can begin; the others come when they come. Raises ConfigError."""
        deadline_s = time.monotonic() + START_S
        while not any(worker.ready for worker in self.workers):
            answered = wait_for_any(self.workers, max(0.0, deadline_s - time.monotonic()))
            if not answered:
                raise ConfigError(
                    f"no worker was ready within {START_S:g} s on the Ray cluster of {self.cluster.num_cpus()} CPUs; "
                    "each wants one that is free"
                )
            if isinstance(gone := answered[0].hear(), Gone):
                raise ConfigError(
                    f"a worker on the Ray cluster {gone.how} before it was ready; is edgefl on each node?"
                )
