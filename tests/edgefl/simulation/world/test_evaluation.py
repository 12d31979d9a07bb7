"""The held-out samples of a partition's clients: drawn like their own ones, and none for a natural partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import ConfigError, Task
from edgefl.errors import TaskError
from edgefl.simulation.world.evaluation import HeldOut
from edgefl.simulation.world.population import PartedPopulation, PopulationConfig, make_population
from edgefl.training.samples import Samples


def _data(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(count)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return inputs, (inputs[:, 0] > 0).astype(np.int64)


def _task(**changes: Any) -> Task:
    known: dict[str, Any] = {"train_data": lambda: _data(420), "eval_data": lambda: _data(200)}
    return Task(name="signs", model=lambda: nn.Linear(4, 2), loss=nn.functional.cross_entropy, **known | changes)


def _population(task: Task, **config: Any) -> PartedPopulation:
    population = make_population(task, PopulationConfig(clients=6, **config))
    assert isinstance(population, PartedPopulation)
    return population


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_clients_draw_held_out_samples_with_the_labels_of_their_own(partitioner: str) -> None:
    population, again = (_population(_task(), partitioner=partitioner, alpha=1.0) for _ in range(2))
    for client in population.names():
        own, held_out = population.samples(client), population.eval_samples(client)
        assert 1 <= len(held_out) <= max(1, round(len(own) * 200 / 420))  # fewer if a label is rare
        if partitioner == "dirichlet":
            assert set(held_out.targets.tolist()) <= set(own.targets.tolist())
        assert torch.equal(held_out.inputs, again.eval_samples(client).inputs)


def test_of_each_label_as_many_are_drawn_as_the_clients_own_samples_have() -> None:
    held_out = Samples(torch.arange(60.0)[:, None], torch.tensor([0, 1, 2] * 20))
    train_labels = np.array([0] * 30 + [1] * 30)
    drawn = HeldOut(lambda: held_out, lambda one: one.targets.numpy(), train_labels, seed=0)
    assert drawn.draw(0, np.arange(30)).targets.unique().tolist() == [0]
    both = drawn.draw(1, np.arange(20, 40)).targets.tolist()
    assert (both.count(0), both.count(1)) == (10, 10)  # 20 of 60 training samples, so 20 of 60


def test_a_client_whose_labels_are_not_held_out_says_so() -> None:
    held_out = Samples(torch.zeros(2, 1), torch.tensor([5, 5]))
    drawn = HeldOut(lambda: held_out, lambda one: one.targets.numpy(), np.zeros(4, np.int64), seed=0)
    with pytest.raises(TaskError, match="eval_data has none with the labels of its own"):
        drawn.draw(0, np.arange(2))


def test_targets_that_are_no_labels_are_refused() -> None:
    task = _task(eval_data=lambda: (np.zeros((3, 4), np.float32), np.zeros(3, np.float32)))
    with pytest.raises(ConfigError, match="needs one integer label per sample"):
        _population(task, partitioner="dirichlet", alpha=1.0).eval_samples("client-0")


def test_a_natural_partition_cannot_split_held_out_samples(tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"c{n % 6}" for n in range(420)))
    population = _population(_task(), partitioner="natural", ids=str(ids))
    with pytest.raises(TaskError, match="has no ids for eval_data"):
        population.eval_samples("c1")
