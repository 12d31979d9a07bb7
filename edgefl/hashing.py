"""A hash of what is written, made while it is written: bytes that are in the cache cost no second reading."""

from __future__ import annotations

from typing import Protocol

_BLOCK_BYTES = 1 << 20  # hashed and written while in the cache


class Digest(Protocol):
    """A hash in the making, as hashlib and blake3 have it."""

    def update(self, data: memoryview, /) -> object:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Return the hash so far, in hex."""


class Sink(Protocol):
    """What can be written to. A raw file may take a part of what it is given."""

    def write(self, data: memoryview, /) -> int:
        """Take bytes, and return how many."""


class HashingFile:
    """Passes on, hashes and counts what is written to it."""

    def __init__(self, file: Sink, digest: Digest) -> None:
        self._file, self._digest = file, digest
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._digest.update(block)
            while block:
                block = block[self._file.write(block) :]
        self.size += len(view)
        return len(view)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
