"""Every rule of the table keeps the seam: it says what it can do, folds, and keeps shapes and dtypes."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.aggregation import RULES, make_rule, rule_kind
from edgefl.aggregation.rule import Merging
from edgefl.testing import make_update

LIKE = {"w": np.zeros((2, 2), np.float32), "n": np.zeros((), np.int64)}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_can_do(name: str) -> None:
    kind, rule = rule_kind(name), make_rule(name, LIKE)
    assert isinstance(kind.streams, bool)
    assert isinstance(kind.merges, bool)
    assert isinstance(rule, Merging) == kind.merges  # it has the sum so far for the tier above


@pytest.mark.parametrize("name", RULES)
def test_equal_updates_give_that_update_in_shape_and_dtype(name: str) -> None:
    rule = make_rule(name, LIKE)
    tree = {"w": np.full((2, 2), 0.5, np.float32), "n": np.array(3, np.int64)}
    for device in "abcde":
        rule.add(make_update(device, **tree))
    for key, array in rule.result().items():
        assert (array.dtype, array.shape) == (tree[key].dtype, tree[key].shape)
        assert np.array_equal(array, tree[key])
