"""Trees: named tensors, and their serialization.

A tree is a flat mapping from a parameter's name to a numpy array, like a PyTorch state dict.
Its bytes are the safetensors format (https://github.com/huggingface/safetensors, format section):
8 bytes little-endian header length, a JSON header, then the tensors' raw little-endian bytes in the
header's order. We read and write the format ourselves for one reason: a tree that does not fit into memory is read,
computed and written by blocks (`BlockTree`), so that a server folds an update of any size in little memory.
In its bytes, a matrix may stand as two factors of low rank (`edgefl.trees.factors`), and numbers in fewer bits
(`edgefl.trees.narrow`); whoever reads it sees the tensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.hashing import HashingFile
from edgefl.trees.block_tree import (
    LARGE_BYTES,
    BlockTree,
    ComputedTree,
    encoded,
    factors_of,
    parts,
    read_block,
    spec_of,
)
from edgefl.trees.encoded_tree import EncodedTree, in_form
from edgefl.trees.factors import Factors
from edgefl.trees.spec import BFLOAT16, BLOCK_ELEMENTS, Array, TensorSpec, Tree, bfloat16, blocks, is_float

__all__ = [
    "BFLOAT16", "BLOCK_ELEMENTS", "LARGE_BYTES", "MAX_DIMENSIONS", "MAX_HEADER_BYTES", "Array", "BlockTree",
    "ComputedTree", "EncodedTree", "Factors", "SpooledTree", "TensorSpec", "Tree", "apply", "bfloat16", "blocks",
    "encoded", "encoded_bytes", "factors_of", "file_bytes", "in_form", "is_float", "is_large", "offsets", "parts",
    "read_array", "read_block", "read_tree", "spec_of", "subtract", "tree_bytes", "whole_bytes", "why_not_sent",
    "write_tree",
]  # fmt: skip

MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 32  # the limit of the oldest numpy that we support
_SMALL_BYTES = 256 << 10
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_BF16 = "BF16"


def why_not_sent(dtype: np.dtype[Any]) -> str | None:
    """Return why a dtype cannot be sent and what to do instead; None if it can be sent."""
    if _code_of(dtype) is not None:
        return None
    known = ", ".join(sorted([*(one.name for one in _CODES), BFLOAT16]))
    if dtype.kind == "c":
        return f"complex numbers cannot be sent; send real and imaginary parts separately. Supported: {known}"
    return f"only {known} can be sent; convert it to one of them"


def tree_bytes(tree: Tree) -> int:
    """Return the size of the tensors in bytes, without the header."""
    return sum(spec.num_bytes for spec in spec_of(tree).values())


def encoded_bytes(tree: Tree) -> int:
    """Return the size of `write_tree`'s output in bytes."""
    return file_bytes(spec_of(encoded(tree)))


def file_bytes(stored: Mapping[str, TensorSpec]) -> int:
    """Return the size in bytes of a file with these tensors."""
    return len(_header(stored)) + sum(spec.num_bytes for spec in stored.values())


def whole_bytes(tree: Tree) -> int:
    """Return the size of `write_tree`'s output in bytes if no tensor had another form: the most that is sent."""
    return file_bytes(spec_of(tree))


def is_large(tree: Tree) -> bool:
    """Whether a server must not have this tree in memory as a whole."""
    return tree_bytes(tree) > LARGE_BYTES


def subtract(new: Array, old: Array) -> Array:
    """Return the delta for `apply`, in the same dtype; for booleans: where they differ."""
    return np.asarray(new ^ old if new.dtype == np.bool_ else np.subtract(new, old))  # a 0-d result is a scalar


def apply(old: Array, delta: Array) -> Array:
    """Return `old` plus a delta."""
    return np.asarray(old ^ delta if old.dtype == np.bool_ else np.add(old, delta))


def write_tree(tree: Tree, file: BinaryIO | HashingFile) -> None:
    """Write the tree in safetensors format; raises ProtocolError for a dtype that the format does not have."""
    tree = encoded(tree)
    small = bytearray(_header(spec_of(tree)))  # collected, to avoid one system call per small tensor
    for part in (part for name in tree for part in parts(tree, name)):
        wire = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<")).view(np.uint8).data
        if len(wire) < _SMALL_BYTES and len(small) < _SMALL_BYTES:
            small += wire
            continue
        file.write(memoryview(small))
        file.write(wire)
        small = bytearray()
    file.write(memoryview(small))


def read_tree(data: bytes | memoryview) -> dict[str, Array]:
    """Decode a tree from memory, without copying the tensors."""
    spec, start = _parse_header(memoryview(data)[: MAX_HEADER_BYTES + 8], len(data))
    return _tensors(data, spec, start)


class SpooledTree(BlockTree):
    """A tree in a file. It is mapped read-only when a tensor is first indexed, and unmapped with the object.

    Blocks are read instead, because mapped pages count as memory of the process. A small file is always mapped.
    With a `span` (offset, bytes) the tree is that part of the file. Raises ProtocolError if the file or its part is not
    a safetensors file, is truncated or too long.
    """

    def __init__(self, path: Path, span: tuple[int, int] | None = None) -> None:
        self.path = path
        self._file = _StoredTree(path, span)
        self._all = EncodedTree(self._file)
        super().__init__(self._all.spec)
        self.factored, self.narrow, self.reads_blocks = self._all.factored, self._all.narrow, self._all.reads_blocks

    def __getitem__(self, name: str) -> Array:
        return self._all[name]

    def read(self, name: str, block: slice) -> Array:
        """Read a block. The file is open only meanwhile: a round may have more of them than a process may open."""
        return self._all.read(name, block)

    def factors(self, name: str) -> Factors | None:
        return self._all.factors(name)

    def stored(self) -> Tree:
        return self._file

    def stored_names(self, name: str) -> tuple[str, ...]:
        return self._all.stored_names(name)


class _StoredTree(BlockTree):
    """The tensors that a file, or a part of it, holds."""

    def __init__(self, path: Path, span: tuple[int, int] | None = None) -> None:
        self._path = path
        with path.open("rb") as file:
            length_here = os.fstat(file.fileno()).st_size
            offset, size = span or (0, length_here)
            if offset + size > length_here:
                raise ProtocolError(f"a file of trees has {length_here} bytes, expected {offset + size} or more")
            file.seek(offset)
            head = file.read(8)
            length = _header_length(head)
            spec, start = _parse_header(head + file.read(length), size)
        super().__init__(spec)
        self._start, self._end = offset + start, offset + size
        self._tensors: dict[str, Array] | None = None
        self._offsets: dict[str, int] | None = None
        self.reads_blocks = is_large(self)

    def __getitem__(self, name: str) -> Array:
        if self._tensors is None:
            # From before the first byte, because there may be none: a map has one byte at least.
            begin = (self._start - 1) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            with self._path.open("rb") as file:
                data = mmap.mmap(file.fileno(), self._end - begin, access=mmap.ACCESS_READ, offset=begin)
            self._tensors = _tensors(data, self.spec, self._start - begin)
        return self._tensors[name]

    def read(self, name: str, block: slice) -> Array:
        if self._offsets is None:
            self._offsets = offsets(self.spec, self._start)
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            return read_array(descriptor, self._offsets[name], self.spec[name], block)
        finally:
            os.close(descriptor)


def offsets(spec: Mapping[str, TensorSpec], start: int = 0) -> dict[str, int]:
    """Return where each tensor begins in a file that has them one after another (bytes)."""
    found = {}
    for name, tensor in spec.items():
        found[name], start = start, start + tensor.num_bytes
    return found


def read_array(descriptor: int, offset: int, tensor: TensorSpec, block: slice) -> Array:
    """Read a block of the flattened tensor at this offset of an open file; raises ProtocolError if the file ends."""
    first, last, _ = block.indices(tensor.size)
    array = np.empty(last - first, tensor.dtype)
    left, at = array.view(np.uint8).data, offset + first * tensor.dtype.itemsize
    while left:
        if not (count := os.preadv(descriptor, [left], at)):
            raise ProtocolError(f"a tree's file ends at byte {at}, {len(left)} bytes before the end of a tensor")
        left, at = left[count:], at + count
    return array


def _tensors(data: bytes | memoryview | mmap.mmap, spec: Mapping[str, TensorSpec], start: int) -> dict[str, Array]:
    """Return the tensors of encoded bytes as views, without a copy."""
    tree: dict[str, Array] = {}
    for name, tensor in spec.items():
        tree[name] = np.frombuffer(data, tensor.dtype, tensor.size, start).reshape(tensor.shape)
        start += tensor.num_bytes
    return tree


def _header(spec: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in spec.items():
        code = _code_of(tensor.dtype)
        if code is None:
            raise ProtocolError(f"tensor {name!r} has dtype {tensor.dtype}; {why_not_sent(tensor.dtype)}")
        start, end = end, end + tensor.num_bytes
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    return struct.pack("<Q", len(text)) + text


def _code_of(dtype: np.dtype[Any]) -> str | None:
    if dtype.name == BFLOAT16:
        return _BF16
    return _CODES.get(dtype.newbyteorder("<") if dtype.itemsize > 1 else dtype)


def _header_length(head: bytes | memoryview) -> int:
    if len(head) < 8:
        raise ProtocolError(f"tree of {len(head)} bytes is too short for a safetensors header")
    length = int(struct.unpack("<Q", head[:8])[0])
    if length > MAX_HEADER_BYTES:
        raise ProtocolError(f"tree header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return length


def _parse_header(head: bytes | memoryview, total_bytes: int) -> tuple[dict[str, TensorSpec], int]:
    length = _header_length(head)
    try:
        entries = json.loads(bytes(head[8 : 8 + length]))
        parsed = {name: _parse_entry(name, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise ProtocolError(f"tree header is not safetensors: {cause!r:.200}") from cause
    end = 0
    ordered = dict(sorted(parsed.items(), key=lambda item: item[1][1]))
    for name, (tensor, offsets) in ordered.items():
        start, end = end, end + tensor.num_bytes
        if offsets != (start, end):
            raise ProtocolError(f"tree header places {name!r:.100} at {offsets}, not at {(start, end)}")
    if total_bytes != 8 + length + end:
        raise ProtocolError(f"tree has {total_bytes} bytes where its header says {8 + length + end}")
    return {name: tensor for name, (tensor, _) in ordered.items()}, 8 + length


def _dtype_of(code: str) -> np.dtype[Any]:
    return bfloat16() if code == _BF16 else _DTYPES[code]


def _parse_entry(name: str, entry: Mapping[str, Any]) -> tuple[TensorSpec, tuple[int, int]]:
    """Return a tensor's spec and offsets; raises ValueError for what numpy cannot represent."""
    name.encode()  # raises for a lone surrogate, which could not be logged or sent
    shape, (start, end), dtype = tuple(entry["shape"]), entry["data_offsets"], _dtype_of(entry["dtype"])
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape!r:.100} and offsets must be at most {MAX_DIMENSIONS} integers of 0 or more")
    if math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"shape {shape!r:.100} is too large for any memory")
    return TensorSpec(shape, dtype), (start, end)
