"""Content-addressed files: a blob's name is the SHA-256 of its bytes, and it never changes.

A blob appears whole or not at all: it is written beside, flushed to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgefl.errors import ProtocolError
from edgefl.hashing import HashingFile
from edgefl.protocols.messages import BlobRef
from edgefl.trees import Tree, write_tree


class BlobStore:
    """Blobs in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        for left_over in folder.glob(".incoming-*"):  # of a process that was killed while writing
            left_over.unlink()

    def path(self, sha256: str) -> Path:
        """Return where a blob is, or would be; raises ProtocolError for what is no digest."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ProtocolError(f"{sha256[:80]!r} is not a SHA-256 in hex")
        return self._folder / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def put(self, data: bytes) -> BlobRef:
        """Store bytes."""
        return self.write(lambda file: file.write(data))

    def put_tree(self, tree: Tree) -> BlobRef:
        """Store a tree in safetensors format, tensor by tensor."""
        return self.write(lambda file: write_tree(tree, file))

    def write(self, fill: Callable[[HashingFile], object]) -> BlobRef:
        """Store what `fill` writes into the file that it is given."""
        descriptor, name = tempfile.mkstemp(prefix=".incoming-", dir=self._folder)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                hashing = HashingFile(file, hashlib.sha256())
                fill(hashing)
                file.flush()
                os.fsync(file.fileno())
            ref = BlobRef(sha256=hashing.hexdigest(), size=hashing.size)
            temporary.replace(self.path(ref.sha256))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return ref

    def delete(self, sha256: str) -> None:
        """Forget a blob; a reader that has it open reads on."""
        self.path(sha256).unlink(missing_ok=True)
