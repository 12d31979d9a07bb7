"""Simulations of the small tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.records import Plan, RoundOutcome
from edgefl.rounds import Fleet, Job, run_rounds
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.world.task_population import TaskPopulation
from edgefl.task import load_task
from edgefl.training.parts import parts_of


@pytest.fixture(scope="session")
def set_up(tasks: Callable[[str], Path]) -> Callable[..., SimulationSetup]:
    """Make a setup of so many clients; sections of the configuration by name."""

    def make(
        name: str = "task", clients: int = 8, data: dict[str, str] | None = None, **sections: Any
    ) -> SimulationSetup:
        reference = str(tasks(name))
        task = load_task(reference)
        maker = partial(TaskPopulation, num_clients=clients, options=data or {})
        config = from_dict(JobConfig, {"train": {"batch_size": 4, "epochs": 2, "lr": 0.3}} | sections)
        return SimulationSetup(
            task=task, reference=reference, make_population=maker, population=maker(task), config=config
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[SimulationSetup, Fleet], list[RoundOutcome]]:
    """Run a setup's rounds on a fleet."""

    def outcomes(setup: SimulationSetup, fleet: Fleet) -> list[RoundOutcome]:
        config, task = setup.config, setup.task
        gradient = config.train.algorithm == "fedsgd"
        parts = parts_of(task)
        step = ServerOptimizer(config.server, gradient=gradient, buffers=parts.buffers)
        return list(run_rounds(Job(id="job", config=config, step=step, frozen=parts.frozen), fleet, parts.moving))

    return outcomes


@pytest.fixture(scope="session")
def plan_of() -> Callable[[SimulationSetup], Plan]:
    """Make round 1 for all clients."""

    def make(setup: SimulationSetup) -> Plan:
        parts = parts_of(setup.task)
        return Plan(
            job="job", round=1, parameters=parts.moving, clients=tuple(setup.population.names()),
            train=setup.config.train, deadline_s=60, frozen=parts.frozen,
        )  # fmt: skip

    return make
