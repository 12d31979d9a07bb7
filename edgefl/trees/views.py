"""Trees made of others without a copy: joined, or a part under other names. Of large trees they are read by blocks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.trees import Array, BlockTree, ComputedTree, Tree, read_block, spec_of


def joined(*trees: Tree) -> Tree:
    """Return all tensors of several trees; a later tree's tensor replaces one of the same name."""
    if not any(isinstance(tree, BlockTree) and tree.reads_blocks for tree in trees):
        return {name: array for tree in trees for name, array in tree.items()}
    owner = {name: tree for tree in trees for name in tree}
    spec = {name: one for tree in trees for name, one in spec_of(tree).items()}
    return ComputedTree(spec, lambda name, block: _copied(owner[name], name, block))


def renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
    """Return some tensors of a tree under new names: new -> old."""
    if not (isinstance(tree, BlockTree) and tree.reads_blocks):
        return {new: tree[old] for new, old in names.items()}
    spec = spec_of(tree)
    return ComputedTree(
        {new: spec[old] for new, old in names.items()}, lambda name, block: _copied(tree, names[name], block)
    )


def _copied(tree: Tree, name: str, block: slice) -> Array:
    return np.array(read_block(tree, name, block))
