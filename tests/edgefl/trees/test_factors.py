"""Matrices that are stored as two factors: what users of a tree see, what its bytes are, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edgefl.errors import ProtocolError
from edgefl.trees import (
    Array,
    BlockTree,
    EncodedTree,
    Factors,
    SpooledTree,
    encoded,
    encoded_bytes,
    factors_of,
    spec_of,
    whole_bytes,
    write_tree,
)
from edgefl.trees.factors import are_smaller, stacked
from edgefl.trees.frozen import whole
from edgefl.trees.scratch import in_memory, settled
from edgefl.trees.views import joined, renamed
from tests.edgefl.trees.forms import written

B = np.array([[1, 2], [3, 4], [5, 6]], np.float32)  # (3, 2)
A = np.array([[1, 0, 2, 0], [0, 1, 0, 3]], np.float32)  # (2, 4)
PRODUCT = [[1, 2, 2, 6], [3, 4, 6, 12], [5, 6, 10, 18]]


def stored(**others: Array) -> dict[str, Array]:
    return {"head": np.ones(2, np.float32), "up@lora_B": B, "up@lora_A": A, **others}


def test_a_tree_shows_the_product_and_stores_the_factors(tmp_path: Path) -> None:
    for tree in (EncodedTree(stored()), written(EncodedTree(stored()), tmp_path / "tree")):
        assert list(tree) == ["head", "up@lora"]
        assert str(spec_of(tree)["up@lora"]) == "float32[3, 4]"
        assert tree["up@lora"].tolist() == PRODUCT
        assert tree["head"].tolist() == [1, 1]
        assert sorted(encoded(tree)) == ["head", "up@lora_A", "up@lora_B"]
        pair = factors_of(tree, "up@lora")
        assert pair is not None
        assert pair.rank == 2
        assert factors_of(tree, "head") is None


def test_any_block_of_the_product_is_that_of_the_whole() -> None:
    whole_product = np.array(PRODUCT, np.float32).reshape(-1)
    tree = EncodedTree(stored())
    for start in range(12):
        for stop in range(start, 13):
            assert tree.read("up@lora", slice(start, stop)).tolist() == whole_product[start:stop].tolist()


def test_the_size_is_that_of_the_factors() -> None:
    file = io.BytesIO()
    tree = EncodedTree({"w@lora_B": np.zeros((64, 2), np.float32), "w@lora_A": np.zeros((2, 64), np.float32)})
    write_tree(tree, file)
    assert encoded_bytes(tree) == len(file.getvalue())
    assert whole_bytes(tree) > 64 * 64 * 4 > 4 * encoded_bytes(tree) > 4 * 4 * 64 * 4


def test_rank_0_is_a_matrix_of_zeros(tmp_path: Path) -> None:
    nothing = {"w@lora_B": np.zeros((3, 0), np.float32), "w@lora_A": np.zeros((0, 4), np.float32)}
    tree = written(EncodedTree(nothing), tmp_path / "tree")
    assert tree["w@lora"].tolist() == [[0.0] * 4] * 3
    assert tree.read("w@lora", slice(1, 5)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("left", "right", "whole_dtype"),
    [(np.float16, np.float16, "float32"), (np.float32, ml_dtypes.bfloat16, "float32"),
     (np.float64, np.float32, "float64")],
)  # fmt: skip
def test_the_product_is_of_32_bits_or_more(left: type, right: type, whole_dtype: str) -> None:
    tree = EncodedTree({"w@lora_B": B.astype(left), "w@lora_A": A.astype(right)})
    assert spec_of(tree)["w@lora"].dtype.name == tree["w@lora"].dtype.name == whole_dtype
    assert tree["w@lora"].tolist() == PRODUCT


def test_stacked_factors_are_the_sum_of_the_products() -> None:
    other = Factors(np.array([[1], [0], [2]], np.float32), np.array([[1, 1, 0, 0]], np.float32))
    both = stacked([Factors(B, A), other.scaled(2.0, np.dtype(np.float32))])
    assert both.rank == 3
    assert both.product().tolist() == [[3, 4, 2, 6], [3, 4, 6, 12], [9, 10, 10, 18]]


def test_which_form_is_smaller() -> None:
    assert are_smaller(31, (64, 64))
    assert not are_smaller(32, (64, 64))
    assert not are_smaller(0, (0, 5))


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"w@lora_B": B}, "'w@lora' is there as one factor only"),
        ({"w@lora_A": A}, "'w@lora' is there as one factor only"),
        ({"w@lora_B": B, "w@lora_A": A, "w@lora": B}, "'w@lora' is there both whole and as a factor"),
        (
            {"w@lora_B": B, "w@lora_A": A[:1]},
            r"'w@lora' are float32\[3, 2\] and float32\[1, 4\]; expected \(rows, rank",
        ),
        ({"w@lora_B": B.reshape(-1), "w@lora_A": A}, r"'w@lora' are float32\[6\]"),
        ({"w@lora_B": B.astype(np.int32), "w@lora_A": A}, "'w@lora' are int32.*expected floating point"),
    ],
)
def test_no_pair_of_factors_is_refused_by_name(tensors: dict[str, Array], fault: str, tmp_path: Path) -> None:
    with (tmp_path / "tree").open("wb") as file:
        write_tree(tensors, file)
    with pytest.raises(ProtocolError, match=fault):
        SpooledTree(tmp_path / "tree")


def test_views_keep_factors(tmp_path: Path) -> None:
    tree = written(EncodedTree(stored()), tmp_path / "tree")
    more = joined({"body": np.zeros(1)}, tree)
    assert isinstance(more, BlockTree)
    assert set(more.factored) == {"up@lora"}
    assert more["up@lora"].tolist() == PRODUCT
    assert more["body"].tolist() == [0]
    prefixed = renamed(more, {"parameters/up@lora": "up@lora", "parameters/body": "body"})
    assert sorted(encoded(prefixed)) == ["parameters/body", "parameters/up@lora_A", "parameters/up@lora_B"]
    assert prefixed["parameters/up@lora"].tolist() == PRODUCT
    assert sorted(encoded(whole(tree, {"base": np.zeros(3)}))) == ["base", "head", "up@lora_A", "up@lora_B"]
    assert sorted(encoded(in_memory(tree))) == sorted(encoded(settled(tree))) == ["head", "up@lora_A", "up@lora_B"]


def test_a_later_tree_replaces_a_matrix_in_either_form() -> None:
    tree = EncodedTree(stored())
    replaced = joined(tree, {"up@lora": np.zeros((3, 4), np.float32)})
    assert sorted(encoded(replaced)) == ["head", "up@lora"]
    assert joined({"up@lora": np.zeros((3, 4), np.float32)}, tree)["up@lora"].tolist() == PRODUCT
