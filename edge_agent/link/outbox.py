"""Sends the stored updates and failures to the cloud, until each is acknowledged or no longer needed.

Invariant: an update stays in the store until the cloud reports it as stored, stale or refused, or its round as closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from edge_agent.link.channel import CloudChannel
from edge_agent.link.transfer import upload
from edge_agent.store import FailureNote, Outgoing, Store
from edgefl.errors import CloudUnreachable, HomeError
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb

RETRY_S = 5.0  # after an error of this device's disk or database

_log = logging.getLogger(__name__)

Key = tuple[str, int]  # job, round


class Outbox:
    """Sends updates and failures. Woken by each new one, and when the cloud becomes reachable."""

    def __init__(self, store: Store, channel: CloudChannel) -> None:
        self._store, self._channel = store, channel
        self._wake = asyncio.Event()
        self.on_answered: Callable[[], None] = lambda: None  # called when an answer has left, or is dropped
        self.on_stale: Callable[[], None] = lambda: None  # called when an update was not wanted: perhaps another is
        self._started = {(update.job, update.round) for update in store.outbox()}  # perhaps by an earlier process
        self._sending: tuple[Key, asyncio.Task[None]] | None = None
        self._is_held_up = False
        self.wake()

    def wake(self) -> None:
        """Try to send now."""
        self._wake.set()

    def is_empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._store.outbox() and not self._store.failures()

    def may_leave(self) -> bool:
        """Whether nothing waits that the present parent takes: it is sent to the next one."""
        return self._is_held_up or self.is_empty()

    def put(self, update: Outgoing, state: Path | None = None) -> None:
        """Add an update, whose path is a complete and synced draft, and the client's new state."""
        self._store.put(update, state)
        self.wake()

    def put_failure(self, note: FailureNote) -> None:
        self._store.note_failure(note)
        self.wake()

    def drop(self, job: str, number: int) -> None:
        """Drop the answer to a round, because the round is closed."""
        if self._sending and self._sending[0] == (job, number):
            self._sending[1].cancel()
        self._mark_answered((job, number))

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._send_all()
            except (CloudUnreachable, grpc.aio.AioRpcError) as error:
                reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
                event(_log, logging.WARNING, "outbox.waits", reason=reason)
            except HomeError as error:  # temporary: a locked database, an unreadable disk
                event(_log, logging.ERROR, "outbox.waits", reason=error)
                asyncio.get_running_loop().call_later(RETRY_S, self.wake)

    async def _send_all(self) -> None:
        for note in self._store.failures():
            failed = pb.UpdateKey(job=note.job, round=note.round, model=note.model)
            await self._channel.fail(failed, note.reason)
            self._mark_answered((note.job, note.round))
        for update in self._store.outbox():
            key = (update.job, update.round)
            async with asyncio.TaskGroup() as tasks:
                self._sending = key, tasks.create_task(self._send(key, update), name=f"upload-{update.job}")
            self._sending = None

    async def _send(self, key: Key, update: Outgoing) -> None:
        start_s = time.monotonic()
        try:
            state = await upload(self._channel, update, resume=key in self._started)
            self._is_held_up = False
        except FileNotFoundError:
            return  # dropped in the meantime
        except (CloudUnreachable, OSError) as error:
            self._started.add(key)
            self._is_held_up = _is_not_asked(error)
            event(_log, logging.WARNING, "outbox.waits", job=key[0], round=key[1], reason=error)
            if isinstance(error, OSError):  # of this device: a reachable cloud does not wake the outbox again
                asyncio.get_running_loop().call_later(RETRY_S, self.wake)
            return
        level = logging.WARNING if state.status == pb.UploadState.REFUSED else logging.INFO
        event(_log, level, f"update.{pb.UploadState.Status.Name(state.status).lower()}", job=key[0], round=key[1],
              bytes=update.size, seconds=time.monotonic() - start_s, reason=state.reason or "-")  # fmt: skip
        self._mark_answered(key)
        if state.status == pb.UploadState.STALE:
            self.on_stale()

    def _mark_answered(self, key: Key) -> None:
        try:
            self._store.mark_answered(*key)
        except HomeError as error:  # full disk: sent again, the cloud gives the same answer
            self._started.add(key)
            event(_log, logging.ERROR, "outbox.not_settled", job=key[0], round=key[1], reason=error)
        else:
            self._started.discard(key)
            self.on_answered()


def _is_not_asked(error: Exception) -> bool:
    """Whether a region did not take an upload because it was not asked for it: perhaps another parent is."""
    cause = error.__cause__
    return isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.FAILED_PRECONDITION
