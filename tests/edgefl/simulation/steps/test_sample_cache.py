"""Samples side by side."""

import torch

from edgefl.simulation.steps.sample_cache import SampleCache
from edgefl.training.samples import Samples


def numbered(number, rows=3):
    return Samples(torch.full((rows, 2), float(number)), torch.full((rows,), number))


def test_what_is_kept_is_a_copy_of_equal_values_shapes_and_dtypes():
    cache, given = SampleCache(1 << 20, block_bytes=4096), numbered(1)
    kept = cache.put("a", given)
    cache.put("b", numbered(2))
    given.inputs.zero_()
    assert cache.get("a") is kept
    assert torch.equal(kept.inputs, numbered(1).inputs)
    assert (kept.targets.dtype, kept.targets.tolist()) == (torch.int64, [1, 1, 1])
    assert kept.inputs.data_ptr() % 64 == cache.get("b").targets.data_ptr() % 64
    assert cache.get("c") is None


def test_scalars_a_client_and_booleans_are_kept_too():
    kept = SampleCache(1 << 20).put("a", Samples(torch.tensor([[True], [False]]), torch.tensor([0.5, 1.5])))
    assert (kept.inputs.tolist(), kept.targets.tolist()) == ([[True], [False]], [0.5, 1.5])


def test_the_oldest_slab_is_forgotten_and_one_that_is_too_large_has_its_own():
    cache = SampleCache(512, block_bytes=256)  # two clients of 64 + 64 bytes a block
    for number in range(4):
        cache.put(f"client-{number}", numbered(number))
    assert cache.get("client-0") is not None
    cache.put("client-4", numbered(4))
    assert [cache.get(f"client-{number}") is None for number in range(5)] == [True, True, False, False, False]
    assert cache.get("client-3").targets.tolist() == [3, 3, 3]
    large = cache.put("large", numbered(9, rows=100))
    assert large.targets.tolist() == [9] * 100
    assert cache.get("client-4") is None
