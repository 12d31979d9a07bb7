"""Where updates wait until they are folded: files that are written as the bytes arrive, hashed on the way.

An update is `<device>.part` until it is whole, checked and on disk; then it is renamed. A part's length is
the offset at which an upload that was cut goes on. Files of finished rounds are kept for the next ones
and overwritten (`<device>.reused` meanwhile, whose length says nothing): pages that the system has
already cost a tenth of new ones.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

from blake3 import blake3

from edgefl.errors import ProtocolError

MAX_FREE_FILES = 16
MAX_FREE_BYTES = 2 << 30
_READ_BYTES = 4 << 20


class Spool:
    """The updates of all open rounds, under one folder. Used from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free_folder = folder / ".free"
        shutil.rmtree(self._free_folder, ignore_errors=True)
        self._free_folder.mkdir(mode=0o700, parents=True)
        for unfinished in folder.rglob("*.reused"):  # of a process that was killed: nobody knows its length
            unfinished.unlink()
        self._lock = threading.Lock()
        self._free: list[Path] = []
        self._num_freed = 0

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
        with self._lock:
            reused = self._free.pop() if self._free and not offset else None
        return Incoming(target, offset, str(target.relative_to(self._folder)), reused)

    def drop_round(self, job: str, number: int) -> None:
        """Forget a round's updates, whole or in part; keep some of the files for the next round."""
        folder = self._folder / job / str(number)
        with self._lock:
            room = MAX_FREE_BYTES - sum(path.stat().st_size for path in self._free)
            for path in folder.iterdir() if folder.exists() else ():
                room -= path.stat().st_size
                if len(self._free) < MAX_FREE_FILES and room >= 0 and path.suffix not in {".part", ".reused"}:
                    self._num_freed += 1
                    self._free.append(path.replace(self._free_folder / str(self._num_freed)))
        shutil.rmtree(folder, ignore_errors=True)

    def drop_job(self, job: str) -> None:
        """Forget a job's updates, and the files that were kept for its next round."""
        shutil.rmtree(self._folder / job, ignore_errors=True)
        with self._lock:
            for path in self._free:
                path.unlink()
            self._free.clear()


class Incoming:
    """One update on its way in. Blocking: called from worker threads."""

    def __init__(self, target: Path, offset: int, name: str, reused: Path | None) -> None:
        self.size = offset
        self._target, self._name = target, name
        self._digest = blake3()
        self._path = _part(target)
        if reused is not None:
            self._path.unlink(missing_ok=True)
            self._path = reused.replace(target.with_name(f"{target.name}.reused"))
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        if reused is None:
            self._hash_until(offset)
            os.ftruncate(self._file, offset)
        self._open = True

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        self._digest.update(left)
        while left:
            written = os.pwrite(self._file, left, self.size)
            self.size += written
            left = left[written:]

    def stop(self) -> None:
        """Keep what came, for a resumed upload. Harmless after `finish`."""
        if self._open:
            self._close()
            self._path = self._path.replace(_part(self._target))

    def finish(self, wanted: str) -> str:
        """Put the update in its place, on disk; return its name. Raises ProtocolError for a wrong hash."""
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        self._close()
        if self._digest.hexdigest() != wanted:
            self._path.unlink()
            raise ProtocolError(
                f"the update's bytes have BLAKE3 {self._digest.hexdigest()[:16]}..., its header says {wanted[:16]}..."
            )
        self._path.replace(self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._name

    def _close(self) -> None:
        os.ftruncate(self._file, self.size)
        os.close(self._file)
        self._open = False

    def _hash_until(self, offset: int) -> None:
        at = 0
        while at < offset:
            data = os.pread(self._file, min(offset - at, _READ_BYTES), at)
            self._digest.update(data)
            at += len(data)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")
