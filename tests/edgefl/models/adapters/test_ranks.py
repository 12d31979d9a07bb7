"""Adapters of a lower rank: the nearest matrices, with the error that is told."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.models.adapters.ranks import at_rank, factors_at
from edgefl.trees import EncodedTree, encoded


def of_rank(rank: int) -> EncodedTree:
    rng = np.random.default_rng(rank)
    return EncodedTree({
        "w@lora_B": rng.normal(size=(9, rank)).astype(np.float32),
        "w@lora_A": rng.normal(size=(rank, 7)).astype(np.float32), "head": np.ones(2, np.float32),
    })  # fmt: skip


def test_factors_that_are_there_are_kept() -> None:
    tree = of_rank(2)
    pair = factors_at(tree, "w@lora", 3)
    assert pair.left is encoded(tree)["w@lora_B"]
    near, error = at_rank(tree, 3)
    assert error < 1e-6  # the rounding of float32
    assert near["head"].tolist() == [1, 1]


@pytest.mark.parametrize("whole", [False, True])
def test_the_nearest_matrix_has_the_largest_singular_values(whole: bool) -> None:
    tree = of_rank(4)
    values = np.linalg.svd(tree["w@lora"].astype(np.float64), compute_uv=False)
    near, error = at_rank({name: tree[name] for name in tree} if whole else tree, 2)
    left = np.linalg.svd(near["w@lora"].astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(left[:3], [*values[:2], 0], atol=1e-5)
    assert error == pytest.approx(np.sqrt(np.square(values[2:]).sum() / np.square(values).sum()), rel=1e-4)


def test_a_matrix_of_zeros_has_rank_0() -> None:
    assert factors_at({"w@lora": np.zeros((3, 2), np.float32)}, "w@lora").rank == 0
    assert at_rank({"w@lora": np.zeros((3, 2), np.float32)}, 2)[1] == 0.0
