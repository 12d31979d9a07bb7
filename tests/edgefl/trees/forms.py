"""Trees of numbers that tests store in another form, and files of trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgefl.settings.server import BF16, INT8
from edgefl.trees import Array, SpooledTree, Tree, write_tree
from edgefl.trees.narrow import LEAST

SIZE = 3 * LEAST + 77  # the last group is not full
FORMS = (BF16, INT8)


def draw(seed: int = 0, size: int = SIZE) -> Array:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def written(tree: Tree, path: Path) -> SpooledTree:
    """Return a tree as it is read from a file."""
    with path.open("wb") as file:
        write_tree(tree, file)
    return SpooledTree(path)
