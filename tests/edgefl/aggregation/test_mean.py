"""The weighted mean by hand, by law (order, tiers, dtypes) and by enemy (partial sums that lie)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edgefl.aggregation import WeightedMean, make_rule
from edgefl.errors import ConfigError, UpdateRejected
from edgefl.records import Partial, Update
from edgefl.testing import make_update
from edgefl.trees import BLOCK_ELEMENTS, Tree, apply, bfloat16


def mean_of(like: Tree, *updates: Update) -> Tree:
    rule = WeightedMean(like)
    for update in updates:
        rule.add(update)
    return rule.result()


def random_updates(count: int, seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        make_update(
            f"d{index}",
            weight=float(rng.integers(1, 1000)) / 7,
            w=rng.normal(size=(3, 5)).astype(np.float32),
            b=np.asarray(rng.normal(), np.float64),
        )
        for index in range(count)
    ]


LIKE = {"w": np.zeros((3, 5), np.float32), "b": np.zeros((), np.float64)}


def assert_close(seen: Tree, wanted: Tree) -> None:
    assert all(np.allclose(seen[name], wanted[name], rtol=1e-6, atol=1e-6) for name in wanted)


def test_mean_of_two_devices_by_hand() -> None:
    like = {"w": np.zeros(1, np.float32)}
    mean = mean_of(like, make_update("a", w=[2.0], weight=1), make_update("b", w=[5.0], weight=2))
    assert mean["w"].tolist() == [4.0]  # (1*2 + 2*5) / 3


def test_the_mean_of_one_is_itself_bit_for_bit() -> None:
    update = random_updates(1)[0]
    mean = mean_of(LIKE, update)
    assert all(np.array_equal(mean[name], update.tree[name]) for name in LIKE)


def test_order_does_not_matter() -> None:
    updates = random_updates(4)
    wanted = mean_of(LIKE, *updates)
    for order in itertools.permutations(updates):
        assert_close(mean_of(LIKE, *order), wanted)


def test_the_scale_of_weights_does_not_matter() -> None:
    updates = random_updates(5)
    scaled = [make_update(u.device, weight=u.weight * 1e6, **u.tree) for u in updates]
    assert_close(mean_of(LIKE, *scaled), mean_of(LIKE, *updates))


@pytest.mark.parametrize("split", [(0, 12), (1, 11), (4, 4, 4), (1, 2, 3, 6)])
def test_tiers_are_exact(split: tuple[int, ...]) -> None:
    updates = random_updates(12)
    flat, top, rest = WeightedMean(LIKE), WeightedMean(LIKE), iter(updates)
    for update in updates:
        flat.add(update)
    for size in split:
        region = WeightedMean(LIKE)
        for update in itertools.islice(rest, size):
            region.add(update)
        if size:
            top.merge(region.partial())
    assert_close(top.result(), flat.result())
    assert top.partial().weight == pytest.approx(flat.partial().weight, rel=1e-6)
    assert top.partial().contributors == flat.partial().contributors


def test_small_updates_are_not_lost_beside_large_ones() -> None:
    """float32 would lose every 1e-3 beside 1e6; the sum is float64."""
    like = {"w": np.zeros(1, np.float32)}
    updates = [make_update("big", w=[1e6]), make_update("minus", w=[-1e6])]
    updates += [make_update(f"d{index}", w=[1e-3]) for index in range(998)]
    assert mean_of(like, *updates)["w"][0] == pytest.approx(998e-6, rel=1e-5)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)])
def test_dtype_and_shape_are_kept(dtype: str, shape: tuple[int, ...]) -> None:
    like = {"w": np.zeros(shape, dtype)}
    mean = mean_of(like, make_update("a", w=np.ones(shape, dtype)), make_update("b", w=np.ones(shape, dtype)))
    assert isinstance(mean["w"], np.ndarray)
    assert (mean["w"].dtype, mean["w"].shape) == (np.dtype(dtype), shape)
    assert mean["w"].astype(float).sum() == mean["w"].size


@pytest.mark.parametrize(
    ("dtype", "values", "wanted"),
    [
        ("i8", [1, 2, 2], 2),  # 5/3 to nearest
        ("i8", [-1, -2, -2], -2),
        ("u1", [255, 255, 255], 255),  # a wrapped -1 stays -1
        ("u1", [2, 255, 2], 1),  # (2 - 1 + 2) / 3
        ("u8", [2**64 - 3, 1], 2**64 - 1),  # (-3 + 1) / 2
        ("?", [True, True, False], True),
        ("?", [True, False, False], False),
        ("?", [True, False], False),  # a tie leaves it as it was
    ],
)
def test_integers_and_booleans_by_hand(dtype: str, values: list[Any], wanted: Any) -> None:
    updates = [make_update(f"d{i}", w=np.array([value], dtype)) for i, value in enumerate(values)]
    assert mean_of({"w": np.zeros(1, dtype)}, *updates)["w"].tolist() == [wanted]


def test_tensors_of_more_than_one_block() -> None:
    size = 2 * BLOCK_ELEMENTS + 5
    ramp = np.arange(size, dtype=np.float32)
    mean = mean_of({"w": ramp}, make_update("a", w=ramp), make_update("b", w=3 * ramp))
    assert np.array_equal(mean["w"], 2 * ramp)


def test_the_sum_is_not_the_updates_memory() -> None:
    update = make_update("a", w=[1.0])
    mean_of({"w": np.zeros(1, np.float32)}, update, make_update("b", w=[5.0]))
    assert update.tree["w"].tolist() == [1.0]


# --- by enemy ---------------------------------------------------------------------------------------------------


def partial(*names: str, weight: float = 2.0, **total: Any) -> Partial:
    return Partial(total=total or {"w": np.full(2, 4.0), "v": np.zeros(1)}, weight=weight, contributors=names)


BAD = {
    "counted already": (partial("b", "a"), "already counted"),
    "twice in itself": (partial("c", "c"), "already counted"),
    "tensor missing": (partial("b", w=np.ones(2)), "tensors missing: v"),
    "tensor unknown": (partial("b", w=np.ones(2), v=np.ones(1), x=np.ones(1)), "tensors unknown: x"),
    "would broadcast": (partial("b", w=np.ones(1), v=np.ones(1)), "'w' is float64[1], not float64[2]"),
    "not in float64": (partial("b", w=np.ones(2, np.float32), v=np.ones(1)), "'w' is float32[2], not float64[2]"),
    "NaN": (partial("b", w=np.ones(2), v=np.array([np.nan])), "'v' holds NaN or infinity"),
    "weight 0": (partial("b", weight=0.0), "weight 0.0"),
    "weight NaN": (partial("b", weight=float("nan")), "weight nan"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_partial_sum_is_refused_and_leaves_no_trace(fault: str) -> None:
    bad, reason = BAD[fault]
    rule = WeightedMean({"w": np.zeros(2, np.float32), "v": np.zeros(1, np.float32)})
    rule.add(make_update("a", w=[1.0, 2.0], v=[3.0]))
    with pytest.raises(UpdateRejected) as refusal:
        rule.merge(bad)
    assert reason in refusal.value.reason
    assert {name: mean.tolist() for name, mean in rule.result().items()} == {"w": [1.0, 2.0], "v": [3.0]}
    assert (rule.partial().weight, rule.partial().contributors) == (1.0, ("a",))


def test_the_same_partial_sum_merges_once() -> None:
    rule = WeightedMean({"w": np.zeros(2, np.float32), "v": np.zeros(1, np.float32)})
    rule.merge(partial("b", "c"))
    with pytest.raises(UpdateRejected, match="already counted"):
        rule.merge(partial("b", "c"))
    assert rule.result()["w"].tolist() == [2.0, 2.0]


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"aggregation\.rule='x' is not one of: mean"):
        make_rule("x", LIKE)


def test_bfloat16_is_summed_in_float64_and_rounded_once() -> None:
    like = {"w": np.zeros(2, bfloat16()), "s": np.zeros((), bfloat16())}
    updates = [
        make_update(name, weight=1.0, w=np.array([value, -value], bfloat16()), s=np.array(value, bfloat16()))
        for name, value in (("a", 256.0), ("b", 1.0), ("c", 1.0))  # 256 + 1 is 256 in bfloat16
    ]
    mean = mean_of(like, *updates)
    assert (mean["w"].dtype, mean["s"].shape) == (bfloat16(), ())
    assert mean["w"].astype(float).tolist() == [86.0, -86.0]
    assert float(mean["s"]) == 86.0


def test_a_mask_that_nobody_changes_and_a_counter_far_beyond_2_to_the_53_stay_exact() -> None:
    like = {"mask": np.array([True, False]), "count": np.array(2**62 + 1)}
    updates = [make_update(name, weight=w, mask=np.zeros(2, bool), count=np.array(n)) for name, w, n in
               (("a", 3.0, 7), ("b", 0.1, 7))]  # fmt: skip
    mean = mean_of(like, *updates)
    assert apply(like["mask"], mean["mask"]).tolist() == [True, False]
    assert int(apply(like["count"], mean["count"])) == 2**62 + 8
