"""The comparison of regions with a flat fleet: what needs no processes."""

from __future__ import annotations

import numpy as np

from benchmarks import tiers


def test_the_difference_is_the_largest_of_all_tensors() -> None:
    first = {"a": np.zeros(2, np.float32), "b": np.ones((), np.float32), "empty": np.zeros(0, np.float32)}
    second = {"a": np.array([0, -0.5], np.float32), "b": np.array(1.25, np.float32), "empty": np.zeros(0, np.float32)}
    assert tiers._difference(first, second) == 0.5


def test_simulated_regions_are_exact_and_save_their_bytes() -> None:
    exact, saved = tiers._simulated(), tiers._bytes()
    assert exact.ours is not None
    assert exact.ours <= tiers.EXACT
    assert saved.ours is not None
    assert saved.theirs is not None
    assert saved.theirs / saved.ours >= 9
