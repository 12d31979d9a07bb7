"""The gRPC service for regions: their stream, and their partial sums (`service Tier` of fleet.proto).

A sum is refused or sent back to be folded again by its header, before its bytes are received: only metadata in the
reply (`RECEIVES`) lets the region send them, because gRPC may lose an answer to a call that is still being written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.message import DecodeError
from sqlalchemy.exc import SQLAlchemyError

from cloud.dataplane.callers import Callers, Context
from cloud.dataplane.fleet_service import passed_renewal
from cloud.dataplane.open_round import OpenRound
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.running_calls import RunningCalls
from cloud.dataplane.transfer_limiter import Transfer, TransferLimiter
from cloud.jobs.answers import AnswerRow
from cloud.region.children import Children
from cloud.region.sums import answers_of, sum_fault, wrong_kind
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.spool import Arrival, Incoming, Spool
from cloud.state.storage import Storage
from cloud.uploads.upload_header import answer_of, header_fault
from edgefl.errors import EnrolmentRefused, ProtocolError, UploadCutOff
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tiers
from edgefl.protocols.chunks import upload_data
from edgefl.protocols.messages import Deliver, Fit
from edgefl.protocols.tiers import RECEIVES, MessageReply, SumNote
from edgefl.protocols.tiers.version import stated, version_fault
from edgefl.terminal.text import one_line
from edgefl.trees import SpooledTree, TensorSpec, spec_of
from edgefl.trees.fragments import sent_part

MAX_REASON_CHARS = 2000
TWICE = 2.1  # a mean in float32 or float64 has at most twice the bytes of the parameters

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TierDependencies:
    """The dependencies of the service."""

    children: Children
    callers: Callers
    calls: RunningCalls
    rounds: OpenRounds
    jobs: Jobs
    blobs: BlobStore
    spool: Spool
    storage: Storage
    is_over: Callable[[str, int], bool] = lambda _job, _round: True  # of a round that is not open
    renew: Callable[[str, pb.RenewRequest], Awaitable[pb.RenewReply]] | None = None  # region, a device's request


def tier_handler(service: TierService) -> grpc.GenericRpcHandler[Any, Any]:
    """Return the handler for a gRPC server."""
    to_state = pb.UploadState.SerializeToString
    registered = service.deps.calls.registered
    methods = {
        "Attach": grpc.stream_stream_rpc_method_handler(
            registered(service.Attach), pb.TierItem.FromString, pb.TierItem.SerializeToString
        ),
        "Resume": grpc.unary_unary_rpc_method_handler(registered(service.Resume), pb.UpdateKey.FromString, to_state),
        "Renew": grpc.unary_unary_rpc_method_handler(
            registered(service.Renew), pb.RenewRequest.FromString, pb.RenewReply.SerializeToString
        ),
        "Upload": grpc.stream_unary_rpc_method_handler(registered(service.Upload), None, to_state),
    }
    return grpc.method_handlers_generic_handler("edgefl.v1.Tier", methods)


class TierService:
    """Implements `service Tier` in the event loop; everything that blocks runs in `workers`."""

    def __init__(self, deps: TierDependencies, workers: ThreadPoolExecutor) -> None:
        self.deps = deps
        self._workers = workers
        self._uploads = TransferLimiter(max_each=4)

    async def Attach(self, requests: AsyncIterator[pb.TierItem], context: Context) -> None:  # noqa: N802 - gRPC's name
        region = await self._region(context)
        await context.send_initial_metadata(stated())
        try:
            await self.deps.children.attach(region, requests, context.write)
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _region(self, context: Context) -> str:
        """Return the calling region's name; aborts the call if this side does not serve it, or not its version."""
        region = await self.deps.callers.region(context)
        if fault := version_fault(f"region {region!r}", self.deps.children.shown_name, context.invocation_metadata()):
            event(_log, logging.WARNING, "region.other_version", region=region, reason=fault)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, fault)
        return region

    async def Resume(self, request: pb.UpdateKey, context: Context) -> pb.UploadState:  # noqa: N802
        region = await self._region(context)
        opened = self.deps.rounds.get(request.job, request.round)
        if opened is None:
            return await self._unless_open_later(request, context)
        name = min(opened.asked) if isinstance(opened.assignment, Deliver) else _spooled(region, request.sum)
        offset = await self._run(self.deps.spool.received_bytes, request.job, request.round, name)
        return pb.UploadState(status="PARTIAL", offset=offset)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:  # noqa: N802
        region = await self._region(context)
        try:
            ask = None if self.deps.renew is None else functools.partial(self.deps.renew, region)
            return await passed_renewal(ask, request, context)
        except (ProtocolError, EnrolmentRefused) as error:
            event(_log, logging.WARNING, "region.renewal_refused", region=region, reason=error)
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(str(error), MAX_REASON_CHARS))

    async def Upload(self, requests: AsyncIterator[bytes], context: Context) -> pb.UploadState:  # noqa: N802
        region, num_bytes = await self._region(context), 0
        try:
            async with self._uploads.turn(region) as transfer:
                header = _header(await anext(requests, b""))
                num_bytes = header.size
                opened = self.deps.rounds.get(header.key.job, header.key.round)
                if opened is None:
                    return await self._unless_open_later(header.key, context)
                if isinstance(opened.assignment, Deliver):
                    reply = await self._take_reply(_moving(requests, transfer), header, opened, region, context)
                    return await self._unless_stopping(reply, context)
                note = tiers.unpack(SumNote, header.sum)
                state = await self._run(self._refusal, opened, region, header, note)
                if state is None:
                    await context.send_initial_metadata(((RECEIVES, "1"),))
                    name, accept = _spooled(region, header.key.sum), functools.partial(self._accept, note=note)
                    state = await self._receive(_moving(requests, transfer), header, opened, region, name, accept)
                if state.status == pb.UploadState.STALE and opened.is_of(header.key):
                    await self._unless_open_later(header.key, context)  # a region opens a round again and again
                return await self._unless_stopping(state, context)
        except (DecodeError, ProtocolError) as error:
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(str(error), MAX_REASON_CHARS))
        except (UploadCutOff, TimeoutError) as error:
            return await context.abort(grpc.StatusCode.ABORTED, str(error) or "the transfer made no progress")
        except (OSError, SQLAlchemyError) as error:
            self.deps.storage.refused(error, num_bytes)
            return await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the cloud cannot store it now: {error}")

    async def _take_reply(
        self, requests: AsyncIterator[bytes], header: pb.UploadHeader, opened: OpenRound, region: str, context: Context
    ) -> pb.UploadState:
        """Take a device's reply to a message of a Flower app, as if the device had sent it."""
        reply = tiers.unpack(MessageReply, header.sum)
        fault = header_fault(header, opened.assignment.max_update_bytes) or ""
        if not self.deps.children.speaks_for(region, reply.device) or reply.device not in opened.asked:
            fault = f"region {region!r} replies for {reply.device!r}, which is not asked, or may not connect below it"
        if fault:
            return self._refuse(opened, region, fault)
        if not opened.waits_for(reply.device):
            return pb.UploadState(status="STALE", reason="the message is answered, or not waited for any more")
        if reply.reason:
            answer = AnswerRow(device=reply.device, reason=reply.reason)
            await self._run(self._accept_reply, answer, lambda: None, opened)
            return pb.UploadState(status="STORED")
        await context.send_initial_metadata(((RECEIVES, "1"),))
        finish = functools.partial(self._finish_reply, device=reply.device)
        return await self._receive(requests, header, opened, region, reply.device, finish)

    def _finish_reply(
        self, incoming: Incoming, header: pb.UploadHeader, opened: OpenRound, region: str, *, device: str
    ) -> pb.UploadState:
        try:
            incoming.finish(header.blake3)
        except ProtocolError as error:
            return pb.UploadState(status="PARTIAL") if header.offset else self._refuse(opened, region, str(error))
        answer = dataclasses.replace(answer_of(header, device, incoming.name), region=region)
        is_new = self._accept_reply(answer, incoming.place, opened)
        return pb.UploadState(status="STORED" if is_new else "STALE", offset=header.size)

    def _accept_reply(self, answer: AnswerRow, place: Callable[[], object], opened: OpenRound) -> bool:
        job, number = opened.assignment.job, opened.assignment.round

        def keep(one: AnswerRow) -> None:
            place()
            (opened.record or functools.partial(self.deps.jobs.record, job, number))(one)

        is_new = opened.accept(answer, keep)
        self.deps.children.withdraw(answer.device, job, number)
        event(_log, logging.INFO, "reply.stored", relay=job, number=number, device=answer.device)
        return is_new

    async def _receive(
        self, requests: AsyncIterator[bytes], header: pb.UploadHeader, opened: OpenRound, region: str, name: str,
        finish: Callable[[Incoming, pb.UploadHeader, OpenRound, str], pb.UploadState],
    ) -> pb.UploadState:  # fmt: skip
        """Receive the bytes into the spool under this name; then `finish` checks and accepts them."""
        key, size = header.key, header.offset
        arrival = Arrival(self.deps.spool, key.job, key.round, name, header.offset)
        try:
            async for message in requests:
                data = upload_data(message)
                size += len(data)
                if size > header.size:
                    fault = f"the upload has more than the {header.size} bytes in its header"
                    return self._refuse(opened, region, fault)
                opened.up_bytes += len(data)
                if arrival.last:
                    await self._run(arrival.write)
                arrival.last = data
            return await self._run(self._finish, arrival, header, lambda one, of: finish(one, of, opened, region))
        finally:
            if not arrival.ended:
                await asyncio.shield(self._run(arrival.end))

    def _refusal(self, opened: OpenRound, region: str, header: pb.UploadHeader, note: SumNote) -> pb.UploadState | None:
        """Return why a sum is not received; None if it is."""
        most = TWICE * opened.assignment.max_update_bytes
        fault = wrong_kind(note, opened.assignment)
        if header.size > most:
            fault = fault or f"the sum has {header.size} bytes; at most {most:.0f} are allowed in this round"
        fault = fault or opened.unreachable(region)
        speaks_for = functools.partial(self.deps.children.speaks_for, region)
        if others := sorted(name for name in note.regions if name != region and not speaks_for(name)):
            fault = fault or f"it has a part of region {others[0]!r}, which is not below region {region!r}"
        if fault:
            return self._refuse(opened, region, fault)
        waiting = opened.waiting()
        if not waiting:
            return pb.UploadState(status="STALE", reason="the round is over")
        if not opened.is_of(header.key):
            return pb.UploadState(status="STALE", reason="it was trained from another model than this round's")
        # Also of an honest region: a device may have been removed, or assigned elsewhere, after it answered.
        strangers = sorted(name for name in note.devices if not speaks_for(name))
        if counted := sorted((note.devices - waiting).union(strangers)):
            reason = f"{', '.join(strangers[:5])} may not connect below this region" if strangers else ""
            if reason:
                event(_log, logging.WARNING, "sum.strangers", job=opened.assignment.job, round=opened.assignment.round,
                      region=region, reason=reason)  # fmt: skip
            return pb.UploadState(status="REFOLD", without=counted, reason=reason)
        key = header.key
        if self.deps.jobs.has_sum(key.job, key.round, f"{key.job}/{key.round}/{_spooled(region, key.sum)}"):
            return self._refuse(opened, region, f"another sum of this region has the number {key.sum} in this round")
        return None

    def _finish(
        self, arrival: Arrival, header: pb.UploadHeader, accept: Callable[[Incoming, pb.UploadHeader], pb.UploadState]
    ) -> pb.UploadState:
        try:
            incoming = arrival.write()
            if incoming.size < header.size:
                return pb.UploadState(status="PARTIAL", offset=incoming.size)
            return accept(incoming, header)
        finally:
            arrival.end()

    def _accept(
        self, incoming: Incoming, header: pb.UploadHeader, opened: OpenRound, region: str, *, note: SumNote
    ) -> pb.UploadState:
        """Check a sum, make it durable with the answers of all its devices, and hand it to its round."""
        assignment = opened.assignment
        try:
            incoming.finish(header.blake3)
            spec = spec_of(SpooledTree(incoming.path))
        except ProtocolError as error:
            return pb.UploadState(status="PARTIAL") if header.offset else self._refuse(opened, region, str(error))
        wanted: Mapping[str, TensorSpec] = {}
        if isinstance(assignment, Fit):
            model = SpooledTree(self.deps.blobs.path(assignment.model.sha256))
            wanted = spec_of(sent_part(model, assignment.train))
        if fault := sum_fault(note, spec, wanted if note.weights else {}):
            return self._refuse(opened, region, fault)
        answers = answers_of(note, region, incoming.name)

        def keep(rows: Sequence[AnswerRow]) -> None:
            incoming.place()
            self.deps.jobs.record_sum(assignment.job, assignment.round, incoming.name, tiers.pack(note).decode(), rows)

        counted = opened.accept_all(answers, keep)
        if counted:
            over = not opened.waiting()
            return pb.UploadState(status="STALE") if over else pb.UploadState(status="REFOLD", without=counted)
        for device in note.devices:
            self.deps.children.withdraw(device, assignment.job, assignment.round)
        event(_log, logging.INFO, "sum.stored", job=assignment.job, round=assignment.round, region=region,
              contributors=len(note.weights), failed=len(note.failed), bytes=header.size)  # fmt: skip
        self.deps.storage.worked(header.size)
        return pb.UploadState(status="STORED", offset=header.size)

    def _refuse(self, opened: OpenRound, region: str, fault: str) -> pb.UploadState:
        reason = one_line(fault, MAX_REASON_CHARS)
        event(_log, logging.WARNING, "sum.refused", job=opened.assignment.job, round=opened.assignment.round,
              region=region, reason=reason)  # fmt: skip
        return pb.UploadState(status="REFUSED", reason=reason)

    async def _unless_open_later(self, key: pb.UpdateKey, context: Context) -> pb.UploadState:
        """Return STALE for a round that is not open, unless this region's own parent has it open."""
        if not self.deps.is_over(key.job, key.round):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this region has not been asked for this round yet")
        return await self._unless_stopping(pb.UploadState(status="STALE"), context)

    async def _unless_stopping(self, state: pb.UploadState, context: Context) -> pb.UploadState:
        if state.status == pb.UploadState.STALE and self.deps.rounds.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the cloud is stopping; its rounds continue later")
        return state

    async def _run(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        call = functools.partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)


def _header(message: bytes) -> pb.UploadHeader:
    first = pb.UploadChunk.FromString(message)
    if first.WhichOneof("part") != "header":
        raise ProtocolError("the first message must be the header")
    return first.header


async def _moving(requests: AsyncIterator[bytes], transfer: Transfer) -> AsyncIterator[bytes]:
    async for message in requests:
        transfer.moved()
        yield message


def _spooled(region: str, number: int) -> str:
    """Return the name under which a sum is spooled: no device has a `+`."""
    return f"{region}+{number}"
