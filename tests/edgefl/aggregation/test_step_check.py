"""Steps beyond what a dtype holds: by every integer dtype's own limits, and by floats that overflow."""

import numpy as np
import pytest

from edgefl.aggregation.step_check import integer_moves, refuse_unsound
from edgefl.config import TrainConfig
from edgefl.errors import StepFailed
from edgefl.records import Plan
from edgefl.trees import apply

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


def plan(parameters):
    return Plan(job="j", round=3, parameters=parameters, clients=("a",), train=TrainConfig(), deadline_s=1.0)


def step(dtype, old, by):
    parameters = {"n": np.array([0, old], dtype)}
    signed = np.dtype(dtype.__name__.removeprefix("u"))
    mean = {"n": np.array([0, by], signed).view(dtype)}
    new = {"n": apply(parameters["n"], mean["n"])}
    refuse_unsound(plan(parameters), integer_moves(mean), new)
    return int(new["n"][1])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_an_integer_reaches_its_limits_and_does_not_wrap_around(dtype):
    info = np.iinfo(dtype)
    for old, by in ((info.max - 1, 1), (info.min + 1, -1), (info.max, 0), (info.min, 0), (info.max, -1), (info.min, 1)):
        assert step(dtype, old, by) == old + by
    for old, by in ((info.max, 1), (info.min, -1), (info.max - 5, 6)):
        with pytest.raises(StepFailed, match=rf"round 3.*'n' is beyond the range of {info.dtype}: {old} moved by {by}"):
            step(dtype, old, by)


def test_by_law_a_step_is_refused_where_exact_arithmetic_leaves_the_range():
    rng = np.random.default_rng(7)
    for dtype in (np.int8, np.uint8):
        info = np.iinfo(dtype)
        for _ in range(300):
            old, by = int(rng.integers(info.min, info.max + 1)), int(rng.integers(-128, 128))
            if info.min <= old + by <= info.max:
                assert step(dtype, old, by) == old + by
            else:
                with pytest.raises(StepFailed):
                    step(dtype, old, by)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_must_stay_finite(dtype, value):
    old = {"w": np.zeros((2, 2), dtype), "b": np.zeros((), dtype)}
    refuse_unsound(plan(old), {}, old)
    with pytest.raises(StepFailed, match="'b' holds NaN or infinity"):
        refuse_unsound(plan(old), {}, old | {"b": np.array(value, dtype)})


def test_what_an_optimizer_says_of_itself_ends_the_round():
    old = {"w": np.zeros(2, np.float32)}
    with pytest.raises(StepFailed, match=r"0\.exp_avg_sq"):
        refuse_unsound(plan(old), {}, old, "tensor '0.exp_avg_sq' holds NaN or infinity")
