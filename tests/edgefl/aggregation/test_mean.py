"""The weighted mean by hand, by law (order, tiers, dtypes) and by enemy (partial sums that lie)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgefl import trees
from edgefl.aggregation import WeightedMean, make_rule
from edgefl.errors import ConfigError, UpdateRejected
from edgefl.records import Partial, Update
from edgefl.testing import make_update
from edgefl.trees import BLOCK_ELEMENTS, ComputedTree, SpooledTree, Tree, apply, bfloat16, write_tree


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


# --- large models -----------------------------------------------------------------------------------------------


EVERY = ["f8", "f4", "f2", "i8", "i4", "u8", "u1", "?"]


def of_every_dtype(count: int) -> list[Update]:
    rng = np.random.default_rng(5)
    return [
        make_update(
            f"d{index}",
            weight=float(rng.integers(1, 1000)) / 7,
            **{dtype: rng.normal(scale=9, size=(5, 11)).astype(np.int64).astype(dtype) for dtype in EVERY},
            b=rng.normal(size=97).astype(bfloat16()),
            w=rng.normal(size=300).astype(np.float32),
        )
        for index in range(count)
    ]


def in_files(updates: list[Update], folder: Path) -> list[Update]:
    """Return the updates as they are in the cloud: from files."""
    for update in updates:
        with (folder / update.device).open("wb") as file:
            write_tree(update.tree, file)
    return [dataclasses.replace(update, tree=SpooledTree(folder / update.device)) for update in updates]


def assert_same_bits(seen: Tree, wanted: Tree) -> None:
    assert list(seen) == list(wanted)
    for name, array in wanted.items():
        assert (seen[name].dtype, seen[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(seen[name], array), name


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
@pytest.mark.parametrize("spooled", [True, False])
def test_a_large_mean_has_the_bits_of_a_small_one_whatever_the_blocks(
    block: int, spooled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = of_every_dtype(4)
    like = {name: np.zeros_like(array) for name, array in updates[0].tree.items()}
    wanted = mean_of(like, *updates)
    monkeypatch.setattr(trees, "LARGE_BYTES", 100)
    monkeypatch.setattr(trees, "BLOCK_ELEMENTS", block)
    mean = mean_of(like, *(in_files(updates, tmp_path) if spooled else updates))
    assert isinstance(mean, ComputedTree)
    assert_same_bits(mean, wanted)
    assert_same_bits(mean, wanted)  # it can be read again


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("travels", [True, False])
def test_tiers_of_large_models_are_exact(
    large: bool, travels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = random_updates(12)
    wanted = mean_of(LIKE, *updates)
    monkeypatch.setattr(trees, "LARGE_BYTES", 1 if large else 1 << 20)
    top, files = WeightedMean(LIKE), in_files(updates, tmp_path)
    for first in range(0, 12, 4):
        region = WeightedMean(LIKE)
        for update in files[first : first + 4]:
            region.add(update)
        partial = region.partial_mean() if travels else region.partial()
        assert isinstance(partial.total, ComputedTree) == large
        assert partial.total["w"].dtype == (np.float32 if travels else np.float64)
        assert partial.total["b"].dtype == np.float64
        if large:  # as it arrives at the next tier
            with (tmp_path / f"region-{first}").open("wb") as file:
                write_tree(partial.total, file)
            partial = dataclasses.replace(partial, total=SpooledTree(tmp_path / f"region-{first}"))
        top.merge(partial)
    assert_close(top.result(), wanted)


@pytest.mark.parametrize("large", [True, False])
def test_integers_of_a_partial_mean_are_rounded_once_at_the_top(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 0 if large else 1 << 20)
    like, top = (
        {"n": np.zeros(1, np.int64), "m": np.zeros(1, bool)},
        WeightedMean({"n": np.zeros(1, np.int64), "m": np.zeros(1, bool)}),
    )
    for name, counts in (("r", (1, 2)), ("s", (2, 4))):  # means 1.5 and 3: of all four 2.25
        region = WeightedMean(like)
        for index, count in enumerate(counts):
            region.add(make_update(f"{name}{index}", n=np.array([count]), m=np.array([name == "r"])))
        top.merge(region.partial_mean())
    mean = top.result()
    assert (mean["n"].tolist(), mean["m"].tolist()) == ([2], [False])


def test_a_bad_partial_mean_is_refused() -> None:
    rule = WeightedMean({"w": np.zeros(2, np.float32)})
    wide = Partial(total={"w": np.ones(2)}, weight=1.0, contributors=("a",), is_mean=True)
    with pytest.raises(UpdateRejected, match=r"'w' is float64\[2\], not float32\[2\]"):
        rule.merge(wide)
    rule.merge(dataclasses.replace(wide, total={"w": np.full(2, 3.0, np.float32)}, weight=2.0))
    rule.merge(Partial(total={"w": np.full(2, 3.0)}, weight=1.0, contributors=("b",)))
    assert rule.result()["w"].tolist() == [3.0, 3.0]  # (2 * 3 + 3) / 3


def test_memory_does_not_grow_with_a_large_model(tmp_path: Path) -> None:
    """Four updates of 600 MB, in files without blocks on the disk, cost a process tens of megabytes."""
    size = 150_000_000
    with (tmp_path / "update").open("wb") as file:
        header = {"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * size)
    code = """
        import resource, sys
        from pathlib import Path
        from edgefl.aggregation.mean import WeightedMean
        from edgefl.aggregation.server_opt import ServerOptimizer
        from edgefl.settings.server import ServerConfig
        from edgefl.guards import not_finite_tree
        from edgefl.records import Update
        from edgefl.trees import SpooledTree, blocks
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = SpooledTree(Path(sys.argv[1]))
        rule = WeightedMean(model)
        for device in "abcd":
            tree = SpooledTree(Path(sys.argv[1]))
            assert not_finite_tree(tree) is None
            rule.add(Update(job="j", round=1, device=device, tree=tree, weight=1.0))
        new = ServerOptimizer(ServerConfig(), gradient=False).step(model, rule.result())
        for block in blocks(model.spec["w"].size):
            assert not new.read("w", block).any()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "update")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert int(ran.stdout) < 50_000
