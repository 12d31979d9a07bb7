"""Relays: the messages of Flower apps between ServerApps, where operators are, and ClientApps on devices.

To the fleet a message is a round of one device: announced, downloaded, answered, spooled and resumed as rounds
are. Its reply is not folded but kept until the operator has it. The cloud reads neither.
Invariants: a message is answered once, by its device or, where that is lost or late, by the cloud; what a relay
has in memory and on disk goes with it, and a relay whose operator is gone ends.
"""

from __future__ import annotations

import functools
import logging
import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud.broker.link import CloudLink
from cloud.dataplane.open_rounds import OpenRound, OpenRounds
from cloud.state.blobs import BlobStore, blake3_of
from cloud.state.jobs import Answer
from cloud.state.relay_rows import Message, RelayRows, Rows
from cloud.state.spool import Spool
from cloud.state.storage import LOOK_S, Storage
from edgefl.config import TrainConfig
from edgefl.errors import CloudStopping, ConfigError, NotFound
from edgefl.logs import event
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import BlobRef, RoundClosed, Signed, WirePlan, encode

MAX_MESSAGE_BYTES = (1 << 30) + (16 << 20)  # of what a message or a reply holds, and what surrounds it
MAX_OPEN = 100_000  # messages of one relay
LONGEST_WAIT_S = 60.0

_log = logging.getLogger(__name__)

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long whom is waited for, in seconds."""

    operator_s: float = 60.0  # not heard of
    device_s: float = 30.0  # offline
    return_s: float = 20.0  # for a device that has not been heard of since the cloud's start
    stream_s: float = 60.0  # an operator's stream ends and is asked for again: so a dead one is not taken for alive
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class _Errand:
    opened: OpenRound
    device: str
    ends_s: float  # on the monotonic clock, less the pauses of the storage


@dataclass(slots=True)
class _Relay:
    """One running relay."""

    id: str
    bundle: Signed
    contents: BlobStore
    heard_s: float  # of its operator
    paused_before_s: float  # of pauses of the storage before it began here
    errands: dict[int, _Errand] = field(default_factory=dict)  # those that wait for an answer
    replies: dict[int, Line] = field(default_factory=dict)  # those that wait for the operator
    hashes: dict[str, tuple[BlobRef, str]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)  # that were sent something
    last: int = 0
    resumed: bool = False  # after a restart: nobody knows who was sent something before


@dataclass(frozen=True, slots=True)
class RelayParts:
    """What relays work on."""

    rows: RelayRows
    rounds: OpenRounds
    spool: Spool
    link: CloudLink
    sign: Callable[[Bundle], Signed]
    folder: Path  # of what messages hold
    storage: Storage = field(default_factory=Storage)


class Relays:
    """All relays of a home. Methods may be called from any thread; `watch` has one of its own."""

    def __init__(self, parts: RelayParts, patience: Patience | None = None) -> None:
        self._parts = parts
        self._patience = patience or Patience()
        self._lock = threading.Lock()  # never held while a round's own lock is taken
        self._arrived = threading.Condition(self._lock)  # a reply, or an end
        self._times = threading.Condition(self._lock)  # what `watch` waits for may have changed
        self._sending = threading.Lock()
        self._live: dict[str, _Relay] = {}
        self._offline_since_s: dict[str, float] = {}  # `watch` alone reads it
        self._stirred = self._closed = False
        parts.folder.mkdir(mode=0o700, exist_ok=True)

    # For operators.

    def start(self, app: str, bundle: BlobRef, name: str | None = None) -> str:
        """Begin a relay for a Flower app whose bundle is here, and return its id; `name` is for people."""
        relay, signed = f"relay-{secrets.token_hex(4)}", self._parts.sign(Bundle(blob=bundle, task=app))
        self._parts.rows.create(relay, app, signed, name)
        self._enter(relay, signed)
        event(_log, logging.INFO, "relay.started", relay=relay, app=app)
        return relay

    def contents(self, relay: str) -> BlobStore:
        """Return where a relay keeps what its messages hold, for as long as the operator wants it."""
        return self._running(relay).contents

    def send(self, relay: str, messages: Sequence[Message]) -> None:
        """Take messages and announce them; those that are here already are left as they are."""
        live = self._running(relay)
        with self._sending:
            if len(live.errands) + len(messages) > MAX_OPEN:
                raise ConfigError(f"{relay} has {len(live.errands)} messages open; at most {MAX_OPEN} are carried")
            plans = {message.number: self._plan(live, message) for message in messages}
            for plan in plans.values():
                encode(plan)  # raises where it is too large to be announced
            new = self._parts.rows.add(relay, messages)
            for message in new:
                self._open(live, message, plans[message.number])
        for message in new:
            self._parts.link.send_job(message.device, plans[message.number])
        self._stir()

    def lines(self, relay: str, heartbeat_s: float) -> Iterator[Line]:
        """Yield each reply that the operator has not done with, as it comes; the relay's end, if that comes first."""
        told: set[int] = set()
        end_s = self._patience.clock() + self._patience.stream_s
        while self._patience.clock() < end_s:
            with self._arrived:
                self._wait_for_news(relay, told, heartbeat_s)
                if self._closed:
                    return
                live = self._live.get(relay)
                new = [line for number, line in live.replies.items() if number not in told] if live else []
                if live is not None:
                    live.heard_s = self._patience.clock()
            if live is None:
                row = self._parts.rows.get(relay)
                yield {"state": row["state"], "error": row["error"]}
                return
            told |= {line["number"] for line in new}
            yield from new or [{"heartbeat": True, **self._parts.storage.pauses(live.paused_before_s)}]

    def reply(self, relay: str, number: int) -> Path:
        """Return the file of a reply; raises NotFound where there is none."""
        live = self._running(relay)
        with self._lock:
            line = live.replies.get(number, {})
        if not line.get("size"):
            raise NotFound(f"{relay} has no reply to message {number}")
        return self._parts.spool.file(relay, number, line["device"])

    def done(self, relay: str, numbers: Sequence[int]) -> None:
        """The operator has these replies, or no longer wants them."""
        live = self._running(relay)
        with self._lock:
            left = [live.errands.pop(number) for number in numbers if number in live.errands]
            for number in numbers:
                live.replies.pop(number, None)
        self._parts.rows.drop(relay, numbers)
        for errand in left:
            for device in errand.opened.close():
                closed = RoundClosed(job=relay, round=errand.opened.plan.round, job_ended=False)
                self._parts.link.send_job(device, closed)
            self._parts.rounds.remove(errand.opened)
        for number in numbers:
            self._parts.spool.drop_round(relay, number)

    def end(self, relay: str, state: str, error: str | None = None) -> None:
        """End a relay, if it runs, and forget what it had."""
        if not self._parts.rows.end(relay, state, error):
            return
        with self._lock:
            live = self._live.pop(relay, None)
            self._arrived.notify_all()
        event(_log, logging.INFO, "relay.ended", relay=relay, state=state, error=error or "-")
        if live is not None:
            for errand in live.errands.values():
                errand.opened.close()
                self._parts.rounds.remove(errand.opened)
            for device in sorted(live.devices | (self._parts.link.online() if live.resumed else frozenset())):
                self._parts.link.send_job(device, RoundClosed(job=relay, round=live.last, job_ended=True))
        self._parts.rounds.forget(relay)
        self._parts.spool.drop_job(relay)
        shutil.rmtree(self._parts.folder / relay, ignore_errors=True)

    def rows(self) -> Rows:
        """Return every relay, the newest first."""
        return self._parts.rows.list()

    def get(self, relay: str) -> dict[str, Any]:
        """Return one relay; raises NotFound for an unknown id."""
        row, live = self._parts.rows.get(relay), self._live.get(relay)
        return row if live is None else row | self._parts.storage.pauses(live.paused_before_s)

    # For the cloud.

    def running(self) -> list[str]:
        """Return the relays that are not over."""
        with self._lock:
            return list(self._live)

    def resume(self) -> None:
        """Go on, after a restart, with every message that is not answered."""
        running = self._parts.rows.running()
        for relay, bundle in running.items():
            live = self._enter(relay, bundle)
            live.resumed = True
            for message in self._parts.rows.messages(relay):
                if message.answer is None:
                    self._open(live, message, self._plan(live, message))
                else:
                    live.last = message.number
                    live.replies[message.number] = self._line(relay, message.number, message.answer, lost=message.lost)
        for folder in self._parts.folder.iterdir():
            if folder.name not in running:
                shutil.rmtree(folder, ignore_errors=True)

    def presence_changed(self) -> None:
        """A device came or went."""
        self._stir()

    def watch(self) -> None:
        """Give up what is late, lost or forsaken; runs until `close`. While nothing can be stored, nothing is late."""
        is_paused = False
        while True:
            online, heard_of, blind = self._parts.link.online(), self._parts.link.offline(), self._parts.link.reason
            was_paused, is_paused = is_paused, not self._parts.storage.look()
            if was_paused and not is_paused:
                self._announce_again()
            with self._lock:
                if self._closed:
                    return
                self._stirred = False
                self._note_offline(set() if blind else self._devices() - online, heard_of)
                late, forsaken, next_s = self._overdue(self._patience.clock(), is_paused=is_paused)
            reason = f"its operator was not heard of for {self._patience.operator_s:g} s"
            ends = [functools.partial(self.end, relay, "failed", reason) for relay in forsaken]
            acts: list[Callable[[], None]] = [*late, *ends]
            for act in acts:
                try:
                    self._parts.storage.insist(act, self._refuse_closed)  # a full disk is waited for
                except CloudStopping:
                    return
            with self._times:
                longest_s = LOOK_S if is_paused else LONGEST_WAIT_S
                wait_s = 0.0 if late or forsaken else min(next_s - self._patience.clock(), longest_s)
                self._times.wait_for(lambda: self._stirred or self._closed, max(0.0, wait_s))

    def close(self) -> None:
        """End `watch`, and the waits of streams; the relays go on at the next start."""
        with self._lock:
            self._closed = True
            self._times.notify_all()
            self._arrived.notify_all()

    def _refuse_closed(self) -> None:
        with self._lock:
            if self._closed:
                raise CloudStopping("the cloud is stopping; its relays go on at the next start")

    # With the lock.

    def _devices(self) -> set[str]:
        return {errand.device for live in self._live.values() for errand in live.errands.values()}

    def _note_offline(self, gone: set[str], heard_of: frozenset[str]) -> None:
        now_s = self._patience.clock()
        since_s = {device: now_s if device in heard_of else now_s + self._patience.return_s for device in gone}
        before = self._offline_since_s
        self._offline_since_s = {device: min(at, before.get(device, at)) for device, at in since_s.items()}

    def _overdue(self, now_s: float, *, is_paused: bool) -> tuple[list[Callable[[], None]], list[str], float]:
        """Return how to give up what is late, the relays without an operator, and when to look again."""
        late: list[Callable[[], None]] = []
        forsaken: list[str] = []
        next_s, paused_s = math.inf, self._parts.storage.paused_s()
        for live in self._live.values():
            for errand in () if is_paused else live.errands.values():
                gone_s = self._offline_since_s.get(errand.device, math.inf) + self._patience.device_s
                ends_s = errand.ends_s + paused_s
                if min(ends_s, gone_s) <= now_s:
                    late.append(functools.partial(self._give_up, live.id, errand, offline=gone_s <= now_s))
                next_s = min(next_s, ends_s, gone_s)
            if live.heard_s + self._patience.operator_s <= now_s:
                forsaken.append(live.id)
            next_s = min(next_s, live.heard_s + self._patience.operator_s)
        return late, forsaken, next_s

    def _wait_for_news(self, relay: str, told: set[int], timeout_s: float) -> None:
        def is_there() -> bool:
            live = self._live.get(relay)
            return live is None or self._closed or not live.replies.keys() <= told

        self._arrived.wait_for(is_there, timeout_s)

    # Without it.

    def _running(self, relay: str) -> _Relay:
        with self._lock:
            live = self._live.get(relay)
            if live is not None:
                live.heard_s = self._patience.clock()
                return live
        row = self._parts.rows.get(relay)
        raise NotFound(f"{relay} is over: {row['state']}{', ' + row['error'] if row['error'] else ''}")

    def _enter(self, relay: str, bundle: Signed) -> _Relay:
        contents, now_s = BlobStore(self._parts.folder / relay), self._patience.clock()
        paused_s = self._parts.storage.paused_s()
        with self._lock:
            live = self._live[relay] = _Relay(relay, bundle, contents, now_s, paused_s)
        self._stir()
        return live

    def _plan(self, live: _Relay, message: Message) -> WirePlan:
        sha256 = message.content_sha256
        if sha256 not in live.hashes:
            path = live.contents.path(sha256)
            if not path.exists():
                raise ConfigError(f"what message {message.number} holds, {sha256[:16]}..., is not here; send it first")
            live.hashes[sha256] = BlobRef(sha256=sha256, size=path.stat().st_size), blake3_of(path)
        content, fast = live.hashes[sha256]
        return WirePlan(
            job=live.id,
            round=message.number,
            model=content,
            model_blake3=fast,
            bundle=live.bundle,
            train=TrainConfig(),
            deadline_s=max(1.0, message.expires_s - time.time()),
            max_update_bytes=MAX_MESSAGE_BYTES,
            envelope=message.envelope,
        )

    def _open(self, live: _Relay, message: Message, plan: WirePlan) -> None:
        opened = OpenRound(plan, frozenset({message.device}), source=live.contents.path(message.content_sha256))
        opened.record = functools.partial(self._keep, live.id, message.number, lost=False)
        ends_s = self._patience.clock() - self._parts.storage.paused_s() + plan.deadline_s
        with self._lock:
            live.errands[message.number] = _Errand(opened, message.device, ends_s)
            live.devices.add(message.device)
            live.last = message.number
        self._parts.rounds.add(opened)

    def _keep(self, relay: str, number: int, answer: Answer, *, lost: bool) -> None:
        """Make an answer durable and tell the operator; called under its round's lock."""
        self._parts.rows.answer(relay, number, answer, lost=lost)
        line = self._line(relay, number, answer, lost=lost)
        with self._arrived:
            live = self._live.get(relay)
            errand = live.errands.pop(number, None) if live else None
            if live is None or errand is None:
                return
            live.replies[number] = line
            self._arrived.notify_all()
        self._parts.rounds.remove(errand.opened)

    def _give_up(self, relay: str, errand: _Errand, *, offline: bool) -> None:
        plan, patience = errand.opened.plan, self._patience
        reason = f"offline for {patience.device_s:g} s" if offline else "no reply in time"
        answer = Answer(device=errand.device, reason=f"device {errand.device}: {reason}")
        if errand.opened.accept(answer, functools.partial(self._keep, relay, plan.round, lost=True)):
            event(_log, logging.WARNING, "errand.lost", relay=relay, number=plan.round, device=errand.device,
                  reason=reason)  # fmt: skip
            self._parts.link.send_job(errand.device, RoundClosed(job=relay, round=plan.round, job_ended=False))

    def _line(self, relay: str, number: int, answer: Answer, *, lost: bool) -> Line:
        path = self._parts.spool.file(relay, number, answer.device) if answer.file is not None else None
        size = path.stat().st_size if path is not None else 0
        return {"number": number, "device": answer.device, "size": size, "reason": answer.reason, "lost": lost}

    def _announce_again(self) -> None:
        """After a pause: devices that gave up sending do not know that it is over."""
        with self._lock:
            plans = [(one.device, one.opened.plan) for live in self._live.values() for one in live.errands.values()]
        for device, plan in plans:
            self._parts.link.send_job(device, plan)

    def _stir(self) -> None:
        with self._lock:
            self._stirred = True
            self._times.notify_all()
