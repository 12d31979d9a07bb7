"""Trees made of others: the same tensors, whether they are in memory or read by blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefl import trees
from edgefl.trees import BlockTree, ComputedTree, SpooledTree, Tree, write_tree
from edgefl.trees.views import joined, renamed

FIRST = {"a": np.arange(6).reshape(2, 3), "b": np.array(1.5)}
SECOND = {"b": np.array([True, False]), "c": np.zeros((0, 2))}


def spooled(folder: Path, name: str, tree: Tree) -> SpooledTree:
    with (folder / name).open("wb") as file:
        write_tree(tree, file)
    return SpooledTree(folder / name)


def as_lists(tree: Tree) -> dict[str, object]:
    return {name: array.tolist() for name, array in tree.items()}


@pytest.mark.parametrize("large", [True, False])
def test_joined_and_renamed_trees(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 0 if large else 1 << 20)
    first = spooled(tmp_path, "first", FIRST)
    both = joined(first, SECOND)
    assert isinstance(both, ComputedTree) == large
    assert list(both) == ["a", "b", "c"]
    assert as_lists(both) == as_lists({**FIRST, **SECOND})
    part = renamed(first, {"x": "b", "y": "a"})
    assert isinstance(part, BlockTree) == large
    assert as_lists(part) == {"x": 1.5, "y": [[0, 1, 2], [3, 4, 5]]}


def test_what_is_read_may_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 0)
    own = {"n": np.array([1, 2])}
    both = joined(spooled(tmp_path, "first", FIRST), own)
    assert isinstance(both, BlockTree)
    both.read("n", slice(0, 2))[:] = 9
    assert own["n"].tolist() == [1, 2]
