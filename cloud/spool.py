"""Where updates wait until they are folded: files that are written as the bytes arrive, hashed on the way.

A file is `<device>.part` until it is whole, checked and on disk; then it is renamed. Its length is the
offset at which an upload that was cut goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from edgefl.errors import ProtocolError

_COPY_BYTES = 4 << 20


class Spool:
    """The updates of all open rounds, under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)

    def file(self, job: str, number: int, device: str) -> Path:
        """Return where a device's whole update is."""
        return self._folder / job / str(number) / device

    def received_bytes(self, job: str, number: int, device: str) -> int:
        """Return how much of an update is here."""
        part = _part(self.file(job, number, device))
        return part.stat().st_size if part.exists() else 0

    def path(self, name: str) -> Path:
        """Return the file of a name that `Incoming.finish` returned."""
        return self._folder / name

    def incoming(self, job: str, number: int, device: str, offset: int) -> Incoming:
        """Go on with an update at an offset up to `received_bytes`."""
        target = self.file(job, number, device)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Incoming(target, offset, str(target.relative_to(self._folder)))

    def drop_round(self, job: str, number: int) -> None:
        """Forget a round's updates, whole or in part."""
        shutil.rmtree(self._folder / job / str(number), ignore_errors=True)

    def drop_job(self, job: str) -> None:
        """Forget a job's updates."""
        shutil.rmtree(self._folder / job, ignore_errors=True)


class Incoming:
    """One update on its way in. Blocking: called from worker threads."""

    def __init__(self, target: Path, offset: int, name: str) -> None:
        self.size = offset
        self._target, self._name = target, name
        self._digest = hashlib.sha256()
        self._file = _part(target).open("r+b" if offset else "wb")
        self._hash_until(offset)
        self._file.truncate(offset)

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.size += len(data)

    def stop(self) -> None:
        """Keep what came, for a resumed upload. Harmless after `finish`."""
        self._file.close()

    def finish(self, sha256: str) -> str:
        """Put the update in its place, on disk; return its name. Raises ProtocolError for a wrong hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._digest.hexdigest() != sha256:
            _part(self._target).unlink()
            raise ProtocolError(
                f"the update's bytes have SHA-256 {self._digest.hexdigest()[:16]}..., its header says {sha256[:16]}..."
            )
        _part(self._target).replace(self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._name

    def _hash_until(self, offset: int) -> None:
        left = offset
        while left:
            data = self._file.read(min(left, _COPY_BYTES))
            self._digest.update(data)
            left -= len(data)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")
