"""Downloads blobs and uploads updates in chunks, resumes at an offset, and hashes on the way.

A blob is `<path>.part` until its hash is verified; then it is renamed. For speed, a chunk goes from gRPC's buffer to
the file, and from the mapped file into one message, without protobuf objects (two more copies), and a file of the
right size is overwritten instead of created (ten times cheaper if new memory pages are slow).
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

import grpc
from blake3 import blake3

from edge_agent.disk import space_for
from edge_agent.link.channel import CloudChannel
from edge_agent.store import Outgoing
from edgefl.errors import CloudUnreachable, ManifestRejected, ParentLeft
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.chunks import CHUNK_BYTES, chunk_data, encode_upload
from edgefl.protocols.fields import to_json
from edgefl.protocols.messages import BlobRef
from edgefl.protocols.ports.client_channel import answered, connected

STALL_S = 120.0  # a transfer without progress for this long is restarted
MAX_IDLE_ATTEMPTS = 6  # in a row without progress; then give up until `Next` lists it again
_TRANSIENT = frozenset({
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip
_HASH_BYTES = 1 << 20
_MAPPED_BYTES = 64 << 20  # a multiple of CHUNK_BYTES


async def download(
    channel: CloudChannel, ref: BlobRef, path: Path, *, fast_hash: str = "", reuse: Path | None = None
) -> None:
    """Download a blob to `path`, completely or not at all; raises CloudUnreachable, ManifestRejected, DiskFull.

    `fast_hash` is its BLAKE3, checked instead of SHA-256 because it takes a quarter of the time.
    `reuse` is a file that is no longer needed: if it has the right size, it is overwritten.
    """
    part = path.with_name(path.name + ".part")
    reused = reuse is not None and _take_over(reuse, part, ref.size)
    with space_for(part, ref.size, f"the download of {ref.sha256[:16]}..."):
        for from_zero in (reused, True):  # an earlier attempt may have left damaged bytes: then start again
            with _IncomingBlob(part, ref, fast_hash, from_zero=from_zero) as incoming:
                await _until_done(
                    f"the download of {ref.sha256[:16]}...", lambda: _receive(channel, incoming), incoming
                )
                if incoming.is_valid():
                    part.replace(path)
                    return
    part.unlink()
    raise ManifestRejected(f"the cloud's blob {ref.sha256[:16]}... does not match its hash")


async def upload(channel: CloudChannel, update: Outgoing, *, resume: bool) -> pb.UploadState:
    """Send an update until the cloud has it or refuses it; raises CloudUnreachable.

    `resume`: an earlier attempt may have sent a part of it, so ask the cloud first.
    """
    sending = _OutgoingUpdate(channel, update, ask=resume)
    await _until_done(f"the upload of round {update.round} of job {update.job}", sending.attempt, sending)
    return sending.state


class _Progress:
    """The progress of a transfer."""

    offset: int = 0


class _IncomingBlob(_Progress):
    """A blob being downloaded: bytes on disk up to `offset`, and their hash."""

    def __init__(self, path: Path, ref: BlobRef, fast: str, *, from_zero: bool) -> None:
        self.ref = ref
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._expected_hash = fast or ref.sha256
        self._hash = blake3() if fast else hashlib.sha256()
        self.offset = 0
        here = 0 if from_zero else os.fstat(self._file).st_size
        if 0 < here <= ref.size:
            while block := os.pread(self._file, _HASH_BYTES, self.offset):
                self._hash.update(block)
                self.offset += len(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._file)

    def take(self, data: memoryview) -> None:
        if self.offset + len(data) > self.ref.size:
            raise ManifestRejected(f"blob {self.ref.sha256[:16]}... is longer than the {self.ref.size} bytes announced")
        self._hash.update(data)
        while data:
            written = os.pwrite(self._file, data, self.offset)
            self.offset += written
            data = data[written:]

    def is_valid(self) -> bool:
        os.ftruncate(self._file, self.ref.size)
        return self._hash.hexdigest() == self._expected_hash


class _OutgoingUpdate(_Progress):
    """An update being uploaded."""

    def __init__(self, channel: CloudChannel, update: Outgoing, *, ask: bool) -> None:
        self.state = pb.UploadState()
        self._channel, self._update, self._ask = channel, update, ask

    async def attempt(self) -> bool:
        """Send what the cloud lacks; return whether it has everything.

        If the cloud answers while we write, gRPC may report the write as an error and lose the answer; the next
        attempt asks for it.
        """
        if self._ask:
            self.state = await self._channel.resume(_key(self._update))
        _refuse_unknown(self.state)
        if self.state.status == pb.UploadState.PARTIAL:
            self._ask = True  # whatever happens now, ask before the next attempt
            self.offset = min(self.state.offset, self._update.size)
            self.state = await self._send(self.offset)
            self._ask = False  # the reply says where to resume
            _refuse_unknown(self.state)
        self.offset = self.state.offset
        return bool(self.state.status != pb.UploadState.PARTIAL)

    async def _send(self, start: int) -> pb.UploadState:
        call = self._channel.upload()
        try:
            async with asyncio.timeout(STALL_S):
                await connected(call)
            await self._write(call, start)
            async with asyncio.timeout(STALL_S):
                state: pb.UploadState = await answered(call)
        finally:
            call.cancel()  # no effect on a finished call
        return state

    async def _write(self, call: grpc.aio.StreamUnaryCall[bytes, pb.UploadState], start: int) -> None:
        update = self._update
        header = pb.UploadHeader(
            key=_key(update),
            offset=start,
            size=update.size,
            blake3=update.blake3,
            weight=update.weight,
            metrics=dict(update.metrics),
            evaluation=None if update.evaluation is None else pb.Evaluation(**to_json(update.evaluation)),
        )
        with (
            update.path.open("rb") as file,
            mmap.mmap(file.fileno(), update.size, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            try:
                await _write_in_time(call, pb.UploadChunk(header=header).SerializeToString())
                for offset in range(start, update.size, CHUNK_BYTES):
                    with view[offset : offset + CHUNK_BYTES] as chunk:
                        message = encode_upload(chunk)
                    if (
                        offset - start
                    ) % _MAPPED_BYTES == 0:  # read pages count as memory of this process until they are left
                        mapped.madvise(mmap.MADV_DONTNEED)
                    await _write_in_time(call, message)
                await answered(call.done_writing())
            except asyncio.InvalidStateError:
                return  # the cloud answered before it received everything


def _key(update: Outgoing) -> pb.UpdateKey:
    return pb.UpdateKey(job=update.job, round=update.round, model=update.model)


async def _receive(channel: CloudChannel, incoming: _IncomingBlob) -> bool:
    """Read the rest of a blob."""
    if incoming.offset == incoming.ref.size:
        return True
    call = channel.download(incoming.ref.sha256, incoming.offset)
    try:
        while True:
            async with asyncio.timeout(STALL_S):
                message = await answered(call.read())
            if not isinstance(message, bytes):  # gRPC's end of stream
                return incoming.offset == incoming.ref.size
            incoming.take(chunk_data(message))
    finally:
        call.cancel()


async def _until_done(what: str, attempt: Callable[[], Awaitable[bool]], progress: _Progress) -> None:
    """Retry an interrupted transfer until it is complete or no longer makes progress."""
    idle, pauses = 0, Backoff(0.05, 2.0)
    while True:
        before = progress.offset
        try:
            if await attempt():
                return
            reason = "the cloud closed it before all bytes were sent"
        except TimeoutError:
            reason = f"no progress for {STALL_S:g} s"
        except ParentLeft as error:
            reason = str(error)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            if error.code() not in _TRANSIENT:
                raise CloudUnreachable(f"{what} was refused, {reason}") from error
        idle = 0 if progress.offset > before else idle + 1
        if idle == MAX_IDLE_ATTEMPTS:
            raise CloudUnreachable(
                f"{what} was given up at byte {progress.offset} after {idle} attempts; last: {reason}"
            )
        if idle == 0:
            pauses.reset()
        await asyncio.sleep(pauses.next_s())  # do not flood a cloud that answers with errors


def _refuse_unknown(state: pb.UploadState) -> None:
    if state.status not in pb.UploadState.Status.values():
        raise CloudUnreachable(f"the cloud answered an upload with status {state.status}, unknown to this agent")


async def _write_in_time(call: grpc.aio.StreamUnaryCall[bytes, pb.UploadState], message: bytes) -> None:
    async with asyncio.timeout(STALL_S):
        await answered(call.write(message))


def _take_over(old: Path, part: Path, size: int) -> bool:
    """Reuse an old file as the partial download if it has the right size; otherwise delete it."""
    if not old.exists():
        return False
    if old.stat().st_size != size or part.exists():
        old.unlink()
        return False
    old.replace(part)
    return True
