"""Trees that are read, computed and written by blocks: they are the same as from memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefl import trees
from tests.edgefl.trees.test_trees import assert_same, encode, everything, sample, spool


def test_a_tree_is_written_by_blocks_as_it_is_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = everything() | {"long": sample("f4", (2 * trees.BLOCK_ELEMENTS + 3,)), "next": sample("i8", (3,))}
    wanted = encode(tree)
    spooled = spool(tmp_path, wanted)
    monkeypatch.setattr(trees, "LARGE_BYTES", 0)
    by_blocks = spool(tmp_path, wanted)
    assert (spooled.reads_blocks, by_blocks.reads_blocks) == (False, True)
    assert encode(by_blocks) == encode(spooled) == wanted
    computed = trees.ComputedTree(by_blocks.spec, by_blocks.read)
    assert_same(computed, tree)
    assert encode(computed) == wanted


def test_a_block_is_the_same_from_memory_and_from_a_file(tmp_path: Path) -> None:
    tree = {"w": sample("f4", (4, 5)), "s": sample("i8", ())}
    spooled = spool(tmp_path, encode(tree))
    for block in (slice(0, 7), slice(6, 20), slice(None), slice(3, 3)):
        assert np.array_equal(trees.read_block(spooled, "w", block), trees.read_block(tree, "w", block))
    assert trees.read_block(spooled, "s", slice(0, 1)).tolist() == [int(tree["s"])]
    assert [part.tolist() for part in trees.parts(tree, "s")] == [[int(tree["s"])]]
