"""A region's connection to its parent: one stream that tells both of each other, downloads, and partial sums.

It reconnects by itself; without it the region serves its devices, ends its rounds and keeps their sums.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cloud.region.server.enrolment import RegionProfile
from cloud.state.blobs import BlobDigest, BlobStore, hash_file
from cloud.state.storage import waits_for
from edgefl.errors import BlobDamaged, CloudUnreachable, EnrolmentRefused, ManifestRejected, ParentLeft, ProtocolError
from edgefl.hashing import HashingFile
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tiers
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.chunks import CHUNK_BYTES, chunk_data, encode_upload
from edgefl.protocols.ports.client_channel import answered, close_after, open_channel
from edgefl.protocols.tiers import RECEIVES, MessageReply, SumNote
from edgefl.protocols.tiers.mirror import Mirror, MirrorCopy
from edgefl.protocols.tiers.version import stated, version_fault
from edgefl.protocols.tls import Identity

FIRST_DELAY_S, LAST_DELAY_S = 0.2, 2.0
STALL_S = 120.0
RENEW_S = 15.0  # for an answer from the top
MAPPED_BYTES = 64 << 20  # of a sum that is sent; a multiple of CHUNK_BYTES
# After a refusal, e.g. of this version or certificate: only an operator can end it, or the parent's next state.
REFUSED_FIRST_S, REFUSED_LAST_S = 1.0, 60.0
REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
}  # fmt: skip
MAX_UNKNOWN = 5  # refusals because it is not enrolled, within a quarter of a minute
MAX_ATTEMPTS = 6  # of a download, in a row without progress
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SumFile:
    """A partial sum, or a reply, as it is sent."""

    job: str
    round: int
    number: int  # of the region's sums in this round, from 1; 0 = a device's reply to a message
    path: Path | None  # None = a reply without content
    blake3: str
    note: SumNote | MessageReply
    model: str = ""  # of a sum: SHA-256 of the model from which it was trained

    @property
    def key(self) -> pb.UpdateKey:
        return pb.UpdateKey(job=self.job, round=self.round, sum=self.number, model=self.model)


class Uplink:
    """The connection of one region. Used in its event loop, but for `mirror`."""

    def __init__(
        self, profile: RegionProfile, identity: Identity, blobs: BlobStore, folder: Path, mirror: Mirror,
        on_change: Callable[[str, bytes | None], None],
    ) -> None:  # fmt: skip
        self._name, self._target, self._server_name = profile.name, profile.parent_grpc, profile.server_name
        self._identity, self._blobs, self._folder = identity, blobs, folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self.mirror = mirror
        self.copy = MirrorCopy(on_change)
        self.reason = "it has not connected yet"  # why there is no connection; empty = there is one
        self.up_bytes = self.down_bytes = 0
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._is_up = asyncio.Event()
        self._attached: Any = None  # the call of the present stream
        self._former: dict[asyncio.Task[None], grpc.aio.Channel] = {}  # replaced channels; each task closes one
        self._times_unknown = 0  # refusals in a row, because this region is not enrolled
        self._open()

    def _open(self) -> None:
        """Open the channel with the region's present certificate."""
        self._channel = open_channel(self._target, self._identity, self._server_name)
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()  # weak, so that gRPC cancels a call that nobody holds
        call = self._channel
        to_key, to_state = pb.UpdateKey.SerializeToString, pb.UploadState.FromString
        self._attach: Any = call.stream_stream(
            "/edgefl.v1.Tier/Attach", pb.TierItem.SerializeToString, pb.TierItem.FromString
        )
        self._renew: Any = call.unary_unary(
            "/edgefl.v1.Tier/Renew", pb.RenewRequest.SerializeToString, pb.RenewReply.FromString
        )
        self._resume: Any = call.unary_unary("/edgefl.v1.Tier/Resume", to_key, to_state)
        self._upload: Any = call.stream_unary("/edgefl.v1.Tier/Upload", None, to_state)
        self._download: Any = call.unary_stream("/edgefl.v1.Fleet/Download", pb.DownloadRequest.SerializeToString, None)

    def reopen(self) -> None:
        """Switch to a connection with the present certificate; running transfers may finish on the old one."""
        task = asyncio.create_task(close_after(self._channel, self._calls), name="former-uplink")
        self._former[task] = self._channel
        task.add_done_callback(lambda done: self._former.pop(done, None))
        self._open()
        if self._attached is not None:
            self._attached.cancel()  # it begins again, with the new certificate

    def _begin(self, call: Any) -> Any:
        """Register a call with its channel until it is done, and return it."""
        calls = self._calls
        calls.add(call)
        call.add_done_callback(calls.discard)
        return call

    async def run(self) -> None:
        """Stay connected until cancelled; raises EnrolmentRefused if this region is not enrolled any more."""
        pauses, refusals = Backoff(FIRST_DELAY_S, LAST_DELAY_S), Backoff(REFUSED_FIRST_S, REFUSED_LAST_S, self._name)
        try:
            while True:
                refused = False
                try:
                    await self._stream(pauses)
                    self.reason = "the parent ended the connection"
                except (grpc.aio.AioRpcError, ProtocolError) as error:
                    refused = isinstance(error, ProtocolError) or error.code() in REFUSALS
                    self._note_failure(error)
                if refused:
                    await asyncio.sleep(refusals.next_s())
                else:
                    refusals.reset()
                    await asyncio.sleep(pauses.next_s())
        finally:
            for task in (*self._fetching.values(), *self._former):
                task.cancel()
            for channel in (*self._former.values(), self._channel):  # a task cancelled before its start closed nothing
                await channel.close(None)

    def _note_failure(self, error: grpc.aio.AioRpcError | ProtocolError) -> None:
        """Note why there is no connection; raises EnrolmentRefused if the fleet has refused this region often enough.

        Not at once: a parent that is a region itself may hear of a new region after it.
        """
        former, self.reason = self.reason, _reason(error)
        if self.reason != former:
            event(_log, logging.WARNING, "uplink.down", parent=self._target, reason=self.reason)
        unknown = isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.PERMISSION_DENIED
        self._times_unknown = self._times_unknown + 1 if unknown else 0
        if self._times_unknown == MAX_UNKNOWN:
            raise EnrolmentRefused(
                f"region {self._name!r} stops, so that its devices find other parents: {self.reason}"
            )

    async def _stream(self, pauses: Backoff) -> None:
        """Serve one stream until it ends; raises AioRpcError, ProtocolError if the parent cannot be understood."""
        self.copy.begin()
        call = self._attached = self._attach(self._items(), wait_for_ready=True, metadata=stated())
        is_first = True
        try:
            async for item in call:
                if is_first and (
                    fault := version_fault(
                        f"the parent {self._target}", f"region {self._name!r}", await call.initial_metadata()
                    )
                ):
                    raise ProtocolError(fault)
                is_first = False
                self.copy.take(item)
                if item.complete:
                    pauses.reset()
                    self.reason = ""
                    self._is_up.set()
                    event(_log, logging.INFO, "uplink.up", parent=self._target)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        finally:
            self._attached = None
            self._is_up.clear()
            call.cancel()

    async def _items(self) -> AsyncIterator[pb.TierItem]:
        async for item in self.mirror.items():
            yield item

    async def fetch(self, sha256: str) -> None:
        """Get a blob that this region lacks; raises CloudUnreachable, ManifestRejected, FileNotFoundError."""
        if self._blobs.has(sha256):
            return
        task = self._fetching.get(sha256)
        if task is None:
            task = self._fetching[sha256] = asyncio.create_task(self._fetch(sha256), name=f"fetch-{sha256[:8]}")
            task.add_done_callback(lambda _: self._fetching.pop(sha256, None))
        await asyncio.shield(task)

    async def _fetch(self, sha256: str) -> None:
        part = self._folder / f"{sha256}.part"
        idle, pauses = 0, Backoff(0.05, 2.0)
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                digest = await self._receive(sha256, part)
                return await asyncio.to_thread(self._adopt, part, sha256, digest)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise FileNotFoundError(error.details()) from error
                reason = f"{error.code().name}: {error.details()}"
            except (TimeoutError, ParentLeft) as error:
                reason = str(error) or f"no progress for {STALL_S:g} s"
            except OSError as error:
                if not (awaited := waits_for(error)):
                    raise
                reason = f"this region waits for {awaited}"
            idle = 0 if part.exists() and part.stat().st_size > before else idle + 1
            if idle == MAX_ATTEMPTS:
                raise CloudUnreachable(f"the download of {sha256[:16]}... from the parent was given up; last: {reason}")
            await asyncio.sleep(pauses.next_s())

    async def _receive(self, sha256: str, part: Path) -> BlobDigest:
        """Receive what `part` still lacks; return the hashes of all of it."""
        digest = BlobDigest()
        with part.open("ab") as file:
            offset, hashing = file.tell(), HashingFile(file, digest)
            if offset:
                await asyncio.to_thread(hash_file, part, digest)
            request = pb.DownloadRequest(sha256=sha256, offset=offset)
            call = self._begin(self._download(request, wait_for_ready=True))
            try:
                while True:
                    async with asyncio.timeout(STALL_S):
                        message = await answered(call.read())
                    if not isinstance(message, bytes):
                        return digest
                    data = chunk_data(message)
                    self.down_bytes += len(data)
                    await asyncio.to_thread(hashing.write, data)
            finally:
                call.cancel()

    def _adopt(self, part: Path, sha256: str, digest: BlobDigest) -> None:
        try:
            self._blobs.adopt(part, sha256, digest)
        except BlobDamaged as error:
            raise ManifestRejected(f"the parent's blob {sha256[:16]}... does not match its hash") from error

    async def renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        """Send this region's request for a certificate, or pass on that of a member below; raises AioRpcError."""
        reply: pb.RenewReply = await answered(self._begin(self._renew(request, timeout=RENEW_S, metadata=stated())))
        return reply

    async def send(self, one: SumFile) -> pb.UploadState:
        """Send a sum or a reply until the parent has it, or says that it does not want it."""
        pauses, ask = Backoff(FIRST_DELAY_S, LAST_DELAY_S), False
        offset = 0
        while True:
            await self._is_up.wait()  # to a parent that refuses this region, nothing is sent
            try:
                if ask:
                    state: pb.UploadState = await answered(
                        self._begin(self._resume(one.key, wait_for_ready=True, metadata=stated()))
                    )
                    if state.status != pb.UploadState.PARTIAL:
                        return state
                    offset = state.offset
                state = await self._send(one, offset)
                if state.status != pb.UploadState.PARTIAL:
                    return state
                offset, ask = state.offset, False
                pauses.reset()
            except (grpc.aio.AioRpcError, TimeoutError, ParentLeft, asyncio.InvalidStateError) as error:
                refused = isinstance(error, grpc.aio.AioRpcError) and error.code() in {
                    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED,
                }  # fmt: skip
                reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else repr(error)
                event(_log, logging.WARNING, "sum.waits", job=one.job, round=one.round, reason=reason)
                if refused:
                    return pb.UploadState(status="REFUSED", reason=reason)
                ask = True
            await asyncio.sleep(pauses.next_s())

    async def _send(self, one: SumFile, offset: int) -> pb.UploadState:
        size = 0 if one.path is None else one.path.stat().st_size
        header = pb.UploadHeader(
            key=one.key, offset=offset, size=size,
            blake3=one.blake3, sum=tiers.pack(one.note),
        )  # fmt: skip
        call = self._begin(self._upload(wait_for_ready=True, metadata=stated()))
        try:
            async with asyncio.timeout(STALL_S):
                await answered(call.write(pb.UploadChunk(header=header).SerializeToString()))
                replied = await answered(call.initial_metadata())
            if RECEIVES in replied and one.path is not None:
                await self._write(call, one.path, offset)
            await call.done_writing()
            async with asyncio.timeout(STALL_S):
                state: pb.UploadState = await answered(call)
        finally:
            call.cancel()
        return state

    async def _write(self, call: Any, path: Path, offset: int) -> None:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
            suppress(asyncio.InvalidStateError),  # the parent answered before it received everything
        ):
            for start in range(offset, len(view), CHUNK_BYTES):
                with view[start : start + CHUNK_BYTES] as chunk:
                    message = encode_upload(chunk)
                self.up_bytes += len(message)
                if (start - offset) % MAPPED_BYTES == 0:  # read pages count as memory of this process until then
                    mapped.madvise(mmap.MADV_DONTNEED)
                async with asyncio.timeout(STALL_S):
                    await answered(call.write(message))


def _reason(error: grpc.aio.AioRpcError | ProtocolError) -> str:
    if isinstance(error, ProtocolError):
        return str(error)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "the parent is of a version that serves no regions; update it: `pip install --upgrade edgefl-fleet`"
    return error.details() or "no reason given"
