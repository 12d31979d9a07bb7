"""Regional rounds: by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from edgefl.aggregation.regional import change, regional_round, regional_step


def test_the_devices_rounds_are_numbered_on_through_all_regional_rounds() -> None:
    assert [regional_round(number, one, 3) for number in (1, 2) for one in range(3)] == [1, 2, 3, 4, 5, 6]
    assert [regional_round(number, 0, 1) for number in (1, 2, 3)] == [1, 2, 3]


def test_a_step_adds_the_mean_change() -> None:
    stepped = regional_step({"w": np.array([1.0, 2.0], np.float32)}, {"w": np.array([0.5, -1.0], np.float32)})
    assert stepped["w"].tolist() == [1.5, 1.0]
    assert stepped["w"].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, ml_dtypes.bfloat16])
def test_the_change_is_in_float64_whatever_the_dtype(dtype: type) -> None:
    first, last = {"w": np.array(3, dtype)}, {"w": np.array(5, dtype)}
    found = change(first, last)["w"]
    assert (found.item(), found.dtype, found.shape) == (2.0, np.float64, ())
