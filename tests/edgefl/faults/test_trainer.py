"""A simulated update follows from device, round and parameters alone."""

from __future__ import annotations

import numpy as np

from edgefl.faults.fleet import first_parameters
from edgefl.faults.trainer import STEP, trained


def test_the_same_again_and_another_for_another_round_or_device():
    one, weight = trained("d1", 1, first_parameters(), "fedavg")
    again, same = trained("d1", 1, first_parameters(), "fedavg")
    assert weight == same
    assert all(np.array_equal(one[name], again[name]) for name in one)
    for device, number in (("d2", 1), ("d1", 2)):
        assert not np.array_equal(trained(device, number, first_parameters(), "fedavg")[0]["w"], one["w"])


def test_names_shapes_and_dtypes_are_those_of_the_parameters():
    first = first_parameters()
    update, _ = trained("d1", 1, first, "fedavg")
    assert {name: (one.shape, one.dtype) for name, one in update.items()} == {
        name: (one.shape, one.dtype) for name, one in first.items()
    }


def test_a_gradient_is_the_delta_with_the_other_sign_and_depends_on_the_parameters():
    first = first_parameters()
    delta, _ = trained("d1", 1, first, "fedavg")
    gradient, _ = trained("d1", 1, first, "fedsgd")
    assert np.array_equal(gradient["w"], -delta["w"])
    moved, _ = trained("d1", 1, {name: one + 1 for name, one in first.items()}, "fedavg")
    assert np.allclose(moved["w"], delta["w"] - STEP)
