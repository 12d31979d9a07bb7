"""Trees in a temporary file that has no name, so that it ends with the object, or with the process.

For what a server must keep between blocks, and what does not fit into its memory: sums, an optimizer's state, new
parameters. Files are read and written, not mapped: mapped pages would count as memory of this process.
They are in Python's folder for temporary files (`TMPDIR`), which should be on a disk.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping

import numpy as np

from edgefl.trees import Array, BlockTree, EncodedTree, TensorSpec, Tree, blocks, offsets, read_array, spec_of


class ScratchTree(BlockTree):
    """A tree in a temporary file. Tensors are zeros until they are written."""

    def __init__(self, spec: Mapping[str, TensorSpec] | None = None) -> None:
        self._own = dict(spec or {})
        super().__init__(self._own)
        self._offsets = offsets(self._own)
        self._file = tempfile.TemporaryFile(prefix="edgefl-", buffering=0)  # noqa: SIM115 - closed by `finalize`
        weakref.finalize(self, self._file.close)
        self._end = sum(tensor.num_bytes for tensor in self._own.values())
        self._file.truncate(self._end)

    def read(self, name: str, block: slice) -> Array:
        return read_array(self._file.fileno(), self._offsets[name], self._own[name], block)

    def write(self, name: str, block: slice, values: Array) -> None:
        """Replace a block of the flattened tensor; `values` have its dtype."""
        tensor = self._own[name]
        at = self._offsets[name] + (block.start or 0) * tensor.dtype.itemsize
        self._pwrite(values, at)

    def append(self, name: str, values: Array) -> None:
        """Add a tensor."""
        self._own[name] = TensorSpec(values.shape, values.dtype)
        self._offsets[name] = self._end
        self._pwrite(values.reshape(-1), self._end)
        self._end += values.nbytes

    def _pwrite(self, values: Array, at: int) -> None:
        left = values.view(np.uint8).data
        while left:
            count = os.pwrite(self._file.fileno(), left, at)
            left, at = left[count:], at + count


def settled(tree: Tree) -> Tree:
    """Return a tree that no longer depends on what it was computed from: a copy in a temporary file if by blocks."""
    if not isinstance(tree, BlockTree) or isinstance(tree, ScratchTree) or not tree.reads_blocks:
        return tree
    if tree.factored or tree.narrow:
        return EncodedTree(settled(tree.stored()))
    copy = ScratchTree(spec_of(tree))
    for name, spec in tree.spec.items():
        for block in blocks(spec.size):
            copy.write(name, block, tree.read(name, block))
    return copy


def in_memory(tree: Tree) -> Tree:
    """Return a tree of arrays, in memory as a whole; what is in another form stays so."""
    if isinstance(tree, BlockTree) and (tree.factored or tree.narrow):
        return EncodedTree(in_memory(tree.stored()))
    return {name: tree[name] for name in tree} if isinstance(tree, BlockTree) and tree.reads_blocks else tree
