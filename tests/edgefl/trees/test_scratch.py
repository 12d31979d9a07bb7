"""Trees in temporary files: written by blocks, grown by tensors, and gone with the object."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgefl import trees
from edgefl.errors import ProtocolError
from edgefl.trees import BLOCK_ELEMENTS, ComputedTree, SpooledTree, TensorSpec, read_array, spec_of, write_tree
from edgefl.trees.scratch import ScratchTree, in_memory, settled


def ramp(name: str, block: slice) -> np.ndarray:
    assert name == "w"
    return np.arange(block.start, block.stop, dtype=np.float32)


LONG = 2 * BLOCK_ELEMENTS + 5
SPEC = {"w": TensorSpec((LONG,), np.dtype(np.float32))}


def computed() -> ComputedTree:
    return ComputedTree(SPEC, lambda name, block: ramp(name, slice(*block.indices(LONG))))


def num_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_tensors_are_zeros_until_they_are_written() -> None:
    tree = ScratchTree({"a": TensorSpec((2, 2), np.dtype(np.int64)), "b": TensorSpec((), np.dtype(np.float32))})
    tree.write("a", slice(1, 3), np.array([7, 8]))
    assert tree["a"].tolist() == [[0, 7], [8, 0]]
    assert (tree["b"].shape, float(tree["b"])) == ((), 0.0)
    assert tree.read("a", slice(2, 4)).tolist() == [8, 0]


def test_appended_tensors_keep_their_shape_and_dtype() -> None:
    tree = ScratchTree()
    tree.append("step", np.array(3.0, np.float32))
    tree.append("mask", np.array([[True], [False]]))
    tree.append("none", np.zeros((0, 4)))
    assert list(tree) == ["step", "mask", "none"]
    assert (float(tree["step"]), tree["mask"].tolist(), tree["none"].shape) == (3.0, [[True], [False]], (0, 4))
    assert spec_of(tree)["mask"] == TensorSpec((2, 1), np.dtype(np.bool_))


def test_the_file_has_no_name_and_ends_with_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = num_open()
    tree = ScratchTree(SPEC)
    assert list(tmp_path.iterdir()) == []
    del tree
    assert num_open() == before


def test_a_computed_tree_is_settled_in_a_file_and_others_stay() -> None:
    copy = settled(computed())
    assert isinstance(copy, ScratchTree)
    assert settled(copy) is copy
    assert np.array_equal(copy["w"], np.arange(LONG, dtype=np.float32))
    arrays = {"w": np.zeros(3)}
    assert settled(arrays) is arrays
    assert in_memory(arrays) is arrays
    assert np.array_equal(in_memory(computed())["w"], copy["w"])


def test_a_small_file_is_not_copied(tmp_path: Path) -> None:
    with (tmp_path / "tree").open("wb") as file:
        write_tree(computed(), file)
    spooled = SpooledTree(tmp_path / "tree")
    assert settled(spooled) is spooled
    assert np.array_equal(spooled.read("w", slice(LONG - 2, None)), [LONG - 2, LONG - 1])


def test_a_file_that_was_cut_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 0)
    with (tmp_path / "tree").open("wb") as file:
        write_tree(computed(), file)
    spooled = SpooledTree(tmp_path / "tree")
    os.truncate(tmp_path / "tree", 1000)
    with pytest.raises(ProtocolError, match="ends at byte 1000"):
        spooled.read("w", slice(0, None))
    with (tmp_path / "tree").open("rb") as file, pytest.raises(ProtocolError, match="bytes before the end"):
        read_array(file.fileno(), 900, SPEC["w"], slice(0, 100))
