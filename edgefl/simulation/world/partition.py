"""Partitions: how the samples of one data set are distributed to the clients of a simulation.

Two modes, by `samples_per_client`:

- 0: a *partition*. Each sample belongs to exactly one client. One pass over the labels at the start;
  memory is two integers per sample and one per client; a client's samples are a slice. It cannot have more
  clients than samples.
- above 0: *shared*. Each client draws its samples on demand, seeded by (seed, client):
  a million clients over fifty thousand samples cost nothing before they are sampled. Clients overlap.

Written in numpy: flwr-datasets' partitioners assign every client up front with Hugging Face
`datasets`, and require some thirty packages (pandas, pyarrow, matplotlib, seaborn, aiohttp).
Dirichlet: Hsu et al. 2019, "Measuring the effects of non-identical data distribution". Shards:
McMahan et al. 2017, section 3.
Invariant: a client's indices depend only on (seed, client, the labels).
"""

# Shapes: N = samples, C = clients.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgefl.errors import ConfigError
from edgefl.simulation.world.draws import Indices, stream_key


class Partition(Protocol):
    """Which samples are a client's."""

    def indices(self, client: int) -> Indices:
        """Return the positions of a client's samples; empty for a client without data."""

    def size(self, client: int) -> int:
        """Return the number of a client's samples, as cheaply as possible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The arguments of a partitioner."""

    clients: int
    seed: int
    alpha: float
    shards_per_client: int
    samples_per_client: int


class Disjoint:
    """Each sample has one owner."""

    def __init__(self, owner_n: Indices, clients: int, seed: int) -> None:
        mixed = np.random.default_rng(stream_key(seed, "order")).permutation(len(owner_n))
        self._order_n = mixed[np.argsort(owner_n[mixed], kind="stable")]  # random order within a client
        self._ends_c = np.cumsum(np.bincount(owner_n, minlength=clients))

    def indices(self, client: int) -> Indices:
        return self._order_n[self._start(client) : self._ends_c[client]]

    def size(self, client: int) -> int:
        return int(self._ends_c[client]) - self._start(client)

    def _start(self, client: int) -> int:
        return int(self._ends_c[client - 1]) if client else 0


class Shared:
    """Each client draws its own samples, on demand."""

    def __init__(
        self, draw: Callable[[np.random.Generator, int], Indices], size: Callable[[int], int], seed: int
    ) -> None:
        self._draw, self._size, self._seed = draw, size, seed

    def indices(self, client: int) -> Indices:
        return self._draw(np.random.default_rng(stream_key(self._seed, "samples", client)), self._size(client))

    def size(self, client: int) -> int:
        return self._size(client)


def owners(partitioner: str, labels_n: Indices, cut: Cut) -> Indices:
    """Return the owner of each sample, (N,); raises ConfigError if there are more clients than samples."""
    if cut.clients > len(labels_n):
        raise ConfigError(
            f"population.clients={cut.clients} is above the {len(labels_n)} samples. "
            "Set population.samples_per_client to let clients share samples, or ask for fewer clients."
        )
    return _OWNERS[partitioner](np.random.default_rng(stream_key(cut.seed, partitioner)), labels_n, cut)


def shared(partitioner: str, labels_n: Indices, cut: Cut) -> Shared:
    """Return a partition in which each client draws `samples_per_client` samples of its own."""
    return _SHARED[partitioner](labels_n, cut)


def filled(owner_n: Indices, clients: int, min_samples: int) -> Indices:
    """Return the owners after clients with the most samples gave to those below `min_samples`."""
    if min_samples * clients > len(owner_n):
        raise ConfigError(
            f"population.min_samples={min_samples} for {clients} clients needs {min_samples * clients} samples; "
            f"there are {len(owner_n)}"
        )
    counts_c = np.bincount(owner_n, minlength=clients)
    wanted = np.repeat(np.arange(clients), np.maximum(min_samples - counts_c, 0))
    by_size_n = np.lexsort((owner_n, -counts_c[owner_n]))  # samples, those of the client with the most first
    ranks_n = np.empty_like(owner_n)  # rank of a sample among its owner's samples
    in_turn_n = np.argsort(owner_n, kind="stable")
    ranks_n[in_turn_n] = np.arange(len(owner_n)) - (np.cumsum(counts_c) - counts_c)[owner_n[in_turn_n]]
    spare = by_size_n[ranks_n[by_size_n] >= min_samples]
    given_n = owner_n.copy()
    given_n[spare[: len(wanted)]] = wanted
    return given_n


def _dealt(rng: np.random.Generator, num_samples: int, clients: int) -> Indices:
    """Distribute positions evenly, in random order: sizes differ by at most one."""
    return rng.permutation(np.arange(num_samples) % clients)


def _iid_owners(rng: np.random.Generator, labels_n: Indices, cut: Cut) -> Indices:
    return _dealt(rng, len(labels_n), cut.clients)


def _dirichlet_owners(rng: np.random.Generator, labels_n: Indices, cut: Cut) -> Indices:
    """For each label, split its samples by fractions per client ~ Dir(alpha)."""
    owner_n = np.empty(len(labels_n), np.int64)
    for label in np.unique(labels_n):
        members = rng.permutation(np.flatnonzero(labels_n == label))
        shares_c = _dirichlet(rng, np.full(cut.clients, cut.alpha))
        ends_c = np.rint(np.cumsum(shares_c) * len(members)).astype(np.int64)
        ends_c[-1] = len(members)  # exact, whatever the rounding of the sum
        owner_n[members] = np.searchsorted(ends_c, np.arange(len(members)), side="right")
    return owner_n


def _shard_owners(rng: np.random.Generator, labels_n: Indices, cut: Cut) -> Indices:
    """Sort by label, split into equal shards, give `shards_per_client` to each client."""
    num_shards = cut.clients * cut.shards_per_client
    if num_shards > len(labels_n):
        raise ConfigError(
            f"population.shards_per_client={cut.shards_per_client} for {cut.clients} clients makes {num_shards} shards "
            f"of {len(labels_n)} samples; ask for fewer, or set population.samples_per_client"
        )
    client_of_shard = _dealt(rng, num_shards, cut.clients)
    owner_n = np.empty(len(labels_n), np.int64)
    owner_n[np.argsort(labels_n, kind="stable")] = client_of_shard[
        np.arange(len(labels_n)) * num_shards // len(labels_n)
    ]
    return owner_n


def _skewed_owners(rng: np.random.Generator, labels_n: Indices, cut: Cut) -> Indices:
    """Sizes ~ Dir(alpha) over the clients, with random samples."""
    shares_c = _dirichlet(rng, np.full(cut.clients, cut.alpha))
    ends_c = np.rint(np.cumsum(shares_c) * len(labels_n)).astype(np.int64)
    ends_c[-1] = len(labels_n)
    return rng.permutation(np.searchsorted(ends_c, np.arange(len(labels_n)), side="right"))


def _dirichlet(rng: np.random.Generator, alphas: np.ndarray) -> np.ndarray:
    """Draw fractions; if alpha is so small that all gammas underflow, one client gets all."""
    gammas: np.ndarray = rng.standard_gamma(alphas)
    total = gammas.sum()
    if total > 0:
        return np.asarray(gammas / total)
    return np.asarray(rng.multinomial(1, np.full(len(alphas), 1 / len(alphas))).astype(np.float64))


def _share_iid(labels_n: Indices, cut: Cut) -> Shared:
    num_samples = len(labels_n)
    return Shared(lambda rng, size: _distinct(rng, num_samples, size), lambda _client: cut.samples_per_client, cut.seed)


def _share_dirichlet(labels_n: Indices, cut: Cut) -> Shared:
    """Each client draws by its own label distribution ~ Dir(alpha * prior * labels)."""
    members = [np.flatnonzero(labels_n == label) for label in np.unique(labels_n)]
    prior = np.array([len(own) for own in members]) / len(labels_n)

    def draw(rng: np.random.Generator, size: int) -> Indices:
        counts = rng.multinomial(size, _dirichlet(rng, cut.alpha * prior * len(prior)))
        drawn = [own[_distinct(rng, len(own), count)] for own, count in zip(members, counts.tolist(), strict=True)]
        return rng.permutation(np.concatenate(drawn))

    return Shared(draw, lambda _client: cut.samples_per_client, cut.seed)


def _share_shards(labels_n: Indices, cut: Cut) -> Shared:
    """Each client takes `shards_per_client` runs, from random places in the samples sorted by label."""
    sorted_n = np.argsort(labels_n, kind="stable")

    def draw(rng: np.random.Generator, size: int) -> Indices:
        starts = rng.integers(len(sorted_n), size=cut.shards_per_client)
        lengths = [len(part) for part in np.array_split(np.empty(size, np.int8), cut.shards_per_client)]
        runs = [start + np.arange(length) for start, length in zip(starts.tolist(), lengths, strict=True)]
        return rng.permutation(sorted_n[np.concatenate(runs) % len(sorted_n)])

    return Shared(draw, lambda _client: cut.samples_per_client, cut.seed)


def _share_skewed(labels_n: Indices, cut: Cut) -> Shared:
    """Sizes ~ Gamma(alpha) with mean `samples_per_client`, at least one."""
    num_samples = len(labels_n)

    def size(client: int) -> int:
        rng = np.random.default_rng(stream_key(cut.seed, "size", client))
        return max(1, round(rng.standard_gamma(cut.alpha) / cut.alpha * cut.samples_per_client))

    return Shared(lambda rng, count: _distinct(rng, num_samples, count), size, cut.seed)


def _distinct(rng: np.random.Generator, num_samples: int, count: int) -> Indices:
    """Draw without repetition while there are enough samples; then start again with all."""
    rounds, rest = divmod(count, num_samples)
    drawn = [np.tile(np.arange(num_samples), rounds), rng.choice(num_samples, rest, replace=False)]
    return np.concatenate(drawn)


_OWNERS: Mapping[str, Callable[[np.random.Generator, Indices, Cut], Indices]] = {
    "iid": _iid_owners,
    "dirichlet": _dirichlet_owners,
    "shards": _shard_owners,
    "size_skew": _skewed_owners,
}
_SHARED: Mapping[str, Callable[[Indices, Cut], Shared]] = {
    "iid": _share_iid,
    "dirichlet": _share_dirichlet,
    "shards": _share_shards,
    "size_skew": _share_skewed,
}
