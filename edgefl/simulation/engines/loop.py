"""The loop: one process, one thread, one model, one client after another. The simplest engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgefl.records import Evaluated, Failure, Plan, Traffic, Update
from edgefl.simulation.engines.fleets import Meter, SimulationSetup, torch_threads
from edgefl.simulation.engines.trainer import LocalTrainer


class LoopFleet:
    """Trains the clients of a cohort in order."""

    def __init__(self, setup: SimulationSetup) -> None:
        self._setup = setup
        self._trainer = LocalTrainer(setup.task, setup.population, setup.method, setup.states)
        self._meter = Meter(setup.served, setup.states)

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Update | Failure | Evaluated]:
        self._meter.begin(plan)
        with torch_threads(1):
            self._trainer.begin(plan)
            for client in plan.clients:
                if self._setup.stop.is_set():
                    return
                answer = self._trainer.answer(client)
                self._meter.count(answer)
                yield answer

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """Nothing was started."""
