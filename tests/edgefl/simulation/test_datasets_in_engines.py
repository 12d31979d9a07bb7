"""A Dataset in a simulation: parted without reading it, trained as on a device, refused where it cannot be stacked."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from edgefl.config import JobConfig, TrainConfig
from edgefl.errors import ConfigError
from edgefl.records import Failure
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.engines.stackable import why_not_stacked
from edgefl.simulation.engines.stacked import StackTrainer
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.simulation.world.population import PopulationConfig, make_population, sizes_of
from edgefl.training.local import train_locally
from edgefl.training.samples import Samples
from tests.edgefl import structured_tasks as made
from tests.edgefl.simulation.test_structures_in_engines import CONFIG, close, plan_of, set_up


class Rows(Dataset):
    """The rows of one client of `made.plain`; counts what is read."""

    def __init__(self, part="0", rows=None):
        self.inputs, self.targets = made.numbers(part, rows)
        self.read = []

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, n):
        self.read.append(n)
        return self.inputs[n], self.targets[n]


class Labelled(Rows):
    """60 rows of 3 labels."""

    def __init__(self):
        super().__init__(rows=60)
        self.inputs, self.targets = torch.arange(60.0)[:, None], np.arange(60) % 3


LAZY = dataclasses.replace(made.plain, name="lazy", train_data=lambda part="0", parts="1": Rows(part))
RANDOM = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=4, epochs=2, lr=0.1, workers=2))


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_the_loop_trains_a_dataset_as_arrays(algorithm):
    train = dataclasses.replace(RANDOM.train, algorithm=algorithm)
    updates = []
    for task in (LAZY, made.plain):
        setup = set_up(task, JobConfig(train=train))
        plan, trainer = plan_of(setup), LocalTrainer(task, setup.population)
        trainer.begin(plan)
        updates.append([trainer.train(client).tree for client in plan.clients])
    for one, other in zip(*updates, strict=True):
        close(one, other, 0)


def test_the_loop_trains_a_dataset_as_a_device_does():
    setup = set_up(LAZY, RANDOM)
    plan, trainer = plan_of(setup), LocalTrainer(LAZY, setup.population)
    trainer.begin(plan)
    client = plan.clients[3]
    wanted = train_locally(
        LAZY, plan.parameters, plan.train, options=setup.population.options(client), round=1, client=client
    )
    close(trainer.train(client).tree, wanted.tree, 1e-6)


@pytest.mark.parametrize("partitioner", ["iid", "size_skew", "dirichlet", "shards"])
@pytest.mark.parametrize("shared", [0, 7])
def test_a_partition_reads_only_the_samples_of_the_clients_that_are_asked(partitioner, shared):
    held = Labelled()
    task = dataclasses.replace(LAZY, train_data=lambda: held)
    settings = PopulationConfig(clients=4, partitioner=partitioner, samples_per_client=shared, alpha=5.0)
    population = make_population(task, settings)
    arrays = dataclasses.replace(LAZY, train_data=lambda: (held.inputs, held.targets))
    wanted = make_population(arrays, settings)
    count = sizes_of(task, population)
    assert held.read == []
    for name in population.names():
        samples, others = population.samples(name), wanted.samples(name)
        assert len(samples) == len(others) == count(name)
        held.read.clear()
        everything = samples.first(99)
        assert isinstance(everything, Samples)
        assert torch.equal(everything.inputs, others.inputs)
        assert torch.equal(everything.targets, others.targets)
        assert len(held.read) == len(samples)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (None, r"the Rows of train_data has no attribute `targets`"),
        (np.zeros(60), r"the Rows of train_data has `targets` of float64 and shape \[60\]"),
        (np.zeros(59, int), r"has `targets` of int64 and shape \[59\]. Give it that attribute: one integer per sample"),
    ],
)
def test_a_partition_by_label_says_what_it_needs(targets, said):
    held = Rows(rows=60)
    held.targets = targets
    if targets is None:
        del held.targets
    task = dataclasses.replace(LAZY, train_data=lambda: held)
    with pytest.raises(ConfigError, match=said):
        make_population(task, PopulationConfig(clients=2, partitioner="dirichlet"))
    assert held.read == []


def test_a_dataset_is_not_stacked_and_says_so():
    setup = set_up(LAZY)
    assert why_not_stacked(setup) == "its samples are a Dataset, read batch by batch; stacked are samples in memory"


def test_one_client_with_a_dataset_fails_alone_in_a_stack():
    task = dataclasses.replace(
        LAZY, train_data=lambda part="0", parts="1": Rows(part) if part == "1" else made.numbers(part)
    )
    setup = set_up(task)
    plan, trainer = plan_of(setup), StackTrainer(task, setup.population)
    trainer.begin(plan)
    answers = list(trainer.answers(plan.clients, sums=False))
    assert [isinstance(one, Failure) for one in answers] == [False, True, False, False]
    assert "client 'client-1' cannot be stacked: its samples are a Dataset" in answers[1].reason


def test_a_population_of_a_dataset_is_made_again_in_a_worker():
    maker = partial(make_population, config=PopulationConfig(clients=3, partitioner="iid"))
    task = dataclasses.replace(LAZY, train_data=lambda: Rows("5"))
    setup = SimulationSetup(
        task=task, reference=None, make_population=maker, population=maker(task), config=CONFIG
    )  # fmt: skip
    one, other = (population.samples("client-1").first(9) for population in (setup.population, maker(task)))
    assert torch.equal(one.inputs, other.inputs)
