"""Structures in each engine: the updates of single tensors."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from edgefl.config import JobConfig, TrainConfig
from edgefl.records import Plan
from edgefl.simulation.engines.fleets import SimulationSetup, TrainingMethod
from edgefl.simulation.engines.stackable import why_not_stacked
from edgefl.simulation.engines.stacked import StackTrainer
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.simulation.steps.recording import RECORD_RAGGED_AT, RecordedGradient
from edgefl.simulation.world.population import PopulationConfig, make_population
from edgefl.simulation.world.task_population import TaskPopulation
from edgefl.training.local import make_model, train_locally
from edgefl.training.parts import parts_of
from tests.edgefl import structured_tasks as made

TASKS = [made.tuples, made.dicts, made.deep]
CONFIG = JobConfig(train=TrainConfig(batch_size=4, epochs=2, lr=0.1))


def set_up(task, config=CONFIG):
    maker = partial(TaskPopulation, num_clients=4, options={})
    return SimulationSetup(
        task=task, reference=None, make_population=maker, population=maker(task), config=config,
    )  # fmt: skip


def plan_of(setup):
    parts = parts_of(setup.task)
    return Plan(
        job="j", round=1, parameters=parts.moving, clients=tuple(setup.population.names()), train=setup.config.train,
        deadline_s=9.0, frozen=parts.frozen,
    )  # fmt: skip


def on_a_device(setup, plan, client):
    options = setup.population.options(client)
    return train_locally(
        setup.task, plan.parameters, plan.train, options=options, round=1, client=client, frozen=plan.frozen
    )


def close(tree, wanted, within):
    for name, array in wanted.items():
        np.testing.assert_allclose(tree[name], array, rtol=0, atol=within)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("settings", [{}, {"algorithm": "fedsgd"}])
def test_the_loop_trains_structures_as_a_device_does(task, recorded, settings):
    setup = set_up(task, dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **settings)))
    plan, trainer = plan_of(setup), LocalTrainer(task, setup.population, TrainingMethod(recorded=recorded))
    trainer.begin(plan)
    for client in plan.clients[2:]:
        close(trainer.train(client).tree, on_a_device(setup, plan, client).tree, 1e-6 if recorded else 0)


@pytest.mark.parametrize("task", TASKS)
def test_steps_of_structures_are_recorded(task):
    gradient = RecordedGradient(task, make_model(task))
    inputs, targets = task.train_data(part="0")
    samples = set_up(task).population.samples("client-0")
    gradient(samples.inputs, samples.targets)
    assert gradient.why_not == ""
    assert len(gradient._recordings) == 1
    assert next(iter(gradient._recordings.values())) is not None
    assert inputs is not targets


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recorded", [True, False])
def test_structures_are_stacked(task, recorded):
    setup = set_up(task)
    assert why_not_stacked(setup) is None
    plan, trainer = plan_of(setup), StackTrainer(task, setup.population, TrainingMethod(recorded=recorded))
    trainer.begin(plan)
    for _ in range(2):  # the second time with recorded steps
        answers = {one.device: one for one in trainer.answers(plan.clients, sums=False)}
    for client in plan.clients:
        close(answers[client].tree, on_a_device(setup, plan, client).tree, 1e-5)


@pytest.mark.parametrize("partitioner", ["iid", "size_skew"])
def test_structures_are_partitioned(partitioner):
    whole = dataclasses.replace(made.deep, train_data=lambda: made.deep_part("5"))
    population = make_population(whole, PopulationConfig(clients=3, partitioner=partitioner))
    held = [population.samples(name) for name in population.names()]
    assert sum(map(len, held)) == 14
    rows = torch.cat([one.inputs[1]["right"] for one in held])
    others = torch.cat([one.targets["others"][0] for one in held])
    (_, everything), wanted = whole.train_data()
    for row, other in zip(rows, others, strict=True):  # inputs stay beside their targets
        (at,) = torch.nonzero((everything["right"] == row).all(1)).flatten().tolist()
        assert torch.equal(wanted["others"][0][at], other)


def test_a_model_with_sequences_of_many_lengths_records_those_that_come_again():
    model = torch.nn.Linear(2, 1)
    task = dataclasses.replace(made.plain, model=lambda: model)
    gradient = RecordedGradient(task, make_model(task))
    for length in (3, 4, 5, *[4] * RECORD_RAGGED_AT):
        gradient(torch.ones(2, length, 2), torch.zeros(2, length, 1))
    widths = [key[0][1] for key, recording in gradient._recordings.items() if recording is not None]
    assert widths == [3, 4]  # the first, as no other was known, and the one that came often
