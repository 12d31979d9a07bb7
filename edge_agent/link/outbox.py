"""Sends the stored updates and failures until the cloud has received, or does not want, each of them.

Invariant: an update leaves the store after the cloud has said that it is stored, stale or refused, or
that its round is closed; never before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import grpc

from edge_agent.link.channel import CloudChannel
from edge_agent.link.transfer import upload
from edge_agent.store import FailureNote, Outgoing, Store
from edgefl.errors import CloudUnreachable, HomeError
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb

AGAIN_S = 5.0  # after an error of this device's disk or database

_log = logging.getLogger(__name__)

Key = tuple[str, int]  # job, round


class Outbox:
    """The agent's only sender. A new answer wakes it, and so does a cloud that becomes reachable."""

    def __init__(self, store: Store, channel: CloudChannel) -> None:
        self._store, self._channel = store, channel
        self._wake = asyncio.Event()
        self._begun = {(update.job, update.round) for update in store.outbox()}  # perhaps, by the process before us
        self._sending: tuple[Key, asyncio.Task[None]] | None = None
        self.wake()

    def wake(self) -> None:
        """Try to send: there may be something new, or the cloud may be reachable again."""
        self._wake.set()

    def put(self, update: Outgoing, state: Path | None = None) -> None:
        """Take an update whose path is a draft that is written and synced, and the state that goes with it."""
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
            except HomeError as error:  # a locked database, a disk that cannot be read: they pass
                event(_log, logging.ERROR, "outbox.waits", reason=error)
                asyncio.get_running_loop().call_later(AGAIN_S, self.wake)

    async def _send_all(self) -> None:
        for note in self._store.failures():
            await self._channel.fail(note.job, note.round, note.reason)
            self._mark_answered((note.job, note.round))
        for update in self._store.outbox():
            key = (update.job, update.round)
            async with asyncio.TaskGroup() as tasks:
                self._sending = key, tasks.create_task(self._send(key, update), name=f"upload-{update.job}")
            self._sending = None

    async def _send(self, key: Key, update: Outgoing) -> None:
        start_s = time.monotonic()
        try:
            state = await upload(self._channel, update, resume=key in self._begun)
        except FileNotFoundError:
            return  # dropped meanwhile
        except (CloudUnreachable, OSError) as error:
            self._begun.add(key)
            event(_log, logging.WARNING, "outbox.waits", job=key[0], round=key[1], reason=error)
            if isinstance(error, OSError):  # of this device: no news of the cloud will wake us
                asyncio.get_running_loop().call_later(AGAIN_S, self.wake)
            return
        level = logging.WARNING if state.status == pb.UploadState.REFUSED else logging.INFO
        event(_log, level, f"update.{pb.UploadState.Status.Name(state.status).lower()}", job=key[0], round=key[1],
              bytes=update.size, seconds=time.monotonic() - start_s, reason=state.reason or "-")  # fmt: skip
        self._mark_answered(key)

    def _mark_answered(self, key: Key) -> None:
        try:
            self._store.mark_answered(*key)
        except HomeError as error:  # the disk is full: when it is asked again, the cloud says the same
            self._begun.add(key)
            event(_log, logging.ERROR, "outbox.not_settled", job=key[0], round=key[1], reason=error)
        else:
            self._begun.discard(key)
