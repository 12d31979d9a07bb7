"""Memory shared by the server and the stages' processes: one slot for the tensors of one batch on its way.

All slots are one anonymous file. It is sparse: a page takes memory once it has been written, and `trim` returns the
pages of slots that are not in use. The server writes the rows of several requests one after the other, so that the
copy into the slot is what merges them; a stage reads its inputs from there and writes its outputs behind them, where
the next stage reads them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgefl.protocols.inference.tensors import datatype_of, dtype_of
from edgefl.trees import Array

ALIGNMENT = 64
KEPT_BYTES = 1 << 20  # of an unused slot, which `trim` leaves
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x03


class SlotFull(Exception):
    """A slot has no room for a tensor."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in shared memory."""

    datatype: str
    shape: tuple[int, ...]
    offset: int  # in the file


class SharedMemory:
    """The file, mapped in this process. In a stage's process: `SharedMemory(descriptor, size)`."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor, self.num_bytes = descriptor, num_bytes
        self._map = mmap.mmap(descriptor, num_bytes)

    def read(self, placed: Placed) -> Array:
        """Return a view of a tensor."""
        dtype = dtype_of(placed.datatype)
        count = 1
        for size in placed.shape:
            count *= size
        return np.frombuffer(self._map, dtype, count, placed.offset).reshape(placed.shape)

    def bytes_at(self, offset: int, num_bytes: int) -> bytes:
        """Return a copy of some bytes."""
        return self._map[offset : offset + num_bytes]

    def write(self, arrays: Sequence[Array], offset: int, end: int) -> tuple[Placed, int]:
        """Write arrays one after the other as the rows of one; return where, and where the next tensor may begin.

        Raises SlotFull if they would end after `end`.
        """
        first, needed = arrays[0], sum(array.nbytes for array in arrays)
        if needed > end - offset:
            raise SlotFull(f"a tensor has {needed} bytes, and {max(0, end - offset)} are free for a batch")
        at = offset
        for array in arrays:
            if array.nbytes:
                into = np.frombuffer(self._map, array.dtype, array.size, at).reshape(array.shape)
                np.copyto(into, array)
                at += array.nbytes
        shape = first.shape if len(arrays) == 1 else (sum(array.shape[0] for array in arrays), *first.shape[1:])
        return Placed(datatype_of(first.dtype), shape, offset), -(-at // ALIGNMENT) * ALIGNMENT


class Slots(SharedMemory):
    """The server's side: it creates the memory and hands out the slots."""

    def __init__(self, count: int, slot_bytes: int) -> None:
        descriptor = os.memfd_create("edgefl-stages", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, count * slot_bytes)
        super().__init__(descriptor, count * slot_bytes)
        self.slot_bytes = slot_bytes
        self._free = list(range(count))
        self._written: dict[int, int] = {}  # bytes that may have pages, by slot

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> tuple[int, int]:
        """Return where a free slot begins and ends; the caller has checked that there is one."""
        number = self._free.pop()  # the last used one: its pages are there
        return number * self.slot_bytes, (number + 1) * self.slot_bytes

    def give_back(self, begin: int, written_to: int) -> None:
        """Return a slot, of which the bytes up to `written_to` were used."""
        number = begin // self.slot_bytes
        self._written[number] = max(self._written.get(number, 0), written_to - begin)
        self._free.append(number)

    def trim(self) -> None:
        """Return the memory of free slots, but for a little of each, to the system."""
        for number in self._free:
            written = self._written.pop(number, 0)
            if written > KEPT_BYTES:
                _punch(self.descriptor, number * self.slot_bytes + KEPT_BYTES, self.slot_bytes - KEPT_BYTES)

    def close(self) -> None:
        """Close the file; its memory is freed when no process has it mapped."""
        os.close(self.descriptor)


def _punch(descriptor: int, offset: int, num_bytes: int) -> None:
    """Free a range of the file, fallocate(2); without the call (not Linux), the memory stays."""
    fallocate: Any = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None:
        fallocate(descriptor, _FALLOC_KEEP_SIZE_PUNCH_HOLE, ctypes.c_longlong(offset), ctypes.c_longlong(num_bytes))
