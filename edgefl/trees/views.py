"""Trees made of others without a copy: joined, or a part under other names. Of large trees they are read by blocks.

Matrices that a tree has as factors stay factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.trees import Array, BlockTree, ComputedTree, FactoredTree, Tree, encoded, read_block, spec_of
from edgefl.trees.factors import factor_names


def joined(*trees: Tree) -> Tree:
    """Return all tensors of several trees; a later tree's tensor replaces one of the same name."""
    owner = {name: tree for tree in trees for name in tree}
    if any(_factored(tree) for tree in trees):
        own = [renamed(tree, {name: name for name in tree if owner[name] is tree}) for tree in trees]
        return FactoredTree(joined(*map(encoded, own)))
    if not any(isinstance(tree, BlockTree) and tree.reads_blocks for tree in trees):
        return {name: array for tree in trees for name, array in tree.items()}
    spec = {name: one for tree in trees for name, one in spec_of(tree).items()}
    return ComputedTree(spec, lambda name, block: _copied(owner[name], name, block))


def renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
    """Return some tensors of a tree under new names: new -> old. A matrix that is factors keeps the end of its name."""
    if not _factored(tree).isdisjoint(names.values()):
        stored: dict[str, str] = {}
        for new, old in names.items():
            is_pair = old in _factored(tree)
            stored |= dict(zip(factor_names(new), factor_names(old), strict=True)) if is_pair else {new: old}
        return FactoredTree(renamed(encoded(tree), stored))
    if not (isinstance(tree, BlockTree) and tree.reads_blocks):
        return {new: tree[old] for new, old in names.items()}
    spec = spec_of(tree)
    return ComputedTree(
        {new: spec[old] for new, old in names.items()}, lambda name, block: _copied(tree, names[name], block)
    )


def _factored(tree: Tree) -> frozenset[str]:
    return frozenset(tree.factored) if isinstance(tree, BlockTree) else frozenset()


def _copied(tree: Tree, name: str, block: slice) -> Array:
    return np.array(read_block(tree, name, block))
