"""Numbers in fewer bits: what users of a tree see, what its bytes are, how it rounds, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edgefl.aggregation import make_rule
from edgefl.guards import not_finite_tree
from edgefl.records import Update
from edgefl.settings.server import BF16, INT8
from edgefl.trees import (
    LARGE_BYTES,
    EncodedTree,
    Tree,
    encoded,
    in_form,
    read_block,
    write_tree,
)
from edgefl.trees.narrow import GROUP, LEAST
from tests.edgefl.trees.forms import FORMS, SIZE, draw, written


def test_int8_by_hand() -> None:
    values = np.zeros(LEAST, np.float32)
    values[:4] = [127, -127, 64, 0]  # its scale is 1, so integers are exact
    values[GROUP : GROUP + 2] = [0.5, -0.5]  # its scale is 0.5 / 127
    stored = encoded(in_form({"w": values}, INT8))
    assert stored["w@int8"][:4].tolist() == [127, -127, 64, 0]
    assert stored["w@int8"][GROUP : GROUP + 2].tolist() == [127, -127]
    assert stored["w@scale"].tolist() == [1, np.float32(0.5) / np.float32(127), 0, 0]
    assert EncodedTree(stored)["w"][GROUP : GROUP + 3].tolist() == pytest.approx([0.5, -0.5, 0])


def test_bf16_by_hand() -> None:
    values = np.full(LEAST, 1 + 2**-9, np.float32)  # bfloat16 has 8 bits: this rounds to 1
    values[0], values[1] = 1 + 2**-7, -3e38
    seen = in_form({"w": values}, BF16)["w"]
    assert seen.dtype == np.float32
    assert seen[0] == 1 + 2**-7
    assert seen[1] == pytest.approx(-3e38, rel=2**-8)
    assert seen[2] == 1


@pytest.mark.parametrize("form", FORMS)
def test_an_error_is_below_the_step(form: str) -> None:
    values = draw()
    error = np.abs(in_form({"w": values}, form)["w"] - values)
    if form == BF16:
        assert (error <= np.abs(values) * 2**-8).all()
    else:
        padded = np.zeros(-(-SIZE // GROUP) * GROUP, np.float32)
        padded[:SIZE] = np.abs(values)
        step = np.repeat(padded.reshape(-1, GROUP).max(axis=1) / 127, GROUP)[:SIZE]
        assert (error < step * 1.0001).all()
        assert error.max() > step.min() / 2


def test_int8_is_right_in_the_mean() -> None:
    values = draw()
    trees = [in_form({"w": values}, INT8, seed)["w"].astype(np.float64) for seed in range(400)]
    off = np.mean(trees, axis=0) - values
    step = np.abs(values).max() / 127
    assert np.abs(off).max() < step * 5 * 0.5 / np.sqrt(400)  # 5 standard deviations, of at most half a step each
    assert abs(off.mean()) < step * 0.01


def test_the_same_seed_gives_the_same_bits() -> None:
    tree = {"a": draw(), "b": draw()}
    first, again, other = (encoded(in_form(tree, INT8, seed)) for seed in (1, 1, 2))
    assert (first["a@int8"] == again["a@int8"]).all()
    assert (first["a@int8"] != other["a@int8"]).any()
    assert (first["a@int8"] != first["b@int8"]).any()  # each tensor has its own draws


@pytest.mark.parametrize("form", FORMS)
def test_what_is_small_or_no_float32_stays_as_it_is(form: str) -> None:
    tree = {
        "few": draw(size=LEAST - 1), "wide": draw().astype(np.float64), "half": draw().astype(np.float16),
        "brain": draw().astype(ml_dtypes.bfloat16), "count": np.array(3), "steps": np.arange(2 * LEAST),
        "none": np.zeros((0, 4), np.float32), "up@lora_A": draw(size=2 * LEAST).reshape(2, -1),
        "up@lora_B": draw(size=2 * LEAST).reshape(-1, 2),
    }  # fmt: skip
    sent = in_form(EncodedTree(tree), form)
    assert isinstance(sent, EncodedTree)
    assert not sent.narrow
    assert sorted(encoded(sent)) == sorted(tree)
    assert all(np.array_equal(encoded(sent)[name], tree[name]) for name in tree)


@pytest.mark.parametrize("form", FORMS)
def test_any_block_is_that_of_the_whole(form: str) -> None:
    tree = in_form({"w": draw()}, form)
    whole = tree["w"]
    for start, stop in [
        (0, 1),
        (0, SIZE),
        (255, 257),
        (256, 512),
        (1000, 1001),
        (SIZE - 1, SIZE),
        (5, 5),
        (9, 2 * SIZE),
    ]:
        assert read_block(tree, "w", slice(start, stop)).tolist() == whole[start:stop].tolist()
    assert read_block(tree, "w", slice(None)).tolist() == whole.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_is_seen(form: str, bad: float) -> None:
    values = draw()
    values[SIZE - 1] = bad
    assert "holds NaN or infinity" in str(not_finite_tree(in_form({"w": values}, form)))


@pytest.mark.parametrize("form", FORMS)
def test_the_smallest_and_the_largest_numbers(form: str) -> None:
    tiny, huge = np.full(LEAST, 1e-45, np.float32), np.full(LEAST, 3e38, np.float32)
    seen = in_form({"tiny": tiny, "huge": huge, "zero": np.zeros(LEAST, np.float32)}, form)
    assert not_finite_tree(seen) is None
    assert np.abs(seen["tiny"]).max() <= 1e-44
    assert seen["huge"] == pytest.approx(huge, rel=1e-2)
    assert not seen["zero"].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [LARGE_BYTES, 1000], ids=["in memory", "by blocks"])
def test_the_mean_is_that_of_what_was_sent(
    form: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgefl.trees.LARGE_BYTES", limit)
    monkeypatch.setattr("edgefl.trees.encoded_tree.LARGE_BYTES", limit)
    sent = [in_form({"w": draw(number)}, form, number) for number in range(3)]
    trees: list[Tree] = [written(sent[0], tmp_path / "0"), sent[1], written(sent[2], tmp_path / "2")]
    rule = make_rule("mean", {"w": np.zeros(SIZE, np.float32)})
    for number, tree in enumerate(trees):
        rule.add(Update(job="j", round=1, device=f"d{number}", tree=tree, weight=number + 1.0))
    expected = sum((n + 1.0) * one["w"].astype(np.float64) for n, one in enumerate(sent)) / 6
    assert np.array_equal(rule.result()["w"], np.asarray(expected).astype(np.float32))


def test_bytes_are_plain_safetensors() -> None:
    file = io.BytesIO()
    write_tree(in_form({"w": draw()}, INT8), file)
    assert b'"w@int8":{"dtype":"I8"' in file.getvalue()[:200]
