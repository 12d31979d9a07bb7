"""Content-addressed files: a blob's name is the SHA-256 of its bytes, and it never changes.

A blob is complete or does not exist: it is written to a temporary file, flushed to disk, then renamed.
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
_READ_BYTES = 256 << 10  # fits into the CPU's cache


class BlobStore:
    """Blobs in one folder."""

    def __init__(self, folder: Path, *, is_ours: bool = True) -> None:
        """Open the folder, of which this process is the only user if `is_ours`."""
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}  # BLAKE3 by SHA-256, of checked blobs
        folder.mkdir(mode=0o700, exist_ok=True)
        if is_ours:
            for left_over in folder.glob(".incoming-*"):  # of a process that was killed while writing
                left_over.unlink()

    @property
    def folder(self) -> Path:
        return self._folder

    def path(self, sha256: str) -> Path:
        """Return a blob's path, whether it exists or not; raises ProtocolError if `sha256` is not a digest."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ProtocolError(f"{sha256[:80]!r} is not a SHA-256 in hex")
        return self._folder / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def check(self, sha256: str) -> str:
        """Check a blob's hash and return its BLAKE3; raises BlobDamaged for a wrong hash, NotFound if there is no blob.

        SHA-256 is computed the first time only; later checks compare BLAKE3, in a quarter of the time.
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
                f"blob {sha256[:16]}... on the cloud's disk does not have the hash in its name: the disk or another "
                f"program has changed {path}. Upload it again, or start from another model"
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
        both = BlobDigest()
        ref = self.write(lambda file: write_tree(tree, file), both)
        self._remember(ref.sha256, both.blake3())
        return ref

    def adopt(self, file: Path, sha256: str, digest: BlobDigest) -> None:
        """Move a file, whose bytes have been hashed while they were written, into the store.

        Raises BlobDamaged, and deletes the file, if its bytes do not have this hash.
        """
        with file.open("rb") as written:
            os.fsync(written.fileno())
        if digest.hexdigest() != sha256:
            file.unlink()
            raise BlobDamaged(f"the bytes of blob {sha256[:16]}... have the hash {digest.hexdigest()[:16]}...")
        file.replace(self.path(sha256))
        self._remember(sha256, digest.blake3())

    def write(self, fill: Callable[[HashingFile], object], digest: Digest | None = None) -> BlobRef:
        """Store the bytes that `fill` writes to its file."""
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
        """Delete a blob; a reader that has it open can continue."""
        self.path(sha256).unlink(missing_ok=True)
        with self._lock:
            self._known.pop(sha256, None)


class BlobDigest:
    """Computes both hashes of a blob, SHA-256 and BLAKE3, in one pass."""

    def __init__(self) -> None:
        self._sha256, self._blake3 = hashlib.sha256(), blake3()

    def update(self, data: memoryview, /) -> None:
        self._sha256.update(data)
        self._blake3.update(data)

    def hexdigest(self) -> str:
        """Return the SHA-256, the blob's name."""
        return self._sha256.hexdigest()

    def blake3(self) -> str:
        return self._blake3.hexdigest()


def blake3_of(path: Path) -> str:
    """Return a file's BLAKE3."""
    digest = blake3()
    hash_file(path, digest)
    return digest.hexdigest()


def hash_file(path: Path, digest: Digest) -> None:
    """Add a file's bytes to a hash, read in blocks: a mapped file would count as memory of this process."""
    block = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
