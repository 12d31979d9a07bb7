"""Populations: the clients of a simulation and their data, created on demand.

`[population]` in the configuration sets the number of clients, how the task's samples are distributed
to them, and their machines (`[population.devices]`).
Invariant: a population creates no object per client; a client's samples depend only on (seed, client).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from edgefl.config import MAX_SEED
from edgefl.errors import ConfigError, TaskError
from edgefl.simulation.engines.fleets import Population
from edgefl.simulation.isolation.at_work import turn_of
from edgefl.simulation.world.devices import DevicesConfig
from edgefl.simulation.world.draws import Indices
from edgefl.simulation.world.evaluation import HeldOut
from edgefl.simulation.world.names import KnownNames, Names
from edgefl.simulation.world.partition import Cut, Disjoint, Partition, filled, owners, shared
from edgefl.simulation.world.schedule import NumSamples
from edgefl.simulation.world.task_population import TaskPopulation, refuse_unknown_options
from edgefl.task import Task
from edgefl.terminal.bounds import MAX_COUNT, require_within
from edgefl.training.data.dataset import DatasetSamples
from edgefl.training.local import data_seed
from edgefl.training.randomness import seeded
from edgefl.training.samples import Samples, SampleSet, eval_samples, train_samples
from edgefl.training.structures import TARGET, described, leaves
from edgefl.trees import Array
from edgefl.trees.tensors import array_of

PARTITIONERS = ("task", "iid", "dirichlet", "shards", "size_skew", "natural")
BY_LABEL = ("dirichlet", "shards")
DEFAULT_CLIENTS = 100
KNOWN_SIZES = 100_000  # clients whose number of samples is cached


@dataclass(frozen=True, kw_only=True, slots=True)
class PopulationConfig:
    """The clients of a simulation, and their data.

    `partitioner`: task (the task's own `train_data`, called with the options part and parts), or a partition of
    all samples of `train_data`: iid, dirichlet (skewed labels), shards (few labels), size_skew,
    natural (by the id of each sample, from the file `ids`: .npy, or text with one line per sample).

    Of the task's `eval_data`, each client of a partition draws held-out samples with the labels of its own samples,
    in proportion to their number; clients may share them. A natural partition has none.
    """

    clients: int = 0  # 0: one per id (natural), or else 100
    partitioner: str = "task"  # task | iid | dirichlet | shards | size_skew | natural
    alpha: float = 0.5  # dirichlet: of the distribution; smaller is more skewed
    shards_per_client: int = 2  # shards: of samples sorted by label
    samples_per_client: int = 0  # 0: each sample has one owner; above 0: clients share samples
    min_samples: int = 0  # clients with the most samples give to those with fewer
    seed: int = 0  # of the partition, and of the devices' properties
    ids: str = ""  # natural: the file with the id of each sample
    data: Mapping[str, str] = field(default_factory=dict)  # further options of the task's `train_data`
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)  # tag -> values, given to the clients in turn
    devices: DevicesConfig = field(default_factory=DevicesConfig)

    def __post_init__(self) -> None:
        if self.partitioner not in PARTITIONERS:
            raise ConfigError(f"population.partitioner={self.partitioner!r} is not one of: {', '.join(PARTITIONERS)}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"population.alpha={self.alpha} must be above 0 and finite")
        require_within("population.shards_per_client", self.shards_per_client, 1, MAX_COUNT)
        for name in ("clients", "samples_per_client", "min_samples"):
            require_within(f"population.{name}", getattr(self, name), 0, MAX_COUNT)
        require_within("population.seed", self.seed, 0, MAX_SEED)
        if empty := [name for name, values in self.tags.items() if not values]:
            raise ConfigError(f"population.tags.{empty[0]} has no values; give the clients at least one")
        if (self.partitioner == "natural") != bool(self.ids):
            raise ConfigError("population.ids is the file of partitioner='natural': give both or neither")
        if self.min_samples and (self.samples_per_client or self.partitioner in {"task", "natural"}):
            raise ConfigError(
                "population.min_samples moves samples between the clients of a partition: it needs partitioner "
                "iid, dirichlet, shards or size_skew, and samples_per_client=0"
            )


def make_population(task: Task, config: PopulationConfig, seed: int = 0) -> Population:
    """Return the configured population; raises ConfigError or TaskError.

    `seed` is the job's seed, which also seeds the task's loader.
    """
    if config.partitioner == "task":
        return TaskPopulation(task, config.clients or DEFAULT_CLIENTS, config.data, seed=seed)
    refuse_unknown_options(task, config.data)
    everything = train_samples(task, config.data, seed=seed)
    if config.partitioner == "natural":
        return _natural(everything, config)
    names = Names(config.clients or DEFAULT_CLIENTS)
    cut = Cut(
        clients=len(names),
        seed=config.seed,
        alpha=config.alpha,
        shards_per_client=config.shards_per_client,
        samples_per_client=config.samples_per_client,
    )
    labels = _labels(everything, config.partitioner)
    held_out = HeldOut(
        lambda: eval_samples(task, config.data, seed=seed), partial(_labels, partitioner=config.partitioner), labels,
        config.seed,
    )  # fmt: skip
    if config.samples_per_client:
        return PartedPopulation(everything, names, shared(config.partitioner, labels, cut), held_out)
    owner = owners(config.partitioner, labels, cut)
    if config.min_samples:
        owner = filled(owner, cut.clients, config.min_samples)
    return PartedPopulation(everything, names, Disjoint(owner, cut.clients, config.seed), held_out)


def samples_of(population: Population, client: str, seed: int) -> SampleSet:
    """Return a client's samples; raises TaskError if it has none, or must not be tried again.

    A user's own population may draw random numbers: the states are seeded by the job's seed and the client.
    """
    turn_of(client)
    if isinstance(population, TaskPopulation | PartedPopulation):
        return population.samples(client)  # seeds the loader itself
    with seeded(data_seed(seed, client)):
        return population.samples(client)


class PartedPopulation:
    """All samples, once in memory, and a partition of them."""

    def __init__(
        self, everything: SampleSet, names: Sequence[str], partition: Partition, held_out: HeldOut | None = None
    ) -> None:
        self.everything = everything
        self._names = names
        self._partition = partition
        self._held_out = held_out

    def names(self) -> Sequence[str]:
        return self._names

    def indices(self, client: str) -> Indices:
        """Return the positions of a client's samples in `everything`; empty for a client without any."""
        return self._partition.indices(self._names.index(client))

    def samples(self, client: str) -> SampleSet:
        import torch

        indices = self.indices(client)
        if len(indices) == 0:
            raise TaskError(
                f"client {client!r} has no data: the partition gave it none of {len(self.everything)} samples"
            )
        return self.everything.chosen(torch.from_numpy(indices).to(self.everything.device))

    def eval_samples(self, client: str) -> SampleSet:
        """Return held-out samples with the labels of the client's own ones (see `HeldOut`)."""
        if self._held_out is None:
            raise TaskError(
                "population.partitioner='natural': population.ids has no ids for eval_data, so it cannot be split. Use "
                "partitioner='task', or rounds.evaluate_every=0"
            )
        return self._held_out.draw(self._names.index(client), self.indices(client))

    def num_samples(self, client: str) -> int:
        return self._partition.size(self._names.index(client))


def sizes_of(task: Task, population: Population, seed: int = 0) -> NumSamples:
    """Return a function that counts a client's samples, without loading them if possible.

    0 for a client without data: its `samples` says why. Always 1 if the task's own `fit` loads the data.
    """
    if isinstance(population, PartedPopulation):
        return population.num_samples
    if task.train_data is None:
        return lambda _client: 1

    @lru_cache(maxsize=KNOWN_SIZES)
    def count(client: str) -> int:
        try:
            return len(samples_of(population, client, seed))
        except TaskError:  # raised again, and reported, when the client is to train
            return 0

    return count


def _labels(everything: SampleSet, partitioner: str) -> Indices:
    """Return one label per sample, (N,); zeros if the partitioner does not use labels."""
    if partitioner not in BY_LABEL:
        return np.zeros(len(everything), np.int64)
    if not isinstance(everything, Samples):
        return _labels_of_dataset(everything, partitioner)
    if len(parts := leaves(everything.targets)) == 1:
        targets: Array = array_of(parts[0])
        if targets.ndim == 1 and targets.dtype.kind in "iub":
            return targets.astype(np.int64)
    raise ConfigError(
        f"population.partitioner={partitioner!r} needs one integer label per sample; the task's targets are "
        f"{described(everything.targets, TARGET)}. Use iid, size_skew, natural or task."
    )


def _labels_of_dataset(everything: SampleSet, partitioner: str) -> Indices:
    """Return the labels that a Dataset has as its `targets`, as torchvision's have: nothing else is read for them."""
    dataset = everything.source.dataset if isinstance(everything, DatasetSamples) else everything
    labels = getattr(dataset, "targets", None)
    seen = "has no attribute `targets`"
    if labels is not None:
        array = np.asarray(labels)
        if array.ndim == 1 and array.dtype.kind in "iub" and len(array) == len(everything):
            return array.astype(np.int64)
        seen = f"has `targets` of {array.dtype} and shape {list(array.shape)}"
    raise ConfigError(
        f"population.partitioner={partitioner!r} needs the label of each of the {len(everything)} samples, and the "
        f"{type(dataset).__name__} of train_data {seen}. Give it that attribute: one integer per sample, so that not "
        "all samples have to be read for their labels; or use iid, size_skew, natural or task."
    )


def _natural(everything: SampleSet, config: PopulationConfig) -> PartedPopulation:
    ids = _read_ids(Path(config.ids))
    if len(ids) != len(everything):
        raise ConfigError(
            f"population.ids: {config.ids} has {len(ids)} ids for {len(everything)} samples; expected one per sample"
        )
    names = KnownNames(ids)
    if config.clients > len(names):
        raise ConfigError(f"population.clients={config.clients}, but {config.ids} names {len(names)} clients")
    owner = np.array([names.index(name) for name in ids], np.int64)
    kept = names[: config.clients or len(names)]
    return PartedPopulation(everything, KnownNames(kept), Disjoint(owner, len(names), config.seed))


def _read_ids(file: Path) -> list[str]:
    try:
        if file.suffix == ".npy":
            return [str(one) for one in np.load(file, allow_pickle=False).reshape(-1).tolist()]
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, EOFError) as cause:
        raise ConfigError(f"population.ids: cannot read {file}: {cause}") from cause
