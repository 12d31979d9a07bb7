"""Trees that are stored in another form: what their users see, what their bytes are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edgefl.errors import ProtocolError
from edgefl.guards import not_finite_tree
from edgefl.settings.server import BF16
from edgefl.trees import (
    LARGE_BYTES,
    Array,
    BlockTree,
    ComputedTree,
    TensorSpec,
    encoded,
    encoded_bytes,
    file_bytes,
    in_form,
    spec_of,
    whole_bytes,
)
from edgefl.trees.narrow import GROUP, LEAST, narrowed_spec
from edgefl.trees.scratch import in_memory, settled
from edgefl.trees.views import joined, renamed
from tests.edgefl.trees.forms import FORMS, SIZE, draw, written


@pytest.mark.parametrize("form", FORMS)
def test_a_file_shows_the_same_and_is_smaller(form: str, tmp_path: Path) -> None:
    tree = {"w": draw().reshape(1, -1, 1), "few": draw(size=3), "count": np.array(7)}
    sent = in_form(tree, form)
    file = written(sent, tmp_path / "tree")
    assert spec_of(file) == spec_of(tree) == spec_of(sent)
    assert all(np.array_equal(file[name], sent[name]) for name in tree)
    assert (tmp_path / "tree").stat().st_size == encoded_bytes(sent) == file_bytes(narrowed_spec(spec_of(tree), form))
    assert whole_bytes(tree) > encoded_bytes(sent) * (1.8 if form == BF16 else 3.4)


def test_a_form_of_a_form_is_the_same() -> None:
    once = in_form({"w": draw()}, BF16)
    assert np.array_equal(encoded(in_form(once, BF16))["w@bf16"], encoded(once)["w@bf16"])
    assert in_form(once, "exact") is once


def test_a_model_that_is_read_by_blocks_is_never_in_memory_as_a_whole() -> None:
    size, read = LARGE_BYTES, list[int]()

    def block(_name: str, part: slice) -> Array:
        read.append(len(range(*part.indices(size))))
        return np.full(read[-1], 0.1, np.float32)

    sent = in_form(ComputedTree({"w": TensorSpec((size,), np.dtype(np.float32))}, block), BF16)
    assert read == []
    assert isinstance(sent, BlockTree)
    assert sent.reads_blocks
    assert sent.read("w", slice(5, 8)).tolist() == [float(ml_dtypes.bfloat16(0.1))] * 3
    assert read == [3]


I8, F32 = np.zeros(LEAST, np.int8), np.zeros(LEAST // GROUP, np.float32)


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"w@int8": I8}, "'w' is there as w@int8; expected it alone, or w@bf16"),
        ({"w@scale": F32}, "'w' is there as w@scale; expected"),
        ({"w@int8": I8, "w@scale": F32, "w": F32}, "'w' is there as w, w@int8, w@scale"),
        ({"w@bf16": I8}, "'w' is stored as int8; expected bfloat16, or int8 and float32"),
        ({"w@int8": F32, "w@scale": F32}, "'w' is stored as float32, float32"),
        (
            {"w@int8": I8, "w@scale": F32[:-1]},
            r"'w' of 1024 elements has scales \[3\]; expected \[4\], one for each 256",
        ),
        ({"w@int8": I8, "w@scale": F32.reshape(2, 2)}, r"has scales \[2, 2\]"),
        ({"w@int8": I8, "w@scale": F32, "w@bf16": I8}, "'w' is there as w@bf16, w@int8, w@scale"),
    ],
)
def test_parts_that_make_no_tensor_are_refused_by_name(tensors: dict[str, Array], fault: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=fault):
        written(tensors, tmp_path / "tree")


@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38])
def test_scales_of_a_hostile_peer_are_seen_by_the_guard(scale: float, tmp_path: Path) -> None:
    stored = {"w@int8": np.full(LEAST, 100, np.int8), "w@scale": np.full(LEAST // GROUP, scale, np.float32)}
    assert "holds NaN or infinity" in str(not_finite_tree(written(stored, tmp_path / "tree")))


@pytest.mark.parametrize("form", FORMS)
def test_views_keep_the_form(form: str, tmp_path: Path) -> None:
    tree = written(in_form({"w": draw(), "few": np.ones(2, np.float32)}, form), tmp_path / "tree")
    more = joined({"body": np.zeros(1)}, tree)
    prefixed = renamed(more, {"parameters/w": "w", "body": "body"})
    for view in (more, in_memory(more), settled(more)):
        assert isinstance(view, BlockTree)
        assert set(view.narrow) == {"w"}
        assert view["few"].tolist() == [1, 1]
        assert np.array_equal(view["w"], tree["w"])
    assert np.array_equal(prefixed["parameters/w"], tree["w"])
    assert {name.partition("@")[0] for name in encoded(prefixed)} == {"parameters/w", "body"}
    replaced = joined(tree, {"w": np.zeros(SIZE, np.float32)})
    assert not replaced["w"].any()
    assert sorted(encoded(replaced)) == ["few", "w"]
