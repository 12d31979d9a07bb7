"""Guards: every kind of bad update is refused with a reason, and leaves nothing behind; so is a step too far."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgefl import trees
from edgefl.aggregation import WeightedMean
from edgefl.config import TrainConfig
from edgefl.errors import StepFailed, UpdateRejected
from edgefl.guards import MAX_WEIGHT, RoundGuard, integer_moves, not_finite_tree, refuse_unsound
from edgefl.protocols.messages import UpdateRefused, encode
from edgefl.records import Plan, Update
from edgefl.testing import make_update
from edgefl.trees import ComputedTree, SpooledTree, apply, bfloat16, spec_of, write_tree
from edgefl.trees.scratch import settled

PARAMETERS = {
    "w": np.zeros((2, 3), np.float32),
    "b": np.zeros(3, np.float64),
    "n": np.zeros((), np.int64),
}
PLAN = Plan(job="job", round=1, parameters=PARAMETERS, clients=("a", "b"), train=TrainConfig(), deadline_s=1.0)


def update(device: str = "a", **changes: Any) -> Update:
    tree = {"w": np.ones((2, 3), np.float32), "b": np.ones(3), "n": np.ones((), np.int64)}
    fields = {key: changes.pop(key) for key in ("weight", "job", "round", "metrics") if key in changes}
    return make_update(device, **fields, **{k: v for k, v in {**tree, **changes}.items() if v is not None})


def with_value(value: float, dtype: type) -> np.ndarray:
    array = np.ones(PARAMETERS["w"].shape if dtype is np.float32 else (3,), dtype)
    array.flat[-1] = value
    return array


BAD: dict[str, tuple[Update, str]] = {
    "NaN": (update(w=with_value(math.nan, np.float32)), "tensor 'w' holds NaN or infinity"),
    "infinity": (update(b=with_value(math.inf, np.float64)), "tensor 'b' holds NaN or infinity"),
    "minus infinity": (update(b=with_value(-math.inf, np.float64)), "tensor 'b' holds NaN or infinity"),
    "wrong shape": (update(w=np.ones((3, 2), np.float32)), "tensor 'w' is float32[3, 2], not float32[2, 3]"),
    "would broadcast": (update(w=np.ones(3, np.float32)), "tensor 'w' is float32[3], not float32[2, 3]"),
    "would broadcast too": (update(w=np.ones((1, 3), np.float32)), "is float32[1, 3], not float32[2, 3]"),
    "0-d for 1-d": (update(b=np.ones(())), "tensor 'b' is float64[], not float64[3]"),
    "1-d for 0-d": (update(n=np.ones(1, np.int64)), "tensor 'n' is int64[1], not int64[]"),
    "wrong dtype": (update(w=np.ones((2, 3))), "tensor 'w' is float64[2, 3], not float32[2, 3]"),
    "complex": (update(b=np.ones(3, complex)), "tensor 'b' is complex128[3], not float64[3]"),
    "objects": (update(b=np.array([1, 2, None])), "tensor 'b' is object[3]"),
    "tensor missing": (update(b=None), "tensors missing: b"),
    "tensor unknown": (update(c=[1.0]), "tensors unknown: c"),
    "no tensor": (make_update("a"), "tensors missing: b, n, w"),
    "weight 0": (update(weight=0.0), "weight 0.0 must be finite, above 0"),
    "weight -1": (update(weight=-1.0), "weight -1.0 must be"),
    "weight NaN": (update(weight=math.nan), "weight nan must be"),
    "weight infinite": (update(weight=math.inf), "weight inf must be"),
    "weight that would overflow": (update(weight=1e300), "weight 1e+300 must be"),
    "metric that would overflow": (
        update(metrics={"loss": -1e308}),
        "metric 'loss' is -1e+308, not a finite number of",
    ),
    "metric NaN": (update(metrics={"loss": math.nan}), "metric 'loss' is nan, not a finite number"),
    "earlier round": (update(round=0), "it is for round 0 of job 'job'; open is round 1 of 'job'"),
    "later round": (update(round=2), "it is for round 2 of job 'job'"),
    "another job": (update(job="other"), "it is for round 1 of job 'other'"),
    "not in the cohort": (update("z"), "the device is not in the cohort of round 1"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_updates_are_refused_by_device_and_reason(fault: str) -> None:
    bad, reason = BAD[fault]
    with pytest.raises(UpdateRejected) as refusal:
        RoundGuard(PLAN).admit(bad)
    assert reason in refusal.value.reason
    assert refusal.value.device == bad.device


@pytest.mark.parametrize("fault", BAD)
def test_a_refusal_leaves_the_guard_as_it_was(fault: str) -> None:
    guard = RoundGuard(PLAN)
    with pytest.raises(UpdateRejected):
        guard.admit(BAD[fault][0])
    guard.admit(update("a"))


@pytest.mark.parametrize("fault", BAD)
def test_a_refused_update_leaves_no_trace_in_the_sum(fault: str) -> None:
    """Elsewhere the first tensors of an update refused at its last one stay in the sum."""
    guard, rule = RoundGuard(PLAN), WeightedMean(PARAMETERS)
    for each in (update("b", weight=2.0), BAD[fault][0]):
        try:
            guard.admit(each)
        except UpdateRejected:
            continue
        rule.add(each)
    partial = rule.partial()
    assert (partial.contributors, partial.weight) == (("b",), 2.0)
    assert all(np.array_equal(total, np.full(total.shape, 2.0)) for total in partial.total.values())


def test_a_device_is_admitted_once() -> None:
    guard = RoundGuard(PLAN)
    guard.admit(update("a"))
    with pytest.raises(UpdateRejected, match="already admitted in round 1"):
        guard.admit(update("a"))
    guard.admit(update("b"))


def test_good_updates_of_every_kind_are_admitted() -> None:
    RoundGuard(PLAN).admit(update(weight=0.25, metrics={"loss": 0.0}))
    RoundGuard(PLAN).admit(update(weight=MAX_WEIGHT))


def test_nan_behind_the_first_block_is_found() -> None:
    plan = Plan(
        job="job", round=1, parameters={"w": np.zeros(1 << 18, np.float32)}, clients=("a",),
        train=TrainConfig(), deadline_s=1.0,
    )  # fmt: skip
    wide = np.zeros(1 << 18, np.float32)
    wide[-1] = np.nan
    with pytest.raises(UpdateRejected, match="NaN"):
        RoundGuard(plan).admit(make_update("a", w=wide))


def test_a_reason_does_not_repeat_an_enemy_at_length() -> None:
    names = {f"x{index}": [0.0] for index in range(10_000)}
    with pytest.raises(UpdateRejected) as refusal:
        RoundGuard(PLAN).admit(update(**names))
    assert len(refusal.value.reason) < 600


def test_a_reason_is_short_enough_to_be_told_whatever_the_model_and_the_update() -> None:
    large = {f"layer {n} of a deep model": np.zeros(1) for n in range(5000)}
    plan = Plan(job="j", round=1, parameters=large, clients=("a",), train=TrainConfig(), deadline_s=1.0)
    with pytest.raises(UpdateRejected) as refusal:
        RoundGuard(plan).admit(make_update("a", job="j"))
    assert len(encode(UpdateRefused(job="j", round=1, reason=refusal.value.reason))) < 2000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bfloat16_that_is_not_finite_is_refused(value: float) -> None:
    tree = {"w": np.array([1.0, value], bfloat16())}
    assert not_finite_tree(tree) == "tensor 'w' holds NaN or infinity"
    assert not_finite_tree({"w": np.array([1.0, 3e38], bfloat16())}) is None


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


def plan_of(parameters):
    return Plan(job="j", round=3, parameters=parameters, clients=("a",), train=TrainConfig(), deadline_s=1.0)


def step(dtype, old, by):
    parameters = {"n": np.array([0, old], dtype)}
    signed = np.dtype(dtype.__name__.removeprefix("u"))
    mean = {"n": np.array([0, by], signed).view(dtype)}
    new = {"n": apply(parameters["n"], mean["n"])}
    refuse_unsound(plan_of(parameters), integer_moves(mean), new)
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
    refuse_unsound(plan_of(old), {}, old)
    with pytest.raises(StepFailed, match="'b' holds NaN or infinity"):
        refuse_unsound(plan_of(old), {}, old | {"b": np.array(value, dtype)})


def test_what_an_optimizer_says_of_itself_ends_the_round():
    old = {"w": np.zeros(2, np.float32)}
    with pytest.raises(StepFailed, match=r"0\.exp_avg_sq"):
        refuse_unsound(plan_of(old), {}, old, "tensor '0.exp_avg_sq' holds NaN or infinity")


# --- by blocks --------------------------------------------------------------------------------------------------


def by_blocks(tree):
    return ComputedTree(spec_of(tree), lambda name, block: np.array(tree[name].reshape(-1)[block]))


def test_parameters_that_are_read_by_blocks_are_checked_when_they_are_read():
    old, mean = {"w": np.zeros(3, np.float32), "n": np.full(3, 120, np.int8)}, {"n": np.array([1, 2, 7], np.int8)}
    new = {"w": np.ones(3, np.float32), "n": apply(old["n"], mean["n"])}
    seen = refuse_unsound(plan_of(old), integer_moves(by_blocks(mean)), by_blocks(new))
    assert seen["n"].tolist() == [121, 122, 127]
    wrapped = refuse_unsound(
        plan_of(old), integer_moves(by_blocks({"n": np.array([1, 2, 8], np.int8)})),
        by_blocks({"n": np.array([121, 122, -128], np.int8)}),
    )  # fmt: skip
    assert wrapped.read("n", slice(0, 2)).tolist() == [121, 122]
    with pytest.raises(StepFailed, match=r"round 3.*'n' is beyond the range of int8: 120 moved by 8"):
        wrapped.read("n", slice(2, 3))
    with pytest.raises(StepFailed, match="'w' holds NaN or infinity"):
        settled(refuse_unsound(plan_of(old), {}, by_blocks({"w": np.array([0, np.inf], np.float32)})))


@pytest.mark.parametrize("at", [0, 70_000, 140_000])
def test_nan_anywhere_in_a_file_is_found(at, tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "LARGE_BYTES", 0)
    tree = {"b": np.zeros(3, np.float64), "w": np.zeros(140_001, np.float32)}
    tree["w"][at] = np.nan
    with (tmp_path / "tree").open("wb") as file:
        write_tree(tree, file)
    assert not_finite_tree(SpooledTree(tmp_path / "tree")) == "tensor 'w' holds NaN or infinity"
