"""A tree in shared memory: an unnamed file that each process maps.

Children inherit its descriptor, so nothing is left behind if a process dies.
Invariant: the layout follows from the spec alone, so both sides agree.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgefl.trees import Array, TensorSpec, Tree

ALIGNMENT = 64
_MEMORY = Path("/dev/shm")  # noqa: S108 - only to hold files that have no name


class SharedTree:
    """Tensors of a spec, at the same place in every process that has the descriptor."""

    def __init__(self, spec: Mapping[str, TensorSpec], descriptor: int | None = None) -> None:
        ends, end = {}, 0
        for name, tensor in spec.items():
            ends[name] = end
            end += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
        self.descriptor = new_file(max(end, 1)) if descriptor is None else descriptor
        self._memory = mmap.mmap(self.descriptor, max(end, 1))
        self.tree: dict[str, Array] = {
            name: np.ndarray(tensor.shape, tensor.dtype, self._memory, ends[name]) for name, tensor in spec.items()
        }

    def write(self, tree: Tree) -> None:
        """Copy a tree with the same spec into the memory."""
        for name, array in self.tree.items():
            array[...] = tree[name]

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last array on it."""
        os.close(self.descriptor)


def new_file(num_bytes: int) -> int:
    """Return the descriptor of an unnamed file, in memory if possible."""
    with tempfile.TemporaryFile(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as file:
        file.truncate(num_bytes)
        return os.dup(file.fileno())
