"""Trees that are read, computed and written by blocks, because they do not fit into memory or are stored otherwise."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from edgefl.trees.factors import Factors
from edgefl.trees.spec import Array, TensorSpec, Tree, blocks

LARGE_BYTES = 128 << 20  # a tree with larger tensors is never in a server's memory as a whole


class BlockTree(Mapping[str, Array]):
    """A tree whose tensors are read by blocks. Indexing returns a whole tensor, in memory."""

    reads_blocks = True  # False: it is small enough to be used as a whole
    factored: Collection[str] = ()  # names of the matrices that it has as factors
    narrow: Collection[str] = ()  # names of the tensors that it has in fewer bits

    def factors(self, _name: str) -> Factors | None:
        """Return the factors of a matrix; None if it is there as a whole."""
        return None

    def stored(self) -> Tree:
        """Return the tensors as they are written, e.g. with factors in place of matrices."""
        return self

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names under which a tensor is written."""
        return (name,)

    def __init__(self, spec: Mapping[str, TensorSpec]) -> None:
        self.spec = spec

    @abc.abstractmethod
    def read(self, name: str, block: slice) -> Array:
        """Return these elements of the flattened tensor in a new 1-D array; the same values at each call."""

    def __getitem__(self, name: str) -> Array:
        spec = self.spec[name]
        whole = np.empty(spec.size, spec.dtype)
        for block in blocks(whole.size):
            whole[block] = self.read(name, block)
        return whole.reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec)

    def __len__(self) -> int:
        return len(self.spec)


class ComputedTree(BlockTree):
    """A tree that is computed from others, block by block, each time that it is read."""

    def __init__(self, spec: Mapping[str, TensorSpec], compute: Callable[[str, slice], Array]) -> None:
        super().__init__(spec)
        self._compute = compute

    def read(self, name: str, block: slice) -> Array:
        return self._compute(name, block)


def spec_of(tree: Tree) -> dict[str, TensorSpec]:
    """Return the spec of each tensor. A `BlockTree` knows it without reading tensors."""
    if isinstance(tree, BlockTree):
        return dict(tree.spec)
    return {name: TensorSpec(array.shape, array.dtype) for name, array in tree.items()}


def encoded(tree: Tree) -> Tree:
    """Return the tensors as they are stored: e.g. with factors in place of matrices of low rank."""
    return tree.stored() if isinstance(tree, BlockTree) else tree


def factors_of(tree: Tree, name: str) -> Factors | None:
    """Return the factors of a matrix; None if the tree has it as a whole."""
    return tree.factors(name) if isinstance(tree, BlockTree) else None


def read_block(tree: Tree, name: str, block: slice) -> Array:
    """Return some elements of a flattened tensor, as a 1-D array: read, or a view of a tensor in memory."""
    return tree.read(name, block) if isinstance(tree, BlockTree) else tree[name].reshape(-1)[block]


def parts(tree: Tree, name: str) -> Iterator[Array]:
    """Yield a tensor as 1-D arrays, in order: by blocks if the tree must not be in memory, else as one view."""
    if isinstance(tree, BlockTree) and tree.reads_blocks:
        yield from (tree.read(name, block) for block in blocks(tree.spec[name].size))
    else:
        yield tree[name].reshape(-1)
