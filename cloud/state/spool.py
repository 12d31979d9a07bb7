"""Files of updates until they are aggregated; they are written and hashed while the bytes arrive.

An update is `<device>~part` until it is complete, checked and on disk; then it is renamed. The length of a part is
the offset at which an interrupted upload resumes. Files of finished rounds are kept and overwritten by later ones
(`<device>~reused` meanwhile, whose length has no meaning), because existing pages cost a tenth of new ones. Small
updates that are complete together are packed: they are parts of one file (`<number>~packed`), because to make and flush
a file takes longer than to receive one of them. Device names have no `~`.

Invariant: only one upload writes an update at a time, and none writes to a finished file, so the checked bytes are
the aggregated ones. A newer upload cuts off the older one, whose connection is usually dead.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from edgefl.errors import ProtocolError, UploadCutOff
from edgefl.process.durable import flush
from edgefl.trees import SpooledTree

MAX_FREE_FILES = 16
MAX_FREE_BYTES = 2 << 30
_READ_BYTES = 4 << 20
_PART, _REUSED, _PACKED = "~part", "~reused", "~packed"


class Spool:
    """The updates of all open rounds, in one folder. Methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free_folder = folder / ".free"
        shutil.rmtree(self._free_folder, ignore_errors=True)
        self._free_folder.mkdir(mode=0o700, parents=True)
        for unfinished in folder.rglob(f"*{_REUSED}"):  # of a killed process: its length is not known
            unfinished.unlink()
        self._lock = threading.Lock()
        self._free: list[Path] = []
        self._num_freed = 0
        self._numbers = itertools.count(1)  # of packed files
        self._writing: dict[Path, Incoming] = {}  # by target

    def keep_only(self, jobs: Iterable[str]) -> None:
        """Delete the updates of all other jobs, which ended before a crash of the cloud."""
        kept = {self._free_folder.name, *jobs}
        for folder in self._folder.iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def file(self, job: str, number: int, device: str) -> Path:
        """Return the path of a device's complete update."""
        return self._folder / job / str(number) / device

    def received_bytes(self, job: str, number: int, device: str) -> int:
        """Return how many bytes of an incomplete update have been received."""
        part = _part(self.file(job, number, device))
        return part.stat().st_size if part.exists() else 0

    def path(self, name: str) -> Path:
        """Return the path for the `name` of an `Incoming`."""
        return self._folder / name

    def tree(self, name: str) -> SpooledTree:
        """Return an update by the `name` of an `Incoming`, or as `pack` returned it."""
        path, is_packed, span = name.partition(f"{_PACKED}:")
        if not is_packed:
            return SpooledTree(self.path(name))
        offset, _, size = span.partition("+")
        return SpooledTree(self.path(path + _PACKED), (int(offset), int(size)))

    def pack(self, job: str, number: int, updates: Sequence[memoryview]) -> list[str]:
        """Write complete updates of a round into one new file, and flush it; return the name of each.

        A name is that of the file with the part: `job/1/3-5e0c~packed:4096+100000`. Raises UploadCutOff if the round is
        dropped meanwhile.
        """
        target = self._folder / job / str(number) / f"{next(self._numbers)}-{secrets.token_hex(4)}{_PACKED}"
        path = _part(self._free_folder / target.name)  # not in the round's folder, which may be dropped meanwhile
        with self._lock:
            if self._free:
                self._free.pop().replace(path)
        starts = [0]
        for data in updates:
            starts.append(_aligned(starts[-1] + len(data)))
        try:
            _write_all(path, zip(starts, updates, strict=False))
            with self._lock:
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.replace(target)
        except OSError:
            path.unlink(missing_ok=True)  # a full disk needs its space
            raise
        try:
            flush(target.parent)
        except FileNotFoundError as cause:
            raise UploadCutOff("the round is over") from cause
        name = target.relative_to(self._folder)
        return [f"{name}:{start}+{len(data)}" for start, data in zip(starts, updates, strict=False)]

    def discard(self, name: str) -> None:
        """Delete the file in which `pack` put an update, because none of its updates is accepted."""
        path = self.path(name.partition(f"{_PACKED}:")[0] + _PACKED)
        with self._lock, contextlib.suppress(OSError):  # it is dropped with its round at the latest
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # if it is empty

    def incoming(self, job: str, number: int, device: str, offset: int) -> Incoming:
        """Start or resume an update at an offset up to `received_bytes`; raises UploadCutOff if there are fewer."""
        target = self.file(job, number, device)
        with self._lock:
            if target in self._writing:
                self._writing.pop(target).stop()
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            reused = self._free.pop() if self._free and not offset else None
            incoming = Incoming(target, str(target.relative_to(self._folder)), reused)
            self._writing[target] = incoming
        if reused is None:
            incoming.resume_at(offset)
        return incoming

    def done_with(self, incoming: Incoming) -> None:
        """End an upload; an incomplete update is kept, so that it can be resumed."""
        incoming.stop()
        with self._lock:
            if self._writing.get(incoming.target) is incoming:
                del self._writing[incoming.target]

    def drop_round(self, job: str, number: int, owed: Collection[str] = ()) -> None:
        """Delete a round's updates, complete or not; keep some of the files for reuse.

        What `owed` devices have sent so far is kept, and its upload goes on: the next round takes it.
        """
        folder = self._folder / job / str(number)
        kept = {_part(folder / device).name for device in owed} | {f"{device}{_REUSED}" for device in owed}
        with self._lock:
            self._cut_off_below(folder, owed)
            room = MAX_FREE_BYTES - sum(path.stat().st_size for path in self._free)
            for path in list(folder.iterdir()) if folder.exists() else ():
                if path.name in kept:
                    continue
                room -= path.stat().st_size
                if len(self._free) < MAX_FREE_FILES and room >= 0 and not path.name.endswith((_PART, _REUSED)):
                    self._num_freed += 1
                    self._free.append(path.replace(self._free_folder / str(self._num_freed)))
                else:
                    path.unlink()
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)

    def drop_job(self, job: str) -> None:
        """Delete a job's updates, and the files kept for reuse."""
        with self._lock:
            self._cut_off_below(self._folder / job)
            shutil.rmtree(self._folder / job, ignore_errors=True)
            for path in self._free:
                path.unlink()
            self._free.clear()

    def _cut_off_below(self, folder: Path, owed: Collection[str] = ()) -> None:
        below = [target for target in self._writing if target.is_relative_to(folder) and target.name not in owed]
        for target in below:
            self._writing.pop(target).stop()


class Incoming:
    """One update while it is received. Methods block; a thread may stop it while another one writes."""

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

    def resume_at(self, offset: int) -> None:
        """Hash the existing bytes up to the offset, and drop the rest."""
        with self._lock:
            self._refuse_cut_off()
            while self.size < offset:
                data = os.pread(self._file, min(offset - self.size, _READ_BYTES), self.size)
                if not data:
                    raise UploadCutOff(
                        f"{self.name} has {self.size} bytes, expected {offset}; call Resume for the offset"
                    )
                self._digest.update(data)
                self.size += len(data)
            os.ftruncate(self._file, offset)

    def write(self, data: bytes | memoryview) -> None:
        """Write the next bytes; raises UploadCutOff."""
        left = memoryview(data)
        with self._lock:
            self._refuse_cut_off()
            self._digest.update(left)
            while left:
                written = os.pwrite(self._file, left, self.size)
                self.size += written
                left = left[written:]

    def finish(self, expected: str) -> None:
        """Flush the update to disk; raises ProtocolError for a wrong hash, and deletes the file then."""
        with self._lock:
            self._refuse_cut_off()
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
            if self._digest.hexdigest() != expected:
                self._close()
                self.path.unlink()
                raise _other_bytes(self._digest.hexdigest(), expected)

    def place(self) -> None:
        """Move a finished update to its final path; raises UploadCutOff."""
        self.move()
        flush(self.target.parent)

    def move(self) -> None:
        """Move a finished update to its final path, durable once its folder is flushed; raises UploadCutOff."""
        with self._lock:
            self._refuse_cut_off()
            self._close()
            self.path.replace(self.target)

    def stop(self) -> None:
        """Close the file, and keep it for a resumed upload. Does nothing after `place`."""
        with self._lock:
            if self._open:
                os.ftruncate(self._file, self.size)
                self._close()
                self.path = self.path.replace(_part(self.target))

    def _refuse_cut_off(self) -> None:
        if not self._open:
            raise UploadCutOff(f"the upload of {self.name} was cut off: a newer one has started, or the round is over")

    def _close(self) -> None:
        self._open = False
        os.close(self._file)


class Arrival:
    """One upload into the spool: opened at its first write, and one chunk behind the received ones.

    So a small update is written, checked and moved in one call. Used in the event loop and in worker threads.
    """

    def __init__(self, spool: Spool, job: str, number: int, device: str, offset: int) -> None:
        self.last = memoryview(b"")  # received, not written yet
        self.ended = False
        self._open = functools.partial(spool.incoming, job, number, device, offset)
        self._done_with = spool.done_with
        self._incoming: Incoming | None = None
        self._lock = threading.Lock()

    @property
    def is_written(self) -> bool:
        """Whether a part of the update is written, because it has several chunks."""
        return self._incoming is not None

    def write(self) -> Incoming:
        """Write the last received chunk; raises UploadCutOff."""
        with self._lock:
            if self.ended:
                raise UploadCutOff("the upload has ended")
            return self._write()

    def take(self, expected: str) -> memoryview:
        """Return all bytes of an update that is not written anywhere yet, and end the upload.

        Raises UploadCutOff, and ProtocolError if they have another hash.
        """
        with self._lock:
            if self.ended:
                raise UploadCutOff("the upload has ended")
            self.ended = True
            data, self.last = self.last, memoryview(b"")
        if (seen := blake3(data).hexdigest()) != expected:
            raise _other_bytes(seen, expected)
        return data

    def end(self) -> None:
        """Close the file; received bytes are kept if possible, and a resumed upload asks for their number."""
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


def _write_all(path: Path, parts: Iterable[tuple[int, memoryview]]) -> None:
    """Write parts of a file at their offsets, and flush it."""
    descriptor, end = os.open(path, os.O_RDWR | os.O_CREAT, 0o600), 0
    try:
        for start, data in parts:
            left, end = data, start + len(data)
            while left:
                left = left[os.pwrite(descriptor, left, end - len(left)) :]
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aligned(offset: int) -> int:
    """Return where the next part begins, so that each can be mapped into memory by itself."""
    return -(-offset // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _other_bytes(seen: str, expected: str) -> ProtocolError:
    return ProtocolError(f"the update's bytes have BLAKE3 {seen[:16]}..., expected {expected[:16]}... from its header")


def _part(target: Path) -> Path:
    return target.with_name(target.name + _PART)
