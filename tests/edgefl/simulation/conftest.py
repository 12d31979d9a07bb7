"""A folder of small tasks in float64, on ragged data, that worker processes can load too."""

from __future__ import annotations

import sys
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

MODULE = """
import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgefl import FitResult, Task


def load(part="0", parts="1", empty="", infinite="", deadly="", deaths="1"):
    number = int(part)
    if part == deadly.partition("@")[0]:
        _die_sometimes(Path(deadly.partition("@")[2]), int(deaths))
    count = 0 if part == empty else 1 + 5 * number % 17
    inputs = torch.from_numpy(np.random.default_rng(number).normal(size=(count, 4)))
    if part == infinite:
        inputs[0] = torch.inf
    return inputs, (inputs.sum(1) > 0).long()


def _die_sometimes(folder, deaths):
    died = len(list(folder.iterdir()))
    if died < deaths:
        (folder / str(died)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def load_held_out():
    inputs = torch.from_numpy(np.random.default_rng(99).normal(size=(50, 4)))
    return inputs, (inputs.sum(1) > 0).long()


def make(*layers):
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 2)).double()


def frozen():
    model = make()
    model[0].weight.requires_grad_(False)
    return model


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean().item()


def fit(parameters, config, options):
    return FitResult(tree={"w": np.full(2, float(options["part"]))}, weight=1.0)


def weighted(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 3.0]).double())


task = Task(name="small", model=make, loss=nn.functional.cross_entropy, train_data=load, test_data=load_held_out,
            metrics={"accuracy": accuracy})
dropout = dataclasses.replace(task, model=lambda: make(nn.Dropout(0.5)))
norm = dataclasses.replace(task, model=lambda: make(nn.BatchNorm1d(8)))
half = dataclasses.replace(task, model=frozen)
summed = dataclasses.replace(task, loss=weighted)
adam = dataclasses.replace(task, optimizer=lambda parameters, lr: torch.optim.Adam(parameters, lr))
own_fit = Task(name="own", initial=lambda: {"w": np.zeros(2)}, fit=fit)
partless = dataclasses.replace(task, train_data=lambda: load())
"""


@pytest.fixture(autouse=True)
def unchanged_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a task by its name in the module."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"tasks-{name}"
        if not path.exists():
            path.mkdir()
            (path / "small_tasks.py").write_text(MODULE)
            (path / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "small_tasks:{name}"\n')
        return path

    return folder


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
