"""Content-addressed files: a blob's name is the SHA-256 of its bytes, and it never changes.

A blob appears whole or not at all: it is written beside, flushed to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from edgefl.errors import BlobDamaged, NotFound, ProtocolError
from edgefl.hashing import Digest, HashingFile
from edgefl.protocols.messages import BlobRef
from edgefl.trees import Tree, write_tree

MAX_KNOWN = 1000
_READ_BYTES = 256 << 10  # stay in the cache


class BlobStore:
    """Blobs in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}  # BLAKE3 by SHA-256, of blobs that were right
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

    def check(self, sha256: str) -> str:
        """Return a blob's BLAKE3; raises BlobDamaged where its bytes are not what its name says, NotFound for none.

        SHA-256 is computed once; a blob whose BLAKE3 is known is held against that, in a quarter of the time.
        """
        path = self.path(sha256)
        with self._lock:
            known = self._known.get(sha256)
        try:
            fast = blake3_of(path)
            right = fast == known if known is not None else _sha256_of(path) == sha256
        except FileNotFoundError as cause:
            raise NotFound(f"the cloud has no blob {sha256}") from cause
        if not right:
            raise BlobDamaged(
                f"the bytes of blob {sha256[:16]}... on the cloud's disk are not what its name says: the disk or "
                f"something else has changed {path}. Upload it again, or begin from another model"
            )
        self._remember(sha256, fast)
        return fast

    def _remember(self, sha256: str, fast: str) -> None:
        with self._lock:
            self._known.pop(sha256, None)
            self._known[sha256] = fast
            while len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]

    def put(self, data: bytes) -> BlobRef:
        """Store bytes."""
        return self.write(lambda file: file.write(data))

    def put_tree(self, tree: Tree) -> BlobRef:
        """Store a tree in safetensors format, tensor by tensor."""
        fast = blake3()
        ref = self.write(lambda file: write_tree(tree, file), _Both(hashlib.sha256(), fast))
        self._remember(ref.sha256, fast.hexdigest())
        return ref

    def write(self, fill: Callable[[HashingFile], object], digest: Digest | None = None) -> BlobRef:
        """Store what `fill` writes into the file that it is given."""
        descriptor, name = tempfile.mkstemp(prefix=".incoming-", dir=self._folder)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                hashing = HashingFile(file, digest or hashlib.sha256())
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
        with self._lock:
            self._known.pop(sha256, None)


class _Both:
    """Computes two hashes of the written data in one pass."""

    def __init__(self, name: Digest, fast: blake3) -> None:
        self._name, self._fast = name, fast

    def update(self, data: memoryview, /) -> None:
        self._name.update(data)
        self._fast.update(data)

    def hexdigest(self) -> str:
        return self._name.hexdigest()


def blake3_of(path: Path) -> str:
    """Hash by blocks: mapped, the file would count as this process's memory once more."""
    digest, block = blake3(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
