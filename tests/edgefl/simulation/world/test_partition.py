"""Partitions: complete, disjoint, skewed as told, the same again, and cheap for a million."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.world.partition import Cut, Disjoint, Partition, filled, owners, shared

LABELS = np.random.default_rng(0).integers(10, size=6000)
CUT = Cut(clients=20, seed=1, alpha=0.5, shards_per_client=2, samples_per_client=0)
SHARED = replace(CUT, samples_per_client=300)
PARTITIONERS = ("iid", "dirichlet", "shards", "size_skew")


def disjoint(partitioner: str, cut: Cut = CUT) -> Disjoint:
    return Disjoint(owners(partitioner, LABELS, cut), cut.clients, cut.seed)


def skew(partition: Partition, clients: int = 20) -> float:
    """Mean distance of the clients' label shares from the whole's: 0 for equal, 0.9 for one label each."""
    whole = np.bincount(LABELS, minlength=10) / len(LABELS)
    shares = [np.bincount(LABELS[partition.indices(client)], minlength=10) for client in range(clients)]
    return float(np.mean([abs(own / own.sum() - whole).sum() / 2 for own in shares if own.sum()]))


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_every_sample_has_one_owner(partitioner: str) -> None:
    partition = disjoint(partitioner)
    held = [partition.indices(client) for client in range(20)]
    assert sorted(np.concatenate(held).tolist()) == list(range(6000))
    assert [partition.size(client) for client in range(20)] == [len(own) for own in held]


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("cut", [CUT, SHARED])
def test_the_same_seed_gives_the_same(partitioner: str, cut: Cut) -> None:
    def drawn(cut: Cut) -> list[int]:
        one = shared(partitioner, LABELS, cut) if cut.samples_per_client else disjoint(partitioner, cut)
        assert one.size(7) == len(one.indices(7))
        return one.indices(7).tolist()

    assert drawn(cut) == drawn(cut)
    assert drawn(cut) != drawn(replace(cut, seed=2))


def test_iid_deals_evenly_and_shards_give_few_labels() -> None:
    assert {disjoint("iid").size(client) for client in range(20)} == {300}
    shards = disjoint("shards")
    assert all(len(np.unique(LABELS[shards.indices(client)])) <= 4 for client in range(20))  # 2 runs of 2 at most
    assert skew(disjoint("iid")) < 0.1
    assert skew(shards) > 0.6


@pytest.mark.parametrize("cut", [CUT, SHARED])
def test_a_larger_alpha_makes_labels_alike(cut: Cut) -> None:
    def at(alpha: float) -> float:
        told = replace(cut, alpha=alpha)
        return skew(shared("dirichlet", LABELS, told) if cut.samples_per_client else disjoint("dirichlet", told))

    assert at(0.05) > at(0.5) > at(5) > at(500)
    assert at(500) < 0.1
    assert at(0.05) > 0.6
    assert at(1e-300) <= 0.9 + 0.05  # all the gammas underflow: one takes all


def test_a_smaller_alpha_makes_sizes_unlike() -> None:
    def spread(alpha: float, cut: Cut) -> float:
        told = replace(cut, alpha=alpha)
        one = shared("size_skew", LABELS, told) if cut.samples_per_client else disjoint("size_skew", told)
        sizes = np.array([one.size(client) for client in range(20)])
        assert skew(one) < 0.3  # sizes, not labels
        return float(sizes.std() / sizes.mean())

    for cut in (CUT, SHARED):
        assert spread(1.0, cut) > spread(100.0, cut)
        assert spread(10_000.0, cut) < 0.05


def test_shared_clients_draw_as_many_as_told_without_repeats() -> None:
    for partitioner in ("iid", "dirichlet", "shards"):
        drawn = shared(partitioner, LABELS, SHARED).indices(3)
        assert len(drawn) == 300
        assert partitioner != "iid" or len(set(drawn.tolist())) == 300
    assert len(shared("iid", LABELS[:7], replace(CUT, samples_per_client=20)).indices(0)) == 20  # all, and again


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_a_million_clients_cost_what_a_thousand_do(partitioner: str) -> None:
    def seconds(clients: int) -> float:
        start = time.perf_counter()
        one = shared(partitioner, LABELS, replace(SHARED, clients=clients))
        for client in range(0, clients, clients // 100):
            one.indices(client)
        return time.perf_counter() - start

    few, many = (min(seconds(clients) for _ in range(3)) for clients in (1000, 1_000_000))
    assert many < 3 * few + 0.02  # a pass over the clients would be a thousand times


def test_those_with_most_give_to_those_below_the_least() -> None:
    owner = np.array([0] * 8 + [1] * 3 + [2])
    given = filled(owner, 4, 3)
    assert np.bincount(given).tolist() == [3, 3, 3, 3]
    assert owner.tolist() == [0] * 8 + [1] * 3 + [2]
    skewed = owners("dirichlet", LABELS, replace(CUT, alpha=0.02))
    assert np.bincount(skewed, minlength=20).min() < 50 <= np.bincount(filled(skewed, 20, 50)).min()


@pytest.mark.parametrize(
    ("cut", "partitioner", "fault"),
    [
        (replace(CUT, clients=6001), "iid", "clients=6001 is above the 6000 samples.*samples_per_client"),
        (replace(CUT, shards_per_client=301), "shards", "6020 shards of 6000 samples"),
    ],
)
def test_what_cannot_be_parted_is_refused(cut: Cut, partitioner: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        owners(partitioner, LABELS, cut)


def test_more_asked_than_there_is() -> None:
    with pytest.raises(ConfigError, match="needs 40 samples; there are 12"):
        filled(np.zeros(12, np.int64), 4, 10)
