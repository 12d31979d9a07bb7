"""Inputs for a model's sample: some rows of given ones, or made from the declared types and shapes.

A file does not say which dimension counts the rows; by convention it is each input's first free one. Other free
dimensions get one common size, and the model itself decides which sizes it can process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgefl.models.sample import BATCHES
from edgefl.models.tensors import NUMPY_TYPES, TensorInfo
from edgefl.trees import Array, Tree

# Usual sizes of sequences and images, then all small ones, as of a table's columns.
_SIZES = (16, 32, 64, 128, 256, 512, 224, 320, 576, 640, 1024, *(size for size in range(1, 65) if size not in {16, 32}))
_MAX_ELEMENTS = 4 << 20  # of one made input


def in_batches(inputs: Tree, infos: Sequence[TensorInfo]) -> list[Tree]:
    """Return the same rows as batches of 1 and 3; an empty list if the inputs have no common number of rows."""
    axes = {one.name: _rows_axis(one) for one in infos}
    counts = {inputs[name].shape[axis] for name, axis in axes.items() if axis is not None}
    if len(counts) != 1 or 0 in counts:
        return []
    (count,) = counts

    def rows(batch: int) -> Tree:
        chosen = np.arange(batch) % count
        return {
            name: array if axes[name] is None else np.ascontiguousarray(np.take(array, chosen, axes[name]))
            for name, array in inputs.items()
        }

    return [rows(batch) for batch in BATCHES]


def candidates(infos: Sequence[TensorInfo]) -> Iterator[Tree]:
    """Yield inputs of one row in ever other sizes: floats in 0..1 with a fixed seed, integers 1, else 0."""
    sizes: Sequence[int] = _SIZES if any(_free(one)[1:] for one in infos) else (1,)
    for integer in (1, 0):
        for size in sizes:
            made = {one.name: _made(one, size, integer) for one in infos}
            if all(array.size <= _MAX_ELEMENTS for array in made.values()):
                yield made
        if not any(one.datatype[0] in "IU" for one in infos):
            return  # only floats and booleans: the same again


def _free(info: TensorInfo) -> list[int]:
    return [axis for axis, size in enumerate(info.shape) if size < 0]


def _rows_axis(info: TensorInfo) -> int | None:
    free = _free(info)
    return free[0] if free else None


def _made(info: TensorInfo, size: int, integer: int) -> Array:
    dtype, rows = np.dtype(NUMPY_TYPES[info.datatype]), _rows_axis(info)
    shape = [1 if axis == rows else size if one < 0 else one for axis, one in enumerate(info.shape)]
    if np.prod(shape, dtype=np.float64) > _MAX_ELEMENTS:
        return np.broadcast_to(np.zeros((), dtype), shape)  # takes no memory; the caller leaves it out
    if dtype.kind == "f":
        return np.asarray(np.random.default_rng(0).random(shape), dtype)
    return np.full(shape, integer, dtype)
