"""Hash a file while it is written: the bytes are still in the cache, so no second read is needed."""

from __future__ import annotations

from typing import Protocol

_BLOCK_BYTES = 1 << 20  # hashed and written while in the cache


class Digest(Protocol):
    """An incremental hash, as hashlib and blake3 provide it."""

    def update(self, data: memoryview, /) -> object:
        """Add the next bytes."""

    def hexdigest(self) -> str:
        """Return the hash so far, in hex."""


class Sink(Protocol):
    """A target for writes. A raw file may write only a part of the data."""

    def write(self, data: memoryview, /) -> int:
        """Write bytes, and return how many were written."""


class HashingFile:
    """Hashes and counts all data, and writes it to a file."""

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
