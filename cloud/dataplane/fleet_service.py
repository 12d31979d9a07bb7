"""The server side of the gRPC data plane: plans and models down, updates up (edgefl/protocols/fleet.proto).

A device is identified by its certificate. An upload is acknowledged after it is checked, on disk and in the
database. Files are read and written in worker threads, and transfers are limited (`cloud.dataplane.transfer_limiter`).
Handing work to a thread costs as much as the work itself, so a small update or model is handed over twice only.
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
from cloud.dataplane.open_round import OpenRound
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.running_calls import RunningCalls
from cloud.dataplane.transfer_limiter import MAX_INSIDE, Transfer, TransferLimiter
from cloud.dataplane.upload_header import answer_of, header_fault, overlong
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import MOVED, REMOVED
from cloud.state.jobs import AnswerRow, Jobs
from cloud.state.spool import Arrival, Incoming, Spool
from cloud.state.storage import Storage
from cloud.trust.renewal import Renewals
from edgefl.errors import CloudUnreachable, EnrolmentRefused, ManifestRejected, ProtocolError, UploadCutOff
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.assignments import UPDATE_AGENT, pack
from edgefl.protocols.chunks import CHUNK_BYTES, encode_chunk, upload_data
from edgefl.protocols.messages import MAX_NAME_CHARS, Deliver, Fit, Signed, encode
from edgefl.terminal.text import one_line
from edgefl.trees import SpooledTree

MAX_REASON_CHARS = 2000
MAX_HOLDING = 10_000  # jobs per device for which it keeps a state
MAX_ASSIGNMENTS = 24  # per reply to `Next`, to stay below 1 MB
MAX_DOWNLOADS = 4  # per device at a time: a model, a bundle, releases

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
        checks = CallerChecks(
            is_known=deps.is_known, insecure=deps.insecure, admit=deps.admit, pace=deps.pace,
            parents_for=deps.parents_for, unsure=deps.unsure,
        )  # fmt: skip
        self.callers = Callers(checks, self.calls, workers, deps.rounds)
        self._uploads = TransferLimiter(max_inside=deps.max_transfers)
        self._downloads = TransferLimiter(max_inside=deps.max_transfers, max_each=MAX_DOWNLOADS)

    async def Next(self, request: pb.NextRequest, context: Context) -> pb.NextReply:  # noqa: N802 - gRPC's name
        device = await self.callers.device(context)
        self._deps.rounds.note_kinds(device, request.knows)
        desired = await self._run(self._deps.desired_for, device)
        parents = await self._run(self._deps.parents_for, device)
        waiting = await self._known(device, request, context)
        return pb.NextReply(
            assignments=[pack(one.assignment) for one in waiting[:MAX_ASSIGNMENTS]],
            desired=[encode(signed) for signed in desired],
            broker=self._deps.broker_url,
            ended=await self._run(self._deps.ended, request.holding[:MAX_HOLDING]),
            renew=self._is_renewal_due(context),
            parents=b"" if parents is None else encode(parents),
        )

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
            return await self._unless_stopping(final or _state("STALE"), request, device, context)
        offset = await self._run(self._deps.spool.received_bytes, request.job, request.round, device)
        return _state("PARTIAL", offset=offset)

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
                    return await self._unless_stopping(final or _state("STALE"), first.header.key, device, context)
                if fault := header_fault(first.header, opened.assignment.max_update_bytes):
                    return await self._run(self._refuse, opened, device, fault, first.header.key.round)
                num_bytes = first.header.size - first.header.offset
                state = await self._receive(_moving(requests, transfer), first.header, opened, device)
                return await self._unless_stopping(state, first.header.key, device, context)
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
                await self._run(self._refuse, opened, device, request.reason, request.key.round)
            except (OSError, SQLAlchemyError) as error:
                await self._not_stored(error, device, context)
        return pb.FailureReply()

    async def SendLog(self, request: pb.LogReport, context: Context) -> pb.LogReply:  # noqa: N802
        await receive_log(self._deps.logs, await self.callers.device(context), request, context)
        return pb.LogReply()

    async def _known(self, device: str, request: pb.NextRequest, context: Context) -> list[OpenRound]:
        """Return the rounds that wait for a device, training first; fail those whose kind its agent does not know."""
        known = []
        agent = f"agent {one_line(request.agent_version, MAX_NAME_CHARS)} does not know assignments of the kind"
        try:
            waiting = self._deps.rounds.waiting_for(device)
            waiting.sort(key=lambda one: (isinstance(one.assignment, Deliver), one.assignment.round))
            for opened in waiting:
                if (kind := opened.assignment.kind) in request.knows:
                    known.append(opened)
                else:
                    why = f"{agent} {kind!r}; {UPDATE_AGENT}"
                    await self._run(self._refuse, opened, device, why, opened.assignment.round)
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

    async def _receive(
        self, requests: AsyncIterator[bytes], header: pb.UploadHeader, opened: OpenRound, device: str
    ) -> pb.UploadState:
        """Write the chunks; the last one is written and the update finished in one call of a worker."""
        key, size = header.key, header.offset
        if size and size > (here := await self._run(self._deps.spool.received_bytes, key.job, key.round, device)):
            return _state("PARTIAL", offset=here)
        arrival = Arrival(self._deps.spool, key.job, key.round, device, header.offset)
        try:
            async for message in requests:
                data = upload_data(message)
                size += len(data)
                if size > header.size:
                    return await self._run(self._refuse, opened, device, overlong(header.size), key.round)
                opened.up_bytes += len(data)
                if arrival.last:
                    await self._run(arrival.write)
                arrival.last = data
            return await self._run(self._finish, arrival, header, opened, device)
        finally:
            # In a worker, which waits for a running write: its descriptor must not be closed and reused meanwhile.
            if not arrival.ended:
                await asyncio.shield(self._run(arrival.end))

    def _finish(self, arrival: Arrival, header: pb.UploadHeader, opened: OpenRound, device: str) -> pb.UploadState:
        try:
            incoming = arrival.write()
            if incoming.size < header.size:
                state = _state("PARTIAL", offset=incoming.size)
            else:
                state = self._accept(opened, device, header, incoming)
        finally:
            arrival.end()
        self._deps.storage.worked(header.size - header.offset)
        return state

    async def _unless_stopping(
        self, state: pb.UploadState, key: pb.UpdateKey, device: str, context: Context
    ) -> pb.UploadState:
        """Return the state; but while the cloud is stopping, STALE would be wrong, because rounds will be resumed."""
        if state.status == pb.UploadState.STALE and self._deps.rounds.wants_late(key.job, key.round, device):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the next round takes this update; send it again")
        if state.status == pb.UploadState.STALE and not self._deps.is_over(key.job, key.round):
            await context.abort(  # the device keeps its update, and sends it when it is asked here
                grpc.StatusCode.FAILED_PRECONDITION,
                "this region has not been asked for the device's part in this round yet",
            )
        if state.status == pb.UploadState.STALE and self._deps.rounds.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the cloud is stopping; its rounds continue later")
        return state

    def _accept(self, opened: OpenRound, device: str, header: pb.UploadHeader, incoming: Incoming) -> pb.UploadState:
        """Check an update, make it durable and hand it to its round; the caller then acknowledges it."""
        try:
            incoming.finish(header.blake3)
            if isinstance(opened.assignment, Fit):  # the operator reads replies to other assignments
                SpooledTree(incoming.path)
        except ProtocolError as error:
            if header.offset:  # the stored part may be damaged: restart the upload
                return _state("PARTIAL")
            return self._refuse(opened, device, str(error), header.key.round)
        answer = answer_of(header, device, incoming.name, late=header.key.round < opened.assignment.round)

        def keep(one: AnswerRow) -> None:
            incoming.place()
            self._record(opened, one)

        return _state("STORED", offset=header.size) if opened.accept(answer, keep) else _state("STALE")

    def forget(self, device: str, *, is_moved: bool = False) -> None:
        """Abort a device's calls; unless it `is_moved` in the tree, refuse its answers that are not aggregated yet.

        Call it in any thread but the event loop's. The calls end shortly after, without further changes.
        """
        for opened in () if is_moved else self._deps.rounds.having(device):
            opened.forget(device, functools.partial(self._record, opened))
        self._loop.call_soon_threadsafe(self.calls.cut, device, MOVED if is_moved else REMOVED)

    def _refuse(self, opened: OpenRound, device: str, reason: str, number: int) -> pb.UploadState:
        """Record that the device sends no update in its round `number`; a late one is just not taken."""
        reason = one_line(reason, MAX_REASON_CHARS)  # it may quote what the device sent
        job = opened.assignment.job
        event(_log, logging.WARNING, "update.failed", job=job, round=number, device=device, reason=reason)
        if number == opened.assignment.round:
            opened.accept(AnswerRow(device=device, reason=reason), lambda one: self._record(opened, one))
        return _state("REFUSED", reason=reason)

    def _record(self, opened: OpenRound, answer: AnswerRow) -> None:
        if opened.record is not None:
            opened.record(answer)
            return
        self._deps.jobs.record(opened.assignment.job, opened.assignment.round, answer)

    def _find(self, key: pb.UpdateKey, device: str) -> tuple[OpenRound | None, pb.UploadState | None]:
        """Return the open round that waits for this device, or the final state of its upload."""
        opened = self._deps.rounds.get(key.job, key.round)
        if opened is None:
            return self._find_late(key, device)
        if device not in opened.asked and not self._deps.is_over(key.job, key.round):
            return None, _state("STALE")  # of a region, which may be asked for this device yet
        if device not in opened.asked:
            return None, _state("REFUSED", reason=f"device {device} is not in the cohort of round {key.round}")
        if opened.has_answered(device):
            return None, _state("STORED")
        return opened, None

    def _find_late(self, key: pb.UpdateKey, device: str) -> tuple[OpenRound | None, pb.UploadState | None]:
        """Return the same of a round that is over: the next one may take its update."""
        later = self._deps.rounds.get(key.job, key.round + 1)
        if later is not None and later.has_late(device):
            return None, _state("STORED")
        if later is not None and later.takes_late(device):
            return later, None
        return None, _state("STALE", reason=f"round {key.round} of job {one_line(key.job, 80)} is not open")

    def _is_renewal_due(self, context: Context) -> bool:
        return not self._deps.insecure and self._deps.is_renewal_due(certificate_of(context))

    async def _run(self, function: Callable[_P, _T], *arguments: _P.args, **_named: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)


async def passed_renewal(ask: PassRenewal | None, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
    """Return the parent's answer to a device's request for a certificate, or abort the call as the parent did."""
    if ask is None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "certificates are not renewed here")
    try:
        return await ask(request)
    except grpc.aio.AioRpcError as error:
        await context.abort(error.code(), error.details() or "the parent gave no reason")
        raise


def _state(status: str, *, offset: int = 0, reason: str = "") -> pb.UploadState:
    return pb.UploadState(status=status, offset=offset, reason=reason)


async def _moving(requests: AsyncIterator[bytes], transfer: Transfer) -> AsyncIterator[bytes]:
    async for message in requests:
        transfer.moved()
        yield message
