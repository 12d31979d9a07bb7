"""User code that draws from global random states: every engine gives what devices give."""

import dataclasses
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from edgefl.aggregation.mean import WeightedMean
from edgefl.config import JobConfig, from_dict
from edgefl.records import Plan, Update
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import Chunk, Flush
from edgefl.simulation.engines.stackable import why_not_stacked
from edgefl.simulation.simulate import simulate
from edgefl.simulation.steps.recording import RecordedGradient
from edgefl.simulation.world.task_population import TaskPopulation
from edgefl.task import FitResult, Task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.training.randomness import Drawn
from edgefl.training.samples import Samples


class Noisy(nn.Module):
    def __init__(self, kind=""):
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 2), kind

    def forward(self, inputs):
        noise = {"numpy": lambda: float(np.random.normal()), "python": random.random}.get(self.kind, lambda: 0.0)
        return self.layer(inputs) + torch.tensor([noise(), 0.0])


def load(part="0", parts="1", *, draws=False):
    inputs = np.random.default_rng(int(part)).normal(size=(30, 4)).astype(np.float32)
    if draws:
        inputs = inputs[np.random.permutation(30)[: 10 + random.randrange(5)]]
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


def noisy_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) * random.uniform(0.5, 1.5)


def fit(parameters, config, options):
    return FitResult(tree={"w": np.array([random.random(), np.random.normal()])}, weight=1.0)


PLAIN = Task(name="noisy", model=Noisy, loss=nn.functional.cross_entropy, train_data=load)
TASKS = {
    "loader": dataclasses.replace(PLAIN, train_data=partial(load, draws=True)),
    "forward, numpy": dataclasses.replace(PLAIN, model=partial(Noisy, "numpy")),
    "forward, python": dataclasses.replace(PLAIN, model=partial(Noisy, "python")),
    "loss": dataclasses.replace(PLAIN, loss=noisy_loss),
    "fit": Task(name="own", initial=lambda: {"w": np.random.normal(size=2)}, fit=fit),
}


def setup_of(task, seed=3):
    population = TaskPopulation(task, 5, {}, seed=seed)
    config = from_dict(JobConfig, {"train": {"batch_size": 4, "lr": 0.1, "seed": seed}})
    return SimulationSetup(
        task=task, reference=None, make_population=lambda _task: population, population=population, config=config
    )  # fmt: skip


def plan_of(setup, clients=None):
    return Plan(
        job="j", round=2, parameters=initial_parameters(setup.task, setup.config.train.seed),
        clients=clients or tuple(setup.population.names()), train=setup.config.train, deadline_s=60,
    )  # fmt: skip


def total(updates, plan):
    mean = WeightedMean(plan.parameters)
    for update in updates:
        mean.add(update)
    return mean.partial().total


@pytest.mark.parametrize("name", TASKS)
def test_any_order_and_any_worker_gives_what_devices_give(name):
    setup = setup_of(TASKS[name])
    plan = plan_of(setup)
    before = Drawn()
    devices = []
    for client in plan.clients:
        options = setup.population.options(client)
        own = train_locally(setup.task, plan.parameters, plan.train, options=options, round=2, client=client)
        devices.append(Update(job="j", round=2, device=client, tree=own.tree, weight=own.weight))
    wanted = total(devices, plan)
    random.random()
    backwards = setup_of(TASKS[name])
    in_loop = total(LoopFleet(backwards).collect(plan_of(backwards, plan.clients[::-1])), plan)
    fresh = setup_of(TASKS[name])
    worker = ChunkTrainer(fresh.task, fresh.population, fresh.config)
    worker.begin(plan, sums=True)
    worker.answer(Chunk(plan.clients[2:]))
    worker.answer(Chunk(plan.clients[:2]))
    in_worker = worker.answer(Flush()).partial.total
    before.put_back()
    for key, array in wanted.items():
        np.testing.assert_allclose(in_loop[key], array, rtol=0, atol=1e-4, err_msg=key)
        np.testing.assert_allclose(in_worker[key], array, rtol=0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["forward, numpy", "forward, python", "loss"])
def test_a_step_that_draws_is_neither_recorded_nor_stacked(name):
    setup = setup_of(TASKS[name])
    assert "draws from Python's or numpy's" in (why_not_stacked(setup) or "")
    samples = setup.population.samples("client-0")
    gradient = RecordedGradient(setup.task, setup.task.model())
    before = Drawn()
    gradient.factored(samples.inputs, samples.targets)
    assert "draws from Python's or numpy's" in gradient.why_not
    before.put_back()
    gradient._by_autograd(samples.inputs, samples.targets)
    once = Drawn()  # the attempt to record drew nothing that training did not
    before.put_back()
    gradient.factored(samples.inputs, samples.targets)
    assert not once.since()
    before.put_back()


class Drawing:
    """A population of the user's own."""

    def __init__(self, _task):
        self.shift = np.random.normal()

    def names(self):
        return ["a", "b", "c"]

    def samples(self, client):
        inputs = torch.from_numpy(np.random.normal(size=(6, 4)).astype(np.float32)) + self.shift
        return Samples(inputs, torch.randint(0, 2, (6,)))


def test_a_population_that_draws_and_the_callers_own_states():
    before, of_torch = Drawn(), torch.get_rng_state()
    first, again = (simulate(PLAIN, rounds=2, engine="loop", population=Drawing) for _ in range(2))
    assert not before.since()
    assert torch.equal(torch.get_rng_state(), of_torch)
    other = simulate(
        PLAIN, rounds=2, engine="loop", population=Drawing, config=from_dict(JobConfig, {"train": {"seed": 1}})
    )
    for name, array in first.parameters.items():
        np.testing.assert_array_equal(array, again.parameters[name])
    assert not np.array_equal(first.parameters["layer.bias"], other.parameters["layer.bias"])
