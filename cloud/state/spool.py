"""Where updates wait until they are folded: files that are written as the bytes arrive, hashed on the way.

An update is `<device>~part` until it is whole, checked and on disk; then it is renamed. A part's length is
the offset at which an upload that was cut goes on. Files of finished rounds are kept for the next ones
and overwritten (`<device>~reused` meanwhile, whose length says nothing): pages that the system has
already cost a tenth of new ones. No device's name holds a `~`.

Invariant: one upload of an update writes at a time, and none to a file that is in its place. A newer one
cuts off the older, whose connection is dead as a rule: what was checked is what is folded.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from edgefl.errors import ProtocolError, UploadCutOff

MAX_FREE_FILES = 16
MAX_FREE_BYTES = 2 << 30
_READ_BYTES = 4 << 20
_PART, _REUSED = "~part", "~reused"


class Spool:
    """The updates of all open rounds, under one folder. Used from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free_folder = folder / ".free"
        shutil.rmtree(self._free_folder, ignore_errors=True)
        self._free_folder.mkdir(mode=0o700, parents=True)
        for unfinished in folder.rglob(f"*{_REUSED}"):  # of a process that was killed: nobody knows its length
            unfinished.unlink()
        self._lock = threading.Lock()
        self._free: list[Path] = []
        self._num_freed = 0
        self._writing: dict[Path, Incoming] = {}  # by target

    def keep_only(self, jobs: Iterable[str]) -> None:
        """Forget the updates of all jobs but these: of jobs that ended while the cloud was killed."""
        kept = {self._free_folder.name, *jobs}
        for folder in self._folder.iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def file(self, job: str, number: int, device: str) -> Path:
        """Return where a device's whole update is."""
        return self._folder / job / str(number) / device

    def received_bytes(self, job: str, number: int, device: str) -> int:
        """Return how much of an update is here."""
        part = _part(self.file(job, number, device))
        return part.stat().st_size if part.exists() else 0

    def path(self, name: str) -> Path:
        """Return the file of a name that an `Incoming` has."""
        return self._folder / name

    def incoming(self, job: str, number: int, device: str, offset: int) -> Incoming:
        """Go on with an update at an offset up to `received_bytes`; raises UploadCutOff where they are no more."""
        target = self.file(job, number, device)
        with self._lock:
            if target in self._writing:
                self._writing.pop(target).stop()
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            reused = self._free.pop() if self._free and not offset else None
            incoming = Incoming(target, str(target.relative_to(self._folder)), reused)
            self._writing[target] = incoming
        if reused is None:
            incoming.go_on_at(offset)
        return incoming

    def done_with(self, incoming: Incoming) -> None:
        """End an upload; what came is kept for a resumed one, unless it is in its place."""
        incoming.stop()
        with self._lock:
            if self._writing.get(incoming.target) is incoming:
                del self._writing[incoming.target]

    def drop_round(self, job: str, number: int) -> None:
        """Forget a round's updates, whole or in part; keep some of the files for the next round."""
        folder = self._folder / job / str(number)
        with self._lock:
            self._cut_off_below(folder)
            room = MAX_FREE_BYTES - sum(path.stat().st_size for path in self._free)
            for path in folder.iterdir() if folder.exists() else ():
                room -= path.stat().st_size
                if len(self._free) < MAX_FREE_FILES and room >= 0 and not path.name.endswith((_PART, _REUSED)):
                    self._num_freed += 1
                    self._free.append(path.replace(self._free_folder / str(self._num_freed)))
            shutil.rmtree(folder, ignore_errors=True)

    def drop_job(self, job: str) -> None:
        """Forget a job's updates, and the files that were kept for its next round."""
        with self._lock:
            self._cut_off_below(self._folder / job)
            shutil.rmtree(self._folder / job, ignore_errors=True)
            for path in self._free:
                path.unlink()
            self._free.clear()

    def _cut_off_below(self, folder: Path) -> None:
        for target in [target for target in self._writing if target.is_relative_to(folder)]:
            self._writing.pop(target).stop()


class Incoming:
    """One update on its way in. Blocking: called from worker threads, of which another may end it meanwhile."""

    def __init__(self, target: Path, name: str, reused: Path | None) -> None:
        self.target, self.name = target, name
        self.size = 0
        self.path = _part(target)
        self._digest = blake3()
        self._lock = threading.Lock()
        if reused is not None:
            self.path.unlink(missing_ok=True)
            self.path = reused.replace(target.with_name(target.name + _REUSED))
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self._open = True

    def go_on_at(self, offset: int) -> None:
        """Hash what is here up to the offset, and forget the rest."""
        with self._lock:
            self._refuse_cut_off()
            while self.size < offset:
                data = os.pread(self._file, min(offset - self.size, _READ_BYTES), self.size)
                if not data:
                    raise UploadCutOff(f"{self.size} bytes of {self.name} are here, not {offset}: ask where to go on")
                self._digest.update(data)
                self.size += len(data)
            os.ftruncate(self._file, offset)

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes; raises UploadCutOff."""
        left = memoryview(data)
        with self._lock:
            self._refuse_cut_off()
            self._digest.update(left)
            while left:
                written = os.pwrite(self._file, left, self.size)
                self.size += written
                left = left[written:]

    def finish(self, wanted: str) -> None:
        """Bring the update to disk; raises ProtocolError for a wrong hash, and keeps nothing then."""
        with self._lock:
            self._refuse_cut_off()
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
            if self._digest.hexdigest() != wanted:
                self._close()
                self.path.unlink()
                raise ProtocolError(
                    f"the update's bytes have BLAKE3 {self._digest.hexdigest()[:16]}..., its header says "
                    f"{wanted[:16]}..."
                )

    def place(self) -> None:
        """Put a finished update where `Spool.path` says."""
        with self._lock:
            self._refuse_cut_off()
            self._close()
            self.path.replace(self.target)
        folder = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def stop(self) -> None:
        """Write no more; keep what came for a resumed upload. Harmless after `place`."""
        with self._lock:
            if self._open:
                os.ftruncate(self._file, self.size)
                self._close()
                self.path = self.path.replace(_part(self.target))

    def _refuse_cut_off(self) -> None:
        if not self._open:
            raise UploadCutOff(f"a newer upload of {self.name} has begun, or its round is over")

    def _close(self) -> None:
        self._open = False
        os.close(self._file)


class Arrival:
    """An upload's way into the spool: opened with its first write, one chunk behind what has come.

    So a small update is written, checked and put in its place in one go. From the event loop and worker threads.
    """

    def __init__(self, spool: Spool, job: str, number: int, device: str, offset: int) -> None:
        self.last = memoryview(b"")  # has come, and is not written yet
        self.ended = False
        self._open = functools.partial(spool.incoming, job, number, device, offset)
        self._done_with = spool.done_with
        self._incoming: Incoming | None = None
        self._lock = threading.Lock()

    def write(self) -> Incoming:
        """Write what came last; raises UploadCutOff."""
        with self._lock:
            if self.ended:
                raise UploadCutOff("this upload has ended")
            return self._write()

    def end(self) -> None:
        """Let go of the file; what came is kept, as far as it can be: a resumed upload asks how far that is."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
            with contextlib.suppress(UploadCutOff, OSError):
                if self.last:
                    self._write()
            if self._incoming is not None:
                self._done_with(self._incoming)

    def _write(self) -> Incoming:
        if self._incoming is None:
            self._incoming = self._open()
        data, self.last = self.last, memoryview(b"")
        self._incoming.write(data)
        return self._incoming


def _part(target: Path) -> Path:
    return target.with_name(target.name + _PART)
