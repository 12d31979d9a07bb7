"""The engine `stacked`: trains a cohort stack by stack in this process, if the task can be stacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgefl.aggregation import rule_kind
from edgefl.errors import ConfigError
from edgefl.measure import num_cores
from edgefl.records import Answer, Plan, Traffic
from edgefl.simulation.engines.fleets import Meter, SimulationSetup, torch_threads
from edgefl.simulation.engines.stackable import why_not_stacked
from edgefl.simulation.engines.stacked import StackTrainer


class StackedFleet:
    """Trains a cohort stack by stack; raises ConfigError if a task cannot be stacked, TaskError if it is faulty."""

    def __init__(self, setup: SimulationSetup) -> None:
        if reason := why_not_stacked(setup):
            raise ConfigError(f"the engine 'stacked' cannot run task {setup.task.name!r}: {reason}")
        self._setup = setup
        self._trainer = StackTrainer(setup.task, setup.population, setup.method)
        self._meter = Meter(setup.served, setup.states)

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        self._meter.begin(plan)
        sums = rule_kind(self._setup.config.aggregation.rule).merges and self._setup.takes_sums(plan)
        with torch_threads(num_cores()):
            self._trainer.begin(plan)
            for clients in self._trainer.stacks(plan.clients):
                if self._setup.stop.is_set():
                    return
                for answer in self._trainer.answers(clients, sums=sums):
                    self._meter.count(answer)
                    yield answer

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """Nothing was started."""
