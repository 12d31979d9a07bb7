"""Updates from their first byte until they are durable and handed to their round.

An update is acknowledged after it is checked, on disk and in the database. Small ones that came meanwhile are checked,
written into one file and committed together, by one call of a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from cloud.dataplane.open_round import OpenRound
from cloud.dataplane.transfer_limiter import Transfer
from cloud.jobs.answers import AnswerRow
from cloud.state.jobs import Jobs
from cloud.state.spool import Arrival, Incoming, Spool
from cloud.state.storage import Storage
from cloud.uploads.group_commit import GroupCommit
from cloud.uploads.upload_header import answer_of, overlong
from edgefl.errors import ProtocolError, UploadCutOff
from edgefl.logs import event
from edgefl.process.durable import flush
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.chunks import CHUNK_BYTES, upload_data
from edgefl.protocols.messages import Fit
from edgefl.terminal.text import one_line
from edgefl.trees import EncodedTree, SpooledTree, read_tree

MAX_REASON_CHARS = 2000

_log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class Received:
    """An update of which all bytes have come, and what becomes of it."""

    arrival: Arrival
    header: pb.UploadHeader
    opened: OpenRound
    device: str
    # Once it is checked, one of these:
    incoming: Incoming | None = None
    content: memoryview | None = None
    result: pb.UploadState | Exception | None = None

    @property
    def is_late(self) -> bool:
        return self.header.key.round < self.opened.assignment.round

    @property
    def is_small(self) -> bool:
        """Whether it came in one chunk: the others in a batch do not wait long for it."""
        return not self.arrival.is_written and not self.header.offset and self.header.size <= CHUNK_BYTES

    @property
    def can_be_packed(self) -> bool:
        """Whether it is an update of its round that came whole, and of which nothing is written yet."""
        is_whole = self.is_small and len(self.arrival.last) == self.header.size > 0
        return is_whole and isinstance(self.opened.assignment, Fit) and not self.is_late


class Uploads:
    """Receives updates in the event loop; everything that blocks runs in `workers`."""

    def __init__(self, jobs: Jobs, spool: Spool, storage: Storage, workers: ThreadPoolExecutor) -> None:
        self._jobs, self._spool, self._storage, self._workers = jobs, spool, storage, workers
        self._commits = GroupCommit(self._finish, workers)

    async def receive(
        self, requests: AsyncIterator[bytes], header: pb.UploadHeader, opened: OpenRound, device: str,
        transfer: Transfer,
    ) -> pb.UploadState:  # fmt: skip
        """Write the chunks that follow the header, and finish the update."""
        key, size = header.key, header.offset
        if size and size > (here := await self._run(self._spool.received_bytes, key.job, key.round, device)):
            return state("PARTIAL", offset=here)
        arrival = Arrival(self._spool, key.job, key.round, device, header.offset)
        try:
            while size < header.size and (message := await anext(requests, None)) is not None:
                transfer.moved()
                data = upload_data(message)
                size += len(data)
                if size > header.size:
                    return await self._run(self.refuse, opened, device, overlong(header.size), key.round)
                opened.up_bytes += len(data)
                if arrival.last:
                    await self._run(arrival.write)
                arrival.last = data
            transfer.pass_turn()
            received = Received(arrival, header, opened, device)
            if received.is_small:
                return await self._commits.submit(received)
            return await self._run(self._finish_alone, received)
        finally:
            # In a worker, which waits for a running write: its descriptor must not be closed and reused meanwhile.
            if not arrival.ended:
                await asyncio.shield(self._run(arrival.end))

    def _finish_alone(self, received: Received) -> pb.UploadState:
        """Finish a large update, for whose flush the small ones should not wait."""
        (result,) = self._finish([received])
        if isinstance(result, Exception):
            raise result
        return result

    def _finish(self, several: Sequence[Received]) -> list[pb.UploadState | Exception]:
        """Check updates, make them durable and hand them to their rounds; the caller then acknowledges them."""
        try:
            newest = {(one.opened, one.device): one for one in several}
            for one in several:
                if newest[one.opened, one.device] is not one:
                    one.result = UploadCutOff("a newer upload of the device has come")
                    continue
                try:
                    self._check(one)
                except (UploadCutOff, OSError, SQLAlchemyError) as error:
                    one.result = error
            for opened in dict.fromkeys(one.opened for one in several):
                self._commit(opened, [one for one in several if one.opened is opened and one.result is None])
        finally:
            for one in several:
                one.arrival.end()
        if stored := [one.header for one in several if _is_written(one.result)]:
            self._storage.worked(max(header.size - header.offset for header in stored))
        return [one.result or state("STALE") for one in several]

    def _check(self, one: Received) -> None:
        """Check the bytes, and flush those of a file; an update that is not complete, or not good, has its result."""
        header = one.header
        try:
            if one.can_be_packed:
                one.content = one.arrival.take(header.blake3)
                EncodedTree(read_tree(one.content))
                return
            incoming = one.arrival.write()
            if incoming.size < header.size:
                one.result = state("PARTIAL", offset=incoming.size)
                return
            incoming.finish(header.blake3)
            if isinstance(one.opened.assignment, Fit):  # the operator reads replies to other assignments
                SpooledTree(incoming.path)
            one.incoming = incoming
        except ProtocolError as error:
            if header.offset:  # the stored part may be damaged: restart the upload
                one.result = state("PARTIAL")
            else:
                one.result = self.refuse(one.opened, one.device, str(error), header.key.round)

    def _commit(self, opened: OpenRound, several: Sequence[Received]) -> None:
        """Store checked updates of one round and record them in one commit, if it waits for them."""
        packed: dict[Received, AnswerRow] = {}
        try:
            packed = self._packed(opened, [one for one in several if one.content is not None])
            answers = {one: self._answer(one, one.incoming.name) for one in several if one.incoming is not None}
            answers |= packed
            for one in opened.accept_each(answers, functools.partial(self._keep, opened, answers)):
                one.result = state("STORED", offset=one.header.size)
        except (UploadCutOff, OSError, SQLAlchemyError) as error:
            for one in several:
                one.result = one.result or error
        if packed and not any(isinstance(one.result, pb.UploadState) for one in packed):
            self._discard(opened, [answer.file for answer in packed.values() if answer.file is not None])

    def _discard(self, opened: OpenRound, names: Sequence[str]) -> None:
        """Delete a file of small updates of which none is accepted, so that those that come again do not fill the disk.

        A commit that failed may be durable all the same; then the file is needed after a restart.
        """
        with contextlib.suppress(SQLAlchemyError):
            if not self._jobs.has_answers(opened.assignment.job, opened.assignment.round, names):
                self._spool.discard(names[0])

    def _packed(self, opened: OpenRound, several: Sequence[Received]) -> dict[Received, AnswerRow]:
        """Write small updates that the round waits for into one file."""
        if not (several := [one for one in several if opened.waits_for(one.device)]):
            return {}
        contents = [one.content for one in several if one.content is not None]
        names = self._spool.pack(opened.assignment.job, opened.assignment.round, contents)
        return {one: self._answer(one, name) for one, name in zip(several, names, strict=True)}

    @staticmethod
    def _answer(one: Received, name: str) -> AnswerRow:
        return answer_of(one.header, one.device, name, late=one.is_late)

    def _keep(
        self, opened: OpenRound, answers: Mapping[Received, AnswerRow], awaited: Collection[Received]
    ) -> Collection[Received]:
        """Move files to their places, and record the answers; return those that were not cut off meanwhile."""
        kept, folders = [], set()
        for one in awaited:
            if one.incoming is not None:
                try:
                    one.incoming.move()
                except UploadCutOff as error:
                    one.result = error
                    continue
                folders.add(one.incoming.target.parent)
            kept.append(one)
        for folder in folders:
            flush(folder)
        self.record(opened, *(answers[one] for one in kept))
        return kept

    def refuse(self, opened: OpenRound, device: str, reason: str, number: int) -> pb.UploadState:
        """Record that the device sends no update in its round `number`; a late one is just not taken."""
        reason = one_line(reason, MAX_REASON_CHARS)  # it may quote what the device sent
        job = opened.assignment.job
        event(_log, logging.WARNING, "update.failed", job=job, round=number, device=device, reason=reason)
        if number == opened.assignment.round:
            opened.accept(AnswerRow(device=device, reason=reason), functools.partial(self.record, opened))
        return state("REFUSED", reason=reason)

    def record(self, opened: OpenRound, *answers: AnswerRow) -> None:
        """Make answers of a round durable."""
        if opened.record is not None:
            for answer in answers:
                opened.record(answer)
        elif answers:
            self._jobs.record(opened.assignment.job, opened.assignment.round, *answers)

    async def _run(self, function: Callable[_P, _T], *arguments: _P.args, **_named: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)


def _is_written(result: pb.UploadState | Exception | None) -> bool:
    return isinstance(result, pb.UploadState) and result.status in {pb.UploadState.STORED, pb.UploadState.PARTIAL}


def state(status: str, *, offset: int = 0, reason: str = "") -> pb.UploadState:
    """Return an upload's state by the name of its status."""
    return pb.UploadState(status=status, offset=offset, reason=reason)
