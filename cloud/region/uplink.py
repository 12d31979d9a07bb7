"""A region's connection to its parent: one stream that tells both of each other, downloads, and partial sums.

It reconnects by itself; without it the region serves its devices, ends its rounds and keeps their sums.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mmap
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cloud.state.blobs import BlobStore
from edgefl.errors import CloudUnreachable, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tiers
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.chunks import CHUNK_BYTES, chunk_data, encode_upload
from edgefl.protocols.tiers import RECEIVES, SumNote
from edgefl.protocols.tiers.mirror import Mirror, MirrorCopy
from edgefl.protocols.tls import Identity, grpc_channel_credentials

FIRST_DELAY_S, LAST_DELAY_S = 0.2, 2.0
STALL_S = 120.0
RENEW_S = 15.0  # for an answer from the top
MAPPED_BYTES = 64 << 20  # of a sum that is sent; a multiple of CHUNK_BYTES
MAX_ATTEMPTS = 6  # of a download, in a row without progress
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1500),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.http2.max_frame_size", 1 << 20),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SumFile:
    """A partial sum as it is sent."""

    job: str
    round: int
    number: int  # of the region's sums in this round, from 1
    path: Path
    blake3: str
    note: SumNote


class Uplink:
    """The connection of one region. Used in its event loop, but for `mirror`."""

    def __init__(
        self, target: str, server_name: str, identity: Identity, blobs: BlobStore, folder: Path,
        on_change: Callable[[str, bytes | None], None],
    ) -> None:  # fmt: skip
        self._target, self._server_name, self._identity = target, server_name, identity
        self._blobs, self._folder = blobs, folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self.mirror = Mirror()
        self.copy = MirrorCopy(on_change)
        self.reason = "it has not connected yet"  # why there is no connection; empty = there is one
        self.up_bytes = self.down_bytes = 0
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._open()

    def _open(self) -> None:
        named = (("grpc.ssl_target_name_override", self._server_name),) if self._server_name else ()
        credentials = grpc_channel_credentials(self._identity)
        self._channel = grpc.aio.secure_channel(self._target, credentials, options=(*_OPTIONS, *named))
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

    async def run(self) -> None:
        """Stay connected until cancelled."""
        pauses = Backoff(FIRST_DELAY_S, LAST_DELAY_S)
        try:
            while True:
                try:
                    await self._stream(pauses)
                    self.reason = "the parent ended the connection"
                except (grpc.aio.AioRpcError, ProtocolError) as error:
                    reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                    former, self.reason = self.reason, reason or "no reason given"
                    if self.reason != former:
                        event(_log, logging.WARNING, "uplink.down", parent=self._target, reason=self.reason)
                await asyncio.sleep(pauses.next_s())
        finally:
            for task in list(self._fetching.values()):
                task.cancel()
            await self._channel.close(None)

    async def _stream(self, pauses: Backoff) -> None:
        self.copy.begin()
        call = self._attach(self._items(), wait_for_ready=True)
        try:
            async for item in call:
                self.copy.take(item)
                if item.complete:
                    pauses.reset()
                    self.reason = ""
                    event(_log, logging.INFO, "uplink.up", parent=self._target)
        finally:
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
                await self._receive(sha256, part)
                return await asyncio.to_thread(self._adopt, part, sha256)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise FileNotFoundError(error.details()) from error
                reason = f"{error.code().name}: {error.details()}"
            except TimeoutError:
                reason = f"no progress for {STALL_S:g} s"
            idle = 0 if part.exists() and part.stat().st_size > before else idle + 1
            if idle == MAX_ATTEMPTS:
                raise CloudUnreachable(f"the download of {sha256[:16]}... from the parent was given up; last: {reason}")
            await asyncio.sleep(pauses.next_s())

    async def _receive(self, sha256: str, part: Path) -> None:
        with part.open("ab") as file:
            call = self._download(pb.DownloadRequest(sha256=sha256, offset=file.tell()), wait_for_ready=True)
            try:
                while True:
                    async with asyncio.timeout(STALL_S):
                        message = await call.read()
                    if not isinstance(message, bytes):
                        return
                    data = chunk_data(message)
                    self.down_bytes += len(data)
                    await asyncio.to_thread(file.write, data)
            finally:
                call.cancel()

    def _adopt(self, part: Path, sha256: str) -> None:
        with part.open("rb") as file:
            os.fsync(file.fileno())
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise ManifestRejected(f"the parent's blob {sha256[:16]}... does not match its hash")
        part.replace(self._blobs.path(sha256))

    async def renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        """Pass a device's request for a certificate on; raises AioRpcError."""
        reply: pb.RenewReply = await self._renew(request, timeout=RENEW_S)
        return reply

    async def send(self, one: SumFile) -> pb.UploadState:
        """Send a sum until the parent has it, or says that it does not want it."""
        pauses, ask = Backoff(FIRST_DELAY_S, LAST_DELAY_S), False
        offset = 0
        while True:
            try:
                if ask:
                    key = pb.UpdateKey(job=one.job, round=one.round, sum=one.number)
                    state: pb.UploadState = await self._resume(key, wait_for_ready=True)
                    if state.status != pb.UploadState.PARTIAL:
                        return state
                    offset = state.offset
                state = await self._send(one, offset)
                if state.status != pb.UploadState.PARTIAL:
                    return state
                offset, ask = state.offset, False
                pauses.reset()
            except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
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
        size = one.path.stat().st_size
        header = pb.UploadHeader(
            key=pb.UpdateKey(job=one.job, round=one.round, sum=one.number), offset=offset, size=size,
            blake3=one.blake3, sum=tiers.pack(one.note),
        )  # fmt: skip
        call = self._upload(wait_for_ready=True)
        try:
            async with asyncio.timeout(STALL_S):
                await call.write(pb.UploadChunk(header=header).SerializeToString())
                replied = await call.initial_metadata()
            if RECEIVES in replied:
                await self._write(call, one.path, offset)
            await call.done_writing()
            async with asyncio.timeout(STALL_S):
                state: pb.UploadState = await call
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
                    await call.write(message)
