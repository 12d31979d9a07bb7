"""Messages of Flower apps below a region: handed to their devices, and the replies sent up, each once.

For the region a message is a round of one device, as for the cloud (`cloud.dataplane.relays`); the parent decides how
long it is waited for, and deletes its entry when nobody waits any more. A content that several messages share is
fetched once.
Invariant: a reply that was acknowledged to its device is durable here until the parent has answered for it, so a kill
of any tier loses none.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from cloud.dataplane.grpc_fleet import FleetDependencies
from cloud.dataplane.open_round import OpenRound, Surroundings
from cloud.jobs.answers import AnswerRow
from cloud.region.server.uplink import SumFile
from cloud.state.blobs import blake3_of
from edgefl.exchange import Announce, Instruction, Terms, Yield
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import Deliver, RoundClosed
from edgefl.protocols.tiers import Message, MessageReply
from edgefl.terminal.bounds import MAX_SECONDS

MAX_SENDING = 4  # replies at the same time

_log = logging.getLogger(__name__)
Key = tuple[str, int]  # relay, number


@dataclass(slots=True)
class _Open:
    """One message that waits for its device's reply, or whose reply waits for the parent."""

    device: str
    round: OpenRound
    sending: asyncio.Future[None] | None = None


class RegionMessages:
    """All messages of a region. Methods may be called from any thread, except `close`."""

    def __init__(
        self, deps: FleetDependencies, loop: asyncio.AbstractEventLoop,
        send: Callable[[SumFile], Awaitable[pb.UploadState]],
    ) -> None:  # fmt: skip
        self._deps, self._loop, self._send = deps, loop, send
        self._lock = threading.RLock()
        self._open: dict[Key, _Open] = {}
        self._over: dict[str, set[int]] = {}  # relay -> messages that are not waited for any more
        self._devices: dict[str, set[str]] = {}  # relay -> those that were sent a message
        self._contents: dict[str, dict[str, None]] = {}  # relay -> hashes of what was fetched for it
        self._turn = asyncio.Semaphore(MAX_SENDING)

    def take(self, relay: str, number: int, message: Message | None) -> None:
        """Take what the parent says of a message; None = nobody waits for it any more."""
        key = relay, number
        with self._lock:
            if message is None:
                self._end(key, is_told=True)
            elif key not in self._open and not self._deps.rounds.stopping:
                self._begin(key, message)

    def keep_only(self, relays: Collection[str]) -> None:
        """End the messages of all other relays, which have ended, and forget those relays."""
        with self._lock:
            for key in [one for one in self._open if one[0] not in relays]:
                self._end(key, is_told=False)
            for relay in [one for one in self._over if one not in relays]:
                last = max(self._over.pop(relay), default=0)
                for device in sorted(self._devices.pop(relay, ())):
                    self._deps.link.send_job(device, RoundClosed(job=relay, round=last, job_ended=True))
                self._purge(relay, frozenset())
                self._deps.spool.drop_job(relay)
                self._deps.rounds.forget(relay)

    def is_over(self, relay: str, number: int) -> bool:
        """Whether a message is known to be over."""
        with self._lock:
            return number in self._over.get(relay, ())

    def close(self) -> None:
        """Stop sending; it continues at the next start. Call it in the event loop."""
        for one in list(self._open.values()):
            if one.sending is not None:
                one.sending.cancel()

    # Below: the caller has the lock.

    def _begin(self, key: Key, message: Message) -> None:
        deliver, device = message.deliver, message.device
        terms = Terms(deadline_s=deliver.deadline_s, offline_grace_s=MAX_SECONDS)  # the parent gives devices up
        around = Surroundings(
            clock=self._deps.clock, storage=self._deps.storage, act=functools.partial(self._execute, key, device)
        )
        opened = OpenRound(deliver, (device,), terms, around)
        kept = self._deps.jobs.open_round(*key, (device,))  # a reply from before a restart
        self._keep_contents(key[0], deliver)
        self._over.setdefault(key[0], set())
        self._devices.setdefault(key[0], set()).add(device)
        self._open[key] = _Open(device, opened)
        self._deps.rounds.add(opened)
        opened.begin(is_announced=bool(kept))
        for answer in kept:
            opened.accept(answer, lambda _answer: None)

    def _keep_contents(self, relay: str, deliver: Deliver) -> None:
        """Delete what was fetched for earlier messages, unless one that is open has it too."""
        used = {
            ref.sha256 for (of, _), one in self._open.items() if of == relay for ref in one.round.assignment.blobs()
        }
        self._purge(relay, used.union(ref.sha256 for ref in deliver.blobs()))
        self._contents.setdefault(relay, {}).update(dict.fromkeys(ref.sha256 for ref in deliver.blobs()))

    def _purge(self, relay: str, used: Collection[str]) -> None:
        held = self._contents.get(relay, {})
        for sha256 in [one for one in held if one not in used]:
            del held[sha256]
            self._deps.blobs.delete(sha256)
        if not held:
            self._contents.pop(relay, None)

    def _end(self, key: Key, *, is_told: bool) -> None:
        """Forget a message; with `is_told`, tell its device if it has not replied."""
        one = self._open.pop(key, None)
        if one is None:
            return
        if one.sending is not None:
            self._loop.call_soon_threadsafe(one.sending.cancel)
        one.round.close()
        self._deps.rounds.remove(one.round)
        if is_told and not one.round.has_answered(one.device):
            self._deps.link.send_job(one.device, RoundClosed(job=key[0], round=key[1], job_ended=False))
        self._over.setdefault(key[0], set()).add(key[1])
        self._deps.jobs.forget_round(*key)
        self._deps.spool.drop_round(*key)

    # Called under the round's lock.

    def _execute(self, key: Key, device: str, instruction: Instruction) -> None:
        with_round = self._open.get(key)
        if with_round is None:
            return
        if isinstance(instruction, Announce):
            self._deps.link.send_job(device, with_round.round.assignment)
        elif isinstance(instruction, Yield):
            answer = with_round.round.take(device)
            self._loop.call_soon_threadsafe(self._start_sending, key, answer)

    # In the event loop.

    def _start_sending(self, key: Key, answer: AnswerRow) -> None:
        if (one := self._open.get(key)) is not None:
            one.sending = asyncio.ensure_future(self._reply(key, answer))

    async def _reply(self, key: Key, answer: AnswerRow) -> None:
        """Send a reply until the parent has it, or does not want it."""
        relay, number = key
        path = self._deps.spool.path(answer.file) if answer.file is not None else None
        digest = await asyncio.to_thread(blake3_of, path) if path is not None else ""
        note = MessageReply(device=answer.device, reason="" if path is not None else answer.reason or "no reason given")
        async with self._turn:
            state = await self._send(SumFile(job=relay, round=number, number=0, path=path, blake3=digest, note=note))
        event(_log, logging.INFO, f"reply.{pb.UploadState.Status.Name(state.status).lower()}", relay=relay,
              number=number, device=answer.device, reason=state.reason or "-")  # fmt: skip
        await asyncio.to_thread(self._sent, key)

    def _sent(self, key: Key) -> None:
        with self._lock:
            if (one := self._open.get(key)) is not None:
                one.sending = None  # this task, which is not to be cancelled
            self._end(key, is_told=False)
