"""A release as the change of another: a device that has the base's file fetches the adapters alone.

A patch is a tree. For each weight in 32 bits to which a matrix of low rank is added, it has the place in the file
(`places`: offset, rows, columns) and the matrix's factors (`0@lora_B`, `0@lora_A`, ..), in the order of the file.
All other bytes that differ are in it as they are (`runs`: offset, length; `bytes`), also where a sum rounds otherwise.
Sums are made row by row in a fixed order, without BLAS, so they have the same bits on every machine: the result is the
file that the release names, byte for byte, and its signed SHA-256 says so.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgefl.errors import ConfigError, ProtocolError
from edgefl.trees import Array, BlockTree, EncodedTree, Factors, Tree, factors_of
from edgefl.trees.factors import MARK, factor_names

MAX_TRIED = 4  # places in the base that hold a weight's bytes, of which the right one is found
GAP_BYTES = 16  # runs that are closer are joined: a run costs 16 bytes
_ROWS = 256  # that are computed at once
_DIFFER = 0.05  # at most, of a weight's elements, by rounding: else it is another weight's place


@dataclass(frozen=True, slots=True)
class Move:
    """A weight of the base, and what is added to it."""

    name: str
    weight: Array  # (rows, columns)
    matrix: Factors  # of the same shape


def make_patch(base: Path, new: Path, moves: Sequence[Move], most: float = 1.0) -> Tree:
    """Return the patch that makes `new` of `base`.

    Raises ConfigError if the files are not two versions of one graph, if the base has other weights, or if more than
    the share `most` of the file's bytes would have to be replaced.
    """
    with base.open("rb") as one, new.open("rb") as other:
        sizes = [os.fstat(file.fileno()).st_size for file in (one, other)]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ConfigError(
                f"the base's file has {sizes[0]} bytes and the new one {sizes[1]}, so they are not the same graph with "
                "other weights. Publish the base with --compress none, from the same task and the same torch, or "
                "publish without --base"
            )
        with (
            mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_READ) as before,
            mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ) as after,
        ):
            return _patch(before, after, moves, most)


def apply_patch(base: Path, patch: Tree, target: Path) -> None:
    """Write the file that a patch makes of a base; raises ProtocolError for a patch of no such file."""
    shutil.copyfile(base, target)
    with target.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        for offset, pair in _places(patch, size):
            _add(file.fileno(), offset, pair)
        _replace(file.fileno(), patch, size)


def _patch(before: mmap.mmap, after: mmap.mmap, moves: Sequence[Move], most: float) -> Tree:
    stored: dict[str, Array] = {}
    places: list[tuple[int, int, int]] = []
    moved = np.frombuffer(bytearray(before), np.uint8)  # what the places alone make of the base
    for move in moves:
        offset, pair = _found(before, after, move)
        if offset is None:
            raise ConfigError(
                f"the base's file does not hold the weight {move.name!r} of these parameters, so it is another base, "
                "or a compressed one. Name the version that was published of the job's base, with --compress none"
            )
        stored |= dict(zip(factor_names(f"{len(places)}{MARK}"), (pair.left, pair.right), strict=True))
        places.append((offset, *pair.shape))
        part = moved[offset : offset + 4 * pair.shape[0] * pair.shape[1]].view(np.float32)
        part += _product(pair, 0, pair.shape[0]).reshape(-1)
    wanted = np.frombuffer(after, np.uint8)
    differ = moved != wanted
    if (count := int(np.count_nonzero(differ))) > most * moved.size:
        del wanted
        raise ConfigError(
            f"{count} of {moved.size} bytes differ from the base, beside the adapters: this is another model. Publish "
            "it without --base"
        )
    runs = _runs(np.flatnonzero(differ))
    stored |= {
        "places": np.array(places, np.int64).reshape(-1, 3),
        "runs": runs,
        "bytes": np.concatenate([np.empty(0, np.uint8), *(wanted[at : at + many] for at, many in runs)]),
    }
    del wanted  # it exports the map's buffer
    return EncodedTree(stored)


def _found(before: mmap.mmap, after: mmap.mmap, move: Move) -> tuple[int | None, Factors]:
    """Return where a weight is, and the matrix's factors in the file's order; None if it is nowhere."""
    pair = move.matrix.scaled(1.0, np.dtype(np.float32))
    turned = Factors(np.ascontiguousarray(pair.right.T), np.ascontiguousarray(pair.left.T))
    for weight, own in ((move.weight, pair), (move.weight.T, turned)):
        there = np.ascontiguousarray(weight, np.float32)
        wanted, at = there + _product(own, 0, there.shape[0]), -1
        for _ in range(MAX_TRIED):
            at = before.find(there.tobytes(), at + 1)
            if at < 0:
                break
            seen = np.frombuffer(after[at : at + there.nbytes], np.float32).reshape(there.shape)
            if np.count_nonzero(seen != wanted) <= _DIFFER * wanted.size:
                return at, own
    return None, pair


def added(weight: Array, pair: Factors) -> Array:
    """Return a weight in 32 bits with a matrix of low rank added: the bits that a device makes of a patch."""
    return np.asarray(weight + _product(pair, 0, len(weight)))


def _product(pair: Factors, first: int, last: int) -> Array:
    """Return rows of the product in float32: summed in float64 in order of the rank, rounded alike on all machines."""
    total = np.zeros((last - first, pair.shape[1]))
    left, right = pair.left[first:last].astype(np.float64), pair.right.astype(np.float64)
    for rank in range(pair.rank):
        total += left[:, rank : rank + 1] * right[rank : rank + 1]
    return total.astype(np.float32)


def _runs(places: Array) -> Array:
    """Return the runs (offset, length) that cover these bytes, (N, 2)."""
    if not places.size:
        return np.zeros((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(places) > GAP_BYTES)
    first, last = places[np.r_[0, breaks + 1]], places[np.r_[breaks, places.size - 1]]
    return np.stack([first, last - first + 1], axis=1).astype(np.int64)


def _places(patch: Tree, size: int) -> Iterator[tuple[int, Factors]]:
    places = _part(patch, "places", np.dtype(np.int64), 3)
    if len(places) != len(patch.factored if isinstance(patch, BlockTree) else ()):
        raise ProtocolError(f"a patch has {len(places)} places and other than as many matrices")
    for number, (offset, rows, columns) in enumerate(places.tolist()):
        pair = factors_of(patch, f"{number}{MARK}")
        if pair is None or pair.shape != (rows, columns) or not 0 <= offset <= size - 4 * rows * columns:
            raise ProtocolError(f"matrix {number} of a patch is not within its file, or of another shape")
        yield offset, pair


def _add(descriptor: int, offset: int, pair: Factors) -> None:
    rows, columns = pair.shape
    for first in range(0, rows, _ROWS):
        last = min(rows, first + _ROWS)
        at, count = offset + 4 * first * columns, 4 * (last - first) * columns
        part = np.frombuffer(os.pread(descriptor, count, at), "<f4").reshape(last - first, columns)
        os.pwrite(descriptor, (part + _product(pair, first, last)).astype("<f4").tobytes(), at)


def _replace(descriptor: int, patch: Tree, size: int) -> None:
    runs, data, at = _part(patch, "runs", np.dtype(np.int64), 2), patch.get("bytes"), 0
    if data is None or data.dtype != np.uint8 or data.ndim != 1 or int(runs[:, 1].sum()) != data.size:
        raise ProtocolError("a patch has other bytes than its runs say")
    for offset, length in runs.tolist():
        if not (length > 0 and 0 <= offset <= size - length):
            raise ProtocolError(f"a patch replaces {length} bytes at {offset} of a file of {size}")
        os.pwrite(descriptor, data[at : at + length].tobytes(), offset)
        at += length


def _part(patch: Tree, name: str, dtype: np.dtype[np.generic], columns: int) -> Array:
    part = patch.get(name)
    if part is None or part.dtype != dtype or part.ndim != 2 or part.shape[1] != columns:
        raise ProtocolError(f"a patch has no table {name!r} of {columns} columns")
    return part
