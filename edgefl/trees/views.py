"""Trees made of others without a copy: joined, or a part under other names. Of large trees they are read by blocks.

Tensors that a tree has in another form, such as factors, keep it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.trees import Array, BlockTree, ComputedTree, EncodedTree, Tree, encoded, read_block, spec_of


def joined(*trees: Tree) -> Tree:
    """Return all tensors of several trees; a later tree's tensor replaces one of the same name."""
    owner = {name: tree for tree in trees for name in tree}
    if any(_coded(tree) for tree in trees):
        own = [renamed(tree, {name: name for name in tree if owner[name] is tree}) for tree in trees]
        return EncodedTree(joined(*map(encoded, own)))
    if not any(isinstance(tree, BlockTree) and tree.reads_blocks for tree in trees):
        return {name: array for tree in trees for name, array in tree.items()}
    spec = {name: one for tree in trees for name, one in spec_of(tree).items()}
    return ComputedTree(spec, lambda name, block: _copied(owner[name], name, block))


def renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
    """Return some tensors of a tree under new names: new -> old. What another form adds to a name stays at its end."""
    if isinstance(tree, BlockTree) and not _coded(tree).isdisjoint(names.values()):
        stored = {new + part.removeprefix(old): part for new, old in names.items() for part in tree.stored_names(old)}
        return EncodedTree(renamed(encoded(tree), stored))
    if not (isinstance(tree, BlockTree) and tree.reads_blocks):
        return {new: tree[old] for new, old in names.items()}
    spec = spec_of(tree)
    return ComputedTree(
        {new: spec[old] for new, old in names.items()}, lambda name, block: _copied(tree, names[name], block)
    )


def _coded(tree: Tree) -> frozenset[str]:
    return frozenset((*tree.factored, *tree.narrow)) if isinstance(tree, BlockTree) else frozenset()


def _copied(tree: Tree, name: str, block: slice) -> Array:
    return np.array(read_block(tree, name, block))
