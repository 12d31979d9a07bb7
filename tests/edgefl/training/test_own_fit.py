"""A task's own fit: all tensors go in, an update of those that are trained comes out."""

import numpy as np
import pytest

from edgefl import FitResult, Task
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.training.own_fit import fit_of

MOVING, FROZEN = {"b": np.zeros(1)}, {"a": np.full(1, 5.0)}


def task(fit):
    return Task(name="own", initial=lambda: {**FROZEN, **MOVING}, fit=fit, trained=["b"])


def test_fit_sees_every_tensor_and_returns_what_is_trained():
    def fit(tree, _config, _options):
        return FitResult(tree={"b": tree["a"] - tree["b"]}, weight=2)

    result = fit_of(task(fit), MOVING, TrainConfig(), {}, FROZEN)
    assert (result.tree["b"].tolist(), result.weight) == ([5.0], 2.0)


def test_a_frozen_tensor_in_the_update_is_refused_by_name():
    with pytest.raises(TaskError, match="cannot be an update: tensors unknown: a"):
        fit_of(task(lambda tree, *_: FitResult(tree=tree, weight=1)), MOVING, TrainConfig(), {}, FROZEN)


def test_what_arithmetic_makes_of_arrays_without_dimensions_is_taken_for_the_array():
    like = {"b": np.array(2.0, np.float32)}
    result = fit_of(
        task(lambda tree, *_: FitResult(tree={"b": tree["b"] * 2 - tree["b"]}, weight=1)), like, TrainConfig(), {}, None
    )
    assert isinstance(result.tree["b"], np.ndarray)
    assert (result.tree["b"].shape, result.tree["b"].dtype, float(result.tree["b"])) == ((), np.float32, 2.0)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("c16", r"fit's 'b' is complex128\[1\]: complex numbers cannot be sent"),
        ("O", "can be sent; convert it to one of them"),
    ],
)
def test_a_dtype_that_the_wire_does_not_carry_is_refused_by_name(dtype, said):
    with pytest.raises(TaskError, match=said):
        fit_of(task(lambda *_: FitResult(tree={"b": np.zeros(1, dtype)}, weight=1)), MOVING, TrainConfig(), {}, FROZEN)


def test_another_byte_order_is_turned():
    result = fit_of(
        task(lambda *_: FitResult(tree={"b": np.full(1, 3.0, ">f8")}, weight=1)), MOVING, TrainConfig(), {}, FROZEN
    )
    assert result.tree["b"].dtype == np.float64
    assert result.tree["b"].tolist() == [3.0]
