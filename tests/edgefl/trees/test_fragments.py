"""Fragments by hand, and by law: each tensor is in one of them, and they are about equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError
from edgefl.trees import TensorSpec, spec_of
from edgefl.trees.fragments import changed_part, fragments_of, sent_part

TREE = {name: np.zeros(size, np.float32) for name, size in (("a", 4), ("b", 1), ("c", 3), ("d", 2), ("e", 4))}


def in_round(number: int, fragments: int = 3) -> TrainConfig:
    return TrainConfig(round=number, fragments=fragments)


def test_the_largest_goes_first_into_the_one_with_the_fewest_bytes() -> None:
    # a (4) -> 0, e (4) -> 1, c (3) -> 2, d (2) -> 2, b (1) -> 0
    assert fragments_of(spec_of(TREE), 3) == (("a", "b"), ("e",), ("c", "d"))
    assert fragments_of(spec_of(TREE), 1) == (tuple(TREE),)


def test_a_round_sends_the_next_one_and_receives_what_the_round_before_has_changed() -> None:
    assert [list(sent_part(TREE, in_round(number))) for number in (1, 2, 3, 4)] == [
        ["a", "b"], ["e"], ["c", "d"], ["a", "b"],
    ]  # fmt: skip
    assert [list(changed_part(TREE, in_round(number))) for number in (2, 3, 4)] == [["a", "b"], ["e"], ["c", "d"]]
    assert sent_part(TREE, in_round(7, fragments=1)) is TREE


def test_more_fragments_than_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"server.fragments=6: the model has 5 tensors"):
        fragments_of(spec_of(TREE), 6)


def test_a_part_without_tensors_is_one_fragment() -> None:
    assert fragments_of({}, 1) == ((),)  # all that a device has of a divided model may be frozen
    with pytest.raises(ConfigError, match=r"server.fragments=2: the model has 0 tensors"):
        fragments_of({}, 2)


def test_adapters_are_refused() -> None:
    tree = {**TREE, "up@lora": np.zeros((2, 2), np.float32)}
    assert fragments_of(spec_of(tree), 1) == (tuple(tree),)
    with pytest.raises(ConfigError, match=r"server.fragments=2: the model has LoRA adapters.*Leave server.fragments"):
        fragments_of(spec_of(tree), 2)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_each_tensor_is_in_one_fragment_and_none_is_much_larger(sizes: list[int], count: int) -> None:
    count = min(count, len(sizes))
    spec = {f"t{index}": TensorSpec((size,), np.dtype(np.float32)) for index, size in enumerate(sizes)}
    found = fragments_of(spec, count)
    assert sorted(name for one in found for name in one) == sorted(spec)
    assert all(found)
    loads = [sum(spec[name].num_bytes for name in one) for one in found]
    assert max(loads) <= sum(loads) / count + max(one.num_bytes for one in spec.values()) + len(sizes)
    shuffled = dict(sorted(spec.items(), reverse=True))
    assert [set(one) for one in fragments_of(shuffled, count)] == [set(one) for one in found]
