"""The server side of the gRPC data plane: plans and models down, updates up (edgefl/protocols/fleet.proto).

A device is identified by its certificate. An upload is acknowledged after it is checked, on disk and in the
database. Files are read and written in worker threads, and transfers are limited (`cloud.dataplane.transfer_limiter`).
Handing work to a thread costs as much as the work itself, so for a small update or model that happens rarely.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc
from google.protobuf.message import DecodeError
from sqlalchemy.exc import SQLAlchemyError

from cloud.dataplane.callers import CallerChecks, Callers, certificate_of
from cloud.dataplane.device_logs import LogReader, receive_log
from cloud.dataplane.known_devices import KnownDevices
from cloud.dataplane.open_round import OpenRound
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.running_calls import RunningCalls
from cloud.dataplane.transfer_limiter import MAX_INSIDE, TransferLimiter
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import MOVED, REMOVED
from cloud.state.jobs import Jobs
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.trust.renewal import Renewals
from cloud.uploads.receiving import Uploads, state
from cloud.uploads.upload_header import header_fault
from edgefl.errors import CloudUnreachable, EnrolmentRefused, ManifestRejected, ProtocolError, UploadCutOff
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.assignments import UPDATE_AGENT, pack
from edgefl.protocols.chunks import CHUNK_BYTES, encode_chunk
from edgefl.protocols.messages import MAX_NAME_CHARS, Deliver, Signed, encode
from edgefl.terminal.text import one_line

MAX_HOLDING = 10_000  # jobs per device for which it keeps a state
MAX_ASSIGNMENTS = 24  # per reply to `Next`, to stay below 1 MB
MAX_DOWNLOADS = 4  # per device at a time: a model, a bundle, releases
_KNOWN_S = 30.0  # a certificate is looked up again after so long: a removal is heard of at once
_MAX_SMALL = 8  # files of one chunk that are kept in memory, since all devices of a round want the same

_STALLED = "the transfer made no progress for too long, or newer transfers of this device replaced it"

_log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

Context = grpc.aio.ServicerContext[Any, Any]
PassRenewal = Callable[[pb.RenewRequest], Awaitable[pb.RenewReply]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceDependencies:
    """The dependencies of the service."""

    rounds: OpenRounds
    jobs: Jobs
    blobs: BlobStore
    spool: Spool
    desired_for: Callable[[str], list[Signed]]
    ended: Callable[[Sequence[str]], list[str]]  # returns those of these jobs that have ended
    is_known: Callable[[str, str | None], bool]  # device name, serial number of its certificate
    broker_url: str
    parents_for: Callable[[str], Signed | None] = lambda _device: None  # where a device may connect; None = here alone
    unsure: Callable[[], str] = lambda: ""  # in a region: why it may not know who is enrolled
    renewals: Renewals | None = None  # None = a region, which passes requests on, or no renewals
    ca_pem: bytes = b""  # sent with a renewed certificate
    pass_renewal: PassRenewal | None = None  # in a region: asks its parent
    is_renewal_due: Callable[[bytes], bool] = lambda _certificate: False
    insecure: bool = False
    admit: Callable[[str, str], str] = lambda _device, _peer: ""  # why a connection is refused; empty = it is not
    pace: Callable[[str], float] = lambda _key: 0.0  # how long a call with this certificate must wait (s)
    max_transfers: int = MAX_INSIDE  # concurrent uploads, and as many downloads
    storage: Storage = field(default_factory=Storage)
    logs: LogReader | None = None  # None = nobody asks for logs
    is_over: Callable[[str, int], bool] = lambda _job, _round: True  # of a round that is not open
    fetch: Callable[[str], Awaitable[None]] | None = None  # in a region: gets a blob that it lacks from its parent


def handler(service: FleetService) -> grpc.GenericRpcHandler[Any, Any]:
    """Return the handler for a gRPC server; chunks stay bytes, see `edgefl.protocols.chunks`."""
    to_state = pb.UploadState.SerializeToString
    registered = service.calls.registered
    methods = {
        "Next": grpc.unary_unary_rpc_method_handler(
            registered(service.Next), pb.NextRequest.FromString, pb.NextReply.SerializeToString
        ),
        "Download": grpc.unary_stream_rpc_method_handler(registered(service.Download), pb.DownloadRequest.FromString),
        "Resume": grpc.unary_unary_rpc_method_handler(registered(service.Resume), pb.UpdateKey.FromString, to_state),
        "Upload": grpc.stream_unary_rpc_method_handler(registered(service.Upload), None, to_state),
        "Renew": grpc.unary_unary_rpc_method_handler(
            registered(service.Renew), pb.RenewRequest.FromString, pb.RenewReply.SerializeToString
        ),
        "SendLog": grpc.unary_unary_rpc_method_handler(
            registered(service.SendLog), pb.LogReport.FromString, pb.LogReply.SerializeToString
        ),
        "Fail": grpc.unary_unary_rpc_method_handler(
            registered(service.Fail), pb.FailureReport.FromString, pb.FailureReply.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler("edgefl.v1.Fleet", methods)


class FleetService:
    """Implements `service Fleet` in the event loop; everything that blocks runs in `workers`."""

    def __init__(self, deps: ServiceDependencies, workers: ThreadPoolExecutor) -> None:
        self._deps, self._workers, self._loop = deps, workers, asyncio.get_running_loop()
        self.calls = RunningCalls()
        self._known_devices = known = KnownDevices(deps.is_known, self._loop.time, _KNOWN_S)
        checks = CallerChecks(
            is_known=known.is_known, was_known=known.was_known, insecure=deps.insecure, admit=deps.admit,
            pace=deps.pace, parents_for=deps.parents_for, unsure=deps.unsure,
        )  # fmt: skip
        self.callers = Callers(checks, self.calls, workers, deps.rounds)
        self._updates = Uploads(deps.jobs, deps.spool, deps.storage, workers)
        self._uploads = TransferLimiter(max_inside=deps.max_transfers)
        self._downloads = TransferLimiter(max_inside=deps.max_transfers, max_each=MAX_DOWNLOADS)
        self._small: dict[tuple[int, ...], bytes] = {}  # messages of whole files, the oldest first

    async def Next(self, request: pb.NextRequest, context: Context) -> pb.NextReply:  # noqa: N802 - gRPC's name
        device = await self.callers.device(context)
        self._deps.rounds.note_kinds(device, request.knows)
        desired, parents, ended = await self._run(self._looked_up, device, request.holding[:MAX_HOLDING])
        waiting = await self._known(device, request, context)
        return pb.NextReply(
            assignments=[pack(one.assignment) for one in waiting[:MAX_ASSIGNMENTS]],
            desired=[encode(signed) for signed in desired],
            broker=self._deps.broker_url,
            ended=ended,
            renew=self._is_renewal_due(context),
            parents=b"" if parents is None else encode(parents),
        )

    def _looked_up(self, device: str, holding: Sequence[str]) -> tuple[list[Signed], Signed | None, list[str]]:
        """Return what the database says to a device: its releases, its parents, and those of its jobs that are over."""
        return self._deps.desired_for(device), self._deps.parents_for(device), self._deps.ended(holding)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:  # noqa: N802
        device = await self.callers.device(context)
        if not self._is_renewal_due(context):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this certificate need not be renewed yet")
        try:
            if self._deps.renewals is None:
                reply = await passed_renewal(self._deps.pass_renewal, request, context)
            else:
                certificate = await self._run(self._deps.renewals.renew, device, request.csr)
                reply = pb.RenewReply(certificate=certificate, ca=self._deps.ca_pem)
        except (ProtocolError, EnrolmentRefused) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        event(_log, logging.INFO, "device.renewed", device=device)
        return reply

    async def Download(self, request: pb.DownloadRequest, context: Context) -> None:  # noqa: N802
        device = await self.callers.any(context)
        opened = [one for one in self._deps.rounds.waiting_for(device) if one.asks_for(request.sha256)]
        opened = opened or (self._deps.rounds.asking_for(request.sha256)[:1] if self.callers.is_region(context) else [])
        sources = [one.source for one in opened if one.source is not None]
        try:
            path = sources[0] if sources else self._deps.blobs.path(request.sha256)
            if self._deps.fetch is not None:
                await self._deps.fetch(request.sha256)
            async with self._downloads.turn(device) as transfer:
                descriptor = os.open(path, os.O_RDONLY)  # within the turn, so that waiting downloads have no open file
                try:
                    size = os.fstat(descriptor).st_size
                    offset = min(request.offset, size)
                    if not offset and 0 < size <= CHUNK_BYTES:
                        await context.write(await self._whole(descriptor))
                        offset = size
                        for one in opened:
                            one.down_bytes += size
                    while offset < size and (data := await self._run(os.pread, descriptor, CHUNK_BYTES, offset)):
                        offset += len(data)
                        for one in opened:
                            one.down_bytes += len(data)
                        await context.write(encode_chunk(data))
                        transfer.moved()
                finally:
                    os.close(descriptor)
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (CloudUnreachable, ManifestRejected) as error:  # a region could not fetch it
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except FileNotFoundError:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"the cloud has no blob {request.sha256}")
        except TimeoutError:
            await context.abort(grpc.StatusCode.ABORTED, _STALLED)

    async def Resume(self, request: pb.UpdateKey, context: Context) -> pb.UploadState:  # noqa: N802
        device = await self.callers.device(context)
        opened, final = self._find(request, device)
        if final is not None or opened is None:
            return await self._unless_stopping(final or state("STALE"), request, device, context)
        offset = await self._run(self._deps.spool.received_bytes, request.job, request.round, device)
        return state("PARTIAL", offset=offset)

    async def Upload(  # noqa: N802
        self, requests: AsyncIterator[bytes], context: Context
    ) -> pb.UploadState:
        device, num_bytes = await self.callers.device(context), 0
        try:
            async with self._uploads.turn(device) as transfer:
                first = pb.UploadChunk.FromString(await anext(requests, b""))
                if first.WhichOneof("part") != "header":
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the header")
                opened, final = self._find(first.header.key, device)
                if final is not None or opened is None:
                    return await self._unless_stopping(final or state("STALE"), first.header.key, device, context)
                if fault := header_fault(first.header, opened.assignment.max_update_bytes):
                    return await self._run(self._updates.refuse, opened, device, fault, first.header.key.round)
                num_bytes = first.header.size - first.header.offset
                sent = await self._updates.receive(requests, first.header, opened, device, transfer)
                return await self._unless_stopping(sent, first.header.key, device, context)
        except DecodeError:
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message is not an UploadChunk")
        except (UploadCutOff, TimeoutError) as error:
            return await context.abort(grpc.StatusCode.ABORTED, str(error) or _STALLED)
        except (OSError, SQLAlchemyError) as error:
            return await self._not_stored(error, device, context, num_bytes)

    async def Fail(self, request: pb.FailureReport, context: Context) -> pb.FailureReply:  # noqa: N802
        device = await self.callers.device(context)
        opened, _ = self._find(request.key, device)
        if opened is not None:
            try:
                await self._run(self._updates.refuse, opened, device, request.reason, request.key.round)
            except (OSError, SQLAlchemyError) as error:
                await self._not_stored(error, device, context)
        return pb.FailureReply()

    async def SendLog(self, request: pb.LogReport, context: Context) -> pb.LogReply:  # noqa: N802
        await receive_log(self._deps.logs, await self.callers.device(context), request, context)
        return pb.LogReply()

    async def _whole(self, descriptor: int) -> bytes:
        """Return the message with all bytes of a small file."""
        key = _identity(os.fstat(descriptor))
        if (message := self._small.get(key)) is None:
            message = encode_chunk(await self._run(os.pread, descriptor, CHUNK_BYTES, 0))
            while len(self._small) >= _MAX_SMALL:
                del self._small[next(iter(self._small))]
            self._small[key] = message
        return message

    async def _known(self, device: str, request: pb.NextRequest, context: Context) -> list[OpenRound]:
        """Return the rounds that wait for a device, training first; fail those whose kind its agent does not know."""
        known = []
        agent = f"agent {one_line(request.agent_version, MAX_NAME_CHARS)} does not know assignments of the kind"
        try:
            waiting = [one for one in self._deps.rounds.waiting_for(device) if not one.unreachable("")]
            waiting.sort(key=lambda one: (isinstance(one.assignment, Deliver), one.assignment.round))
            for opened in waiting:
                if (kind := opened.assignment.kind) in request.knows:
                    known.append(opened)
                else:
                    why = f"{agent} {kind!r}; {UPDATE_AGENT}"
                    await self._run(self._updates.refuse, opened, device, why, opened.assignment.round)
        except (OSError, SQLAlchemyError) as error:
            await self._not_stored(error, device, context)
        return known

    async def _not_stored(self, error: Exception, device: str, context: Context, num_bytes: int = 0) -> NoReturn:
        """Abort a call with a status after which the device retries; until then the round's deadline is paused."""
        if not self._deps.storage.refused(error, num_bytes):
            event(_log, logging.ERROR, "upload.not_stored", device=device, error=error)
        cause = getattr(error, "orig", None) or error
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the cloud cannot store it now: {cause}")
        raise error  # not reached: an aborted call raises

    async def _unless_stopping(
        self, sent: pb.UploadState, key: pb.UpdateKey, device: str, context: Context
    ) -> pb.UploadState:
        """Return the state, but abort where STALE would be wrong: the device keeps its update, to send it later."""
        if sent.status == pb.UploadState.STALE and self._deps.rounds.wants_late(key.job, key.round, device):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the next round takes this update; send it again")
        regional, opened = self._deps.rounds.regional(key.job), self._deps.rounds.get(key.job, key.round)
        if sent.status == pb.UploadState.STALE and regional is not None:
            if regional.is_around(key) and regional.waits_for(device):  # it may come back to its region
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, regional.unreachable(""))
            return sent
        if sent.status == pb.UploadState.STALE and opened is not None and opened.waits_for(device):
            return sent  # of another model: it trains again
        if sent.status == pb.UploadState.STALE and not self._deps.is_over(key.job, key.round):
            await context.abort(  # the device keeps its update, and sends it when it is asked here
                grpc.StatusCode.FAILED_PRECONDITION,
                "this region has not been asked for the device's part in this round yet",
            )
        if sent.status == pb.UploadState.STALE and self._deps.rounds.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the cloud is stopping; its rounds continue later")
        return sent

    def forget(self, device: str, *, is_moved: bool = False) -> None:
        """Abort a device's calls; unless it `is_moved` in the tree, refuse its answers that are not aggregated yet.

        Call it in any thread but the event loop's. The calls end shortly after, without further changes.
        """
        self._known_devices.forget(device)
        try:
            for opened in () if is_moved else self._deps.rounds.having(device):
                opened.forget(device, functools.partial(self._updates.record, opened))
        finally:
            self._loop.call_soon_threadsafe(self.calls.cut, device, MOVED if is_moved else REMOVED)

    def _find(self, key: pb.UpdateKey, device: str) -> tuple[OpenRound | None, pb.UploadState | None]:
        """Return the open round that waits for this device, or the final state of its upload."""
        opened = self._deps.rounds.get(key.job, key.round)
        if opened is None or self._deps.rounds.regional(key.job) is not None:
            return self._find_late(key, device)
        if device not in opened.asked and not self._deps.is_over(key.job, key.round):
            return None, state("STALE")  # of a region, which may be asked for this device yet
        if device not in opened.asked:
            return None, state("REFUSED", reason=f"device {device} is not in the cohort of round {key.round}")
        if opened.has_answered(device):
            return None, state("STORED")
        if not opened.is_of(key):
            return None, state("STALE", reason="it was trained from another model than this round's")
        return opened, None

    def _find_late(self, key: pb.UpdateKey, device: str) -> tuple[OpenRound | None, pb.UploadState | None]:
        """Return the same of a round that is over: the next one may take its update."""
        if self._deps.rounds.regional(key.job) is not None:
            return None, state("STALE", reason="in this job regions answer to the cloud, not devices")
        later = self._deps.rounds.get(key.job, key.round + 1)
        if later is not None and later.has_late(device):
            return None, state("STORED")
        if later is not None and later.takes_late(device):
            return later, None
        return None, state("STALE", reason=f"round {key.round} of job {one_line(key.job, 80)} is not open")

    def _is_renewal_due(self, context: Context) -> bool:
        return not self._deps.insecure and self._deps.is_renewal_due(certificate_of(context))

    async def _run(self, function: Callable[_P, _T], *arguments: _P.args, **_named: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what is another one for a file with other bytes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def passed_renewal(ask: PassRenewal | None, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
    """Return the parent's answer to a device's request for a certificate, or abort the call as the parent did."""
    if ask is None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "certificates are not renewed here")
    try:
        return await ask(request)
    except grpc.aio.AioRpcError as error:
        await context.abort(error.code(), error.details() or "the parent gave no reason")
        raise
