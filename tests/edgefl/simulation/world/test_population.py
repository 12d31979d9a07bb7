"""Populations over a task's data: who holds what, who holds nothing, and what is refused."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import FitResult, Task
from edgefl.config import from_dict
from edgefl.errors import ConfigError, TaskError
from edgefl.simulation.world.names import Names
from edgefl.simulation.world.partition import Disjoint
from edgefl.simulation.world.population import PartedPopulation, PopulationConfig, make_population, sizes_of

LABELS = np.arange(60) % 3


def load(part: str = "0", parts: str = "1", shift: str = "0") -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(60)[int(part) :: int(parts)]
    return rows[:, None].astype(np.float32) + float(shift), LABELS[rows]


def load_real() -> tuple[np.ndarray, np.ndarray]:
    return load()[0], np.linspace(0, 1, 60, dtype=np.float32)


def make_model() -> nn.Module:
    return nn.Linear(1, 3)


TASK = Task(name="rows", model=make_model, loss=nn.functional.cross_entropy, train_data=load)
OWN_FIT = Task(name="own", initial=lambda: {"w": np.zeros(1)}, fit=lambda p, _c, _o: FitResult(tree=p, weight=1.0))


def config(**settings: Any) -> PopulationConfig:
    return from_dict(PopulationConfig, settings)


def rows(population: Any, client: str) -> list[int]:
    samples = population.samples(client)
    assert len(samples) == len(samples.targets)
    return samples.inputs[:, 0].int().tolist()


@pytest.mark.parametrize("partitioner", ["task", "iid", "dirichlet", "shards", "size_skew"])
def test_every_sample_is_somebodys_with_its_label(partitioner: str) -> None:
    population = make_population(TASK, config(partitioner=partitioner, clients=4, alpha=5.0))
    held = [rows(population, client) for client in population.names()]
    assert sorted(row for own in held for row in own) == list(range(60))
    one = population.samples("client-1")
    assert one.targets.tolist() == (one.inputs[:, 0].int() % 3).tolist()
    count = sizes_of(TASK, population)
    assert [count(client) for client in population.names()] == [len(own) for own in held]


def test_the_tasks_own_parts_are_those_of_its_devices() -> None:
    population = make_population(TASK, config(clients=3, data={"shift": "100"}))
    assert rows(population, "client-1") == list(range(101, 160, 3))
    assert len(make_population(TASK, config()).names()) == 100


def test_further_options_reach_the_loader() -> None:
    population = make_population(TASK, config(partitioner="iid", clients=2, data={"parts": "3"}))
    assert sorted(rows(population, "client-0") + rows(population, "client-1")) == list(range(0, 60, 3))


def test_a_client_without_data_says_so() -> None:
    everything = make_population(TASK, config(partitioner="iid", clients=1)).samples("client-0")
    population = PartedPopulation(everything, Names(3), Disjoint(np.zeros(60, np.int64), 3, 0))
    assert [population.num_samples(client) for client in population.names()] == [60, 0, 0]
    with pytest.raises(TaskError, match="client 'client-2' has no data: the partition gave it none of 60 samples"):
        population.samples("client-2")
    own = make_population(TASK, config(clients=61))
    assert sizes_of(TASK, own)("client-60") == 0
    with pytest.raises(TaskError, match="has no data"):
        own.samples("client-60")


def test_a_task_with_its_own_fit_counts_one_each() -> None:
    population = make_population(OWN_FIT, config(clients=5))
    assert sizes_of(OWN_FIT, population)("client-3") == 1
    with pytest.raises(TaskError, match="no train_data"):
        make_population(OWN_FIT, config(partitioner="iid"))


def test_a_million_clients_share_sixty_samples() -> None:
    population = make_population(TASK, config(partitioner="dirichlet", clients=1_000_000, samples_per_client=6))
    assert len(population.names()) == 1_000_000
    assert len(rows(population, "client-999999")) == 6 == sizes_of(TASK, population)("client-999999")


def test_the_least_is_given() -> None:
    settings = config(partitioner="dirichlet", clients=10, alpha=0.05, min_samples=4)
    count = sizes_of(TASK, population := make_population(TASK, settings))
    assert min(count(client) for client in population.names()) >= 4


def test_another_process_makes_the_same() -> None:
    make = pickle.loads(pickle.dumps(partial(make_population, config=config(partitioner="shards", clients=5))))  # noqa: S301
    assert [rows(make(TASK), name) for name in Names(5)] == [rows(make(TASK), name) for name in Names(5)]


def test_natural_ids_from_a_table_and_from_text(tmp_path: Path) -> None:
    ids = np.array(["bo", "al", "cy"])[np.arange(60) % 3]
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    for name in ("ids.npy", "ids.txt"):
        population = make_population(TASK, config(partitioner="natural", ids=str(tmp_path / name)))
        assert list(population.names()) == ["al", "bo", "cy"]
        assert set(population.samples("bo").targets.tolist()) == {0}
    two = make_population(TASK, config(partitioner="natural", ids=str(tmp_path / "ids.txt"), clients=2))
    assert list(two.names()) == ["al", "bo"]
    assert sorted(rows(two, "al")) == list(range(1, 60, 3))


def test_bad_ids_are_named(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("al\nbo\n")
    (tmp_path / "bad.npy").write_bytes(b"no table")
    (tmp_path / "ids.txt").write_text("al\n" * 60)
    for name, clients, fault in (
        ("few.txt", 0, "has 2 ids for 60 samples"),
        ("bad.npy", 0, "cannot read"),
        ("absent.txt", 0, "cannot read"),
        ("ids.txt", 2, "clients=2, but .* names 1 clients"),
    ):
        with pytest.raises(ConfigError, match=fault):
            make_population(TASK, config(partitioner="natural", ids=str(tmp_path / name), clients=clients))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"partitioner": "random"}, "partitioner='random' is not one of: task, iid"),
        ({"alpha": 0}, "alpha=0.0 must be above 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"shards_per_client": 0}, "shards_per_client=0"),
        ({"clients": -1}, "clients=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"samples_per_client": -1}, "samples_per_client=-1"),
        ({"partitioner": "natural"}, "ids is the file"),
        ({"ids": "x.npy"}, "ids is the file"),
        ({"partitioner": "task", "min_samples": 1}, "min_samples moves samples"),
        ({"partitioner": "iid", "min_samples": 1, "samples_per_client": 5}, "min_samples moves samples"),
        ({"devices": {"availability": {"dropout": 2}}}, "dropout=2.0"),
        ({"client": 3}, "unknown configuration key 'client'; known here: alpha"),
        ({"devices": {"speed": {"kind": "slow"}}}, "kind must be one of"),
    ],
)
def test_a_population_that_cannot_be_is_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config(**settings)


def test_more_clients_than_samples_and_labels_that_are_none() -> None:
    with pytest.raises(ConfigError, match="clients=61 is above the 60 samples"):
        make_population(TASK, config(partitioner="iid", clients=61))
    real = Task(name="real", model=make_model, loss=nn.functional.mse_loss, train_data=load_real)
    with pytest.raises(ConfigError, match=r"needs one integer label per sample; the task's targets are target float32"):
        make_population(real, config(partitioner="dirichlet", clients=2))
    assert (
        make_population(real, config(partitioner="iid", clients=2)).samples("client-0").targets.dtype == torch.float32
    )
