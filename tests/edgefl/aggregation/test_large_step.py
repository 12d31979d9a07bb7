"""A step by pieces equals the step over whole tensors, continues any saved state, and changes nothing if it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgefl.aggregation import large_step
from edgefl.aggregation.large_step import ELEMENTWISE
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.settings.server import ServerConfig
from edgefl.trees import Array, ComputedTree, Tree, bfloat16, spec_of
from edgefl.trees.scratch import settled

SHAPES = {"w": (40, 7), "b": (), "e": (0,), "v": (90,), "u": (3, 3)}


def start(dtype: Any = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def means(count: int, like: Tree) -> list[dict[str, Array]]:
    rng = np.random.default_rng(2)
    return [{n: np.asarray(rng.normal(size=a.shape)).astype(a.dtype) for n, a in like.items()} for _ in range(count)]


def by_blocks(tree: Tree) -> ComputedTree:
    return ComputedTree(spec_of(tree), lambda name, block: np.array(tree[name].reshape(-1)[block]))


def run(
    optimizer: ServerOptimizer, rounds: list[dict[str, Array]], parameters: Mapping[str, Array], *, large: bool
) -> Tree:
    tree: Tree = parameters
    for mean in rounds:
        own = {name: array.copy() for name, array in mean.items()}
        tree = settled(optimizer.step(tree, by_blocks(own) if large else own, lr_factor=0.7))
    return tree


def make(optimizer: str, options: Mapping[str, Any] | None = None) -> ServerOptimizer:
    return ServerOptimizer(
        ServerConfig(optimizer=optimizer, lr=0.05, options=options or {}), gradient=False, buffers=("u",)
    )


def assert_same(seen: Tree, wanted: Tree) -> None:
    assert list(seen) == list(wanted)
    for name in wanted:
        assert (seen[name].dtype, seen[name].shape) == (wanted[name].dtype, wanted[name].shape)
        assert np.array_equal(seen[name], wanted[name]), name


@pytest.mark.parametrize("elements", [1, 64, 1 << 20])
@pytest.mark.parametrize("optimizer", [*sorted(ELEMENTWISE), "momentum"])
def test_pieces_of_any_size_give_the_bits_of_whole_tensors(
    optimizer: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_step, "PIECE_ELEMENTS", elements)
    kind, options = ("SGD", {"momentum": 0.9}) if optimizer == "momentum" else (optimizer, {})
    rounds = means(3, start())
    wanted = run(make(kind, options), rounds, start(), large=False)
    assert_same(run(make(kind, options), rounds, start(), large=True), wanted)


def test_an_optimizer_of_rows_and_columns_steps_whole_tensors(caplog: pytest.LogCaptureFixture) -> None:
    first = {name: array for name, array in start().items() if array.size}  # torch's Adafactor cannot step empty ones
    rounds = means(3, first)
    wanted = run(make("Adafactor"), rounds, first, large=False)
    caplog.set_level("INFO")
    assert_same(run(make("Adafactor"), rounds, first, large=True), wanted)
    assert "server.step_by_tensors" in caplog.text


@pytest.mark.parametrize(("before", "after"), [(None, 50), (50, 33), (33, 1 << 20)])
def test_a_state_continues_however_it_was_divided(
    before: int | None, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`None`: a state of parameters that were in memory, as an older version wrote it."""
    rounds = means(4, start())
    wanted = run(make("Adam"), rounds, start(), large=False)
    monkeypatch.setattr(large_step, "PIECE_ELEMENTS", before or 1)
    first, second = make("Adam"), make("Adam")
    half = run(first, rounds[:2], start(), large=before is not None)
    second.load(first.state())
    monkeypatch.setattr(large_step, "PIECE_ELEMENTS", after)
    assert_same(run(second, rounds[2:], half, large=True), wanted)


def test_parameters_of_several_dtypes_are_not_joined() -> None:
    mixed = start() | {"w": start(np.float64)["w"], "v": start(bfloat16())["v"]}
    rounds = means(2, mixed)
    assert_same(run(make("Adam"), rounds, mixed, large=True), run(make("Adam"), rounds, mixed, large=False))


def test_a_state_that_is_not_finite_is_reported() -> None:
    optimizer = make("Adam")
    mean = means(1, start())[0] | {"v": np.full(90, 3e38, np.float32)}
    run(optimizer, [mean], start(), large=True)
    assert "holds NaN or infinity" in (optimizer.fault() or "")


def test_a_step_that_fails_keeps_the_state() -> None:
    optimizer, rounds = make("Adam"), means(2, start())
    run(optimizer, rounds[:1], start(), large=True)
    kept = {name: array.copy() for name, array in optimizer.state().items()}

    def broken(_name: str, _block: slice) -> Array:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        optimizer.step(start(), ComputedTree(spec_of(start()), broken))
    assert_same(optimizer.state(), kept)


def test_plain_sgd_and_buffers_are_computed_when_they_are_read() -> None:
    optimizer = ServerOptimizer(ServerConfig(lr=0.5), gradient=True, buffers=("u",), frozen=("v",))
    mean = means(1, start())[0]
    seen = optimizer.step(start(), by_blocks(mean))
    assert isinstance(seen, ComputedTree)
    own = {name: array.copy() for name, array in mean.items()}
    assert_same(settled(seen), optimizer.step(start(), own))
