"""Relays: messages of Flower apps between ServerApps, on operators' machines, and ClientApps, on devices.

For the fleet a message is a round of one device: it is announced, downloaded, answered, spooled and resumed like a
round. Its reply is not aggregated, but kept until the operator confirms it. The cloud reads neither.
Invariants: a message is answered once, by its device or, if that is lost or late, by the cloud; a relay that ends
leaves nothing in memory or on disk, and a relay without an operator ends.
"""

from __future__ import annotations

import functools
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud.broker.link import DeviceLink
from cloud.dataplane.live_relay import Line, LiveRelay, RelayTiming, SentMessage
from cloud.dataplane.open_round import OpenRound, Presence, Surroundings
from cloud.dataplane.open_rounds import OpenRounds
from cloud.jobs.answers import AnswerRow
from cloud.state.blobs import BlobStore
from cloud.state.relay_rows import RelayMessage, RelayRows, Rows
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from edgefl.errors import CloudStopping, ConfigError, NotFound
from edgefl.exchange import Announce, GiveUp, GiveUpReason, Instruction, Terms, Yield
from edgefl.logs import event
from edgefl.protocols.labels import check_label
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import BlobRef, Deliver, RoundClosed, Signed, encode

MAX_OPEN = 100_000  # messages of one relay
LONGEST_WAIT_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayDependencies:
    """The dependencies of the relays."""

    rows: RelayRows
    rounds: OpenRounds
    spool: Spool
    link: DeviceLink
    sign: Callable[[Bundle], Signed]
    folder: Path  # of the messages' contents
    storage: Storage = field(default_factory=Storage)


class Relays:
    """All relays of a home. Methods may be called from any thread; `watch` needs its own thread."""

    def __init__(self, deps: RelayDependencies, timing: RelayTiming | None = None) -> None:
        self._deps = deps
        self._timing = timing or RelayTiming()
        self._lock = threading.Lock()  # not held while acquiring a round's lock
        self._arrived = threading.Condition(self._lock)  # a reply, or an end
        self._times = threading.Condition(self._lock)  # wakes `watch`
        self._sending = threading.Lock()
        self._live: dict[str, LiveRelay] = {}
        self._is_woken = self._closed = False
        deps.folder.mkdir(mode=0o700, exist_ok=True)

    # For operators.

    def start(self, app: str, bundle: BlobRef, name: str | None = None, label: str | None = None) -> str:
        """Start a relay for a Flower app whose bundle is uploaded, and return its id.

        `name` is the app's, `label` the run's; both are for people.
        """
        check_label(label)
        relay, signed = f"relay-{secrets.token_hex(4)}", self._deps.sign(Bundle(blob=bundle, task=app))
        self._deps.rows.create(relay, app, signed, name, label)
        self._enter(relay, signed)
        event(_log, logging.INFO, "relay.started", relay=relay, app=app)
        return relay

    def contents(self, relay: str) -> BlobStore:
        """Return the store of a relay's message contents."""
        return self._running(relay).contents

    def send(self, relay: str, messages: Sequence[RelayMessage]) -> None:
        """Store and announce messages; known ones are ignored."""
        live = self._running(relay)
        with self._sending:
            if len(live.waiting) + len(messages) > MAX_OPEN:
                raise ConfigError(
                    f"{relay} has {len(live.waiting)} open messages and was sent {len(messages)} more; at most "
                    f"{MAX_OPEN} are allowed"
                )
            assignments = {one.number: live.assignment(one, self._within_s(one)) for one in messages}
            for assignment in assignments.values():
                encode(assignment)  # raises if it is too large to be announced
            new = self._deps.rows.add(relay, messages)
            for message in new:
                self._open(live, message, assignments[message.number])
        self.wake()

    def lines(self, relay: str, heartbeat_s: float) -> Iterator[Line]:
        """Yield each answer that the operator has not confirmed, as it arrives, and the relay's end."""
        sent: set[int] = set()
        end_s = self._timing.clock() + self._timing.stream_s
        while self._timing.clock() < end_s:
            with self._arrived:
                self._wait_for_news(relay, sent, heartbeat_s)
                if self._closed:
                    return
                live = self._live.get(relay)
                new = [line for number, line in live.replies.items() if number not in sent] if live else []
                if live is not None:
                    live.last_request_s = self._timing.clock()
            if live is None:
                row = self._deps.rows.get(relay)
                yield {"state": row["state"], "error": row["error"]}
                return
            sent |= {line["number"] for line in new}
            yield from new or [{"heartbeat": True, **self._deps.storage.pauses(live.paused_before_s)}]

    def reply(self, relay: str, number: int) -> Path:
        """Return the file of a reply; raises NotFound if there is none."""
        live = self._running(relay)
        with self._lock:
            line = live.replies.get(number, {})
        if not line.get("size"):
            raise NotFound(f"{relay} has no reply to message {number}")
        return self._deps.spool.file(relay, number, line["device"])

    def done(self, relay: str, numbers: Sequence[int]) -> None:
        """Drop messages whose answers the operator has, or no longer needs."""
        live = self._running(relay)
        with self._lock:
            left = [live.waiting.pop(number) for number in numbers if number in live.waiting]
            for number in numbers:
                live.replies.pop(number, None)
        self._deps.rows.drop(relay, numbers)
        for sent in left:
            sent.opened.close()
            self._deps.rounds.remove(sent.opened)
            self._deps.link.close_round(relay, sent.number)
            if not sent.opened.has_answered(sent.device):
                self._tell_closed(sent)
        for number in numbers:
            self._deps.spool.drop_round(relay, number)

    def end(self, relay: str, state: str, error: str | None = None) -> None:
        """End a relay if it is running, and delete its data."""
        if not self._deps.rows.end(relay, state, error):
            return
        with self._lock:
            live = self._live.pop(relay, None)
            self._arrived.notify_all()
        event(_log, logging.INFO, "relay.ended", relay=relay, state=state, error=error or "-")
        if live is not None:
            for sent in live.waiting.values():
                sent.opened.close()
                self._deps.rounds.remove(sent.opened)
                self._deps.link.close_round(relay, sent.number)
            for device in sorted(live.devices | (self._deps.link.online() if live.resumed else frozenset())):
                self._deps.link.send_job(device, RoundClosed(job=relay, round=live.last, job_ended=True))
        self._deps.rounds.forget(relay)
        self._deps.spool.drop_job(relay)
        shutil.rmtree(self._deps.folder / relay, ignore_errors=True)

    def rows(self) -> Rows:
        """Return every relay, the newest first."""
        return [self._shown(row) for row in self._deps.rows.list()]

    def get(self, relay: str) -> dict[str, Any]:
        """Return one relay; raises NotFound for an unknown id."""
        return self._shown(self._deps.rows.get(relay))

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        live = self._live.get(row["id"])
        return row if live is None else row | self._deps.storage.pauses(live.paused_before_s)

    # For the cloud.

    def running(self) -> list[str]:
        """Return the ids of the running relays."""
        with self._lock:
            return list(self._live)

    def resume(self) -> None:
        """After a restart, resume every message without an answer."""
        running = self._deps.rows.running()
        for relay, bundle in running.items():
            live = self._enter(relay, bundle)
            live.resumed = True
            for message in self._deps.rows.messages(relay):
                if message.answer is None:
                    self._open(live, message, live.assignment(message, self._within_s(message)), is_announced=True)
                else:
                    live.last = message.number
                    live.replies[message.number] = self._line(relay, message.number, message.answer, lost=message.lost)
        for folder in self._deps.folder.iterdir():
            if folder.name not in running:
                shutil.rmtree(folder, ignore_errors=True)

    def wake(self) -> None:
        """Wake `watch`: the presence of a device or the state of the storage has changed."""
        with self._lock:
            self._is_woken = True
            self._times.notify_all()

    def watch(self) -> None:
        """Give up late or lost messages, and relays without an operator; runs until `close`."""
        while not self._closed:
            wait_s = self.look()
            with self._times:
                self._times.wait_for(lambda: self._is_woken or self._closed, wait_s)

    def look(self) -> float:
        """Do the due work of `watch`; return the time until there is more (s)."""
        presence, now_s = Presence.of(self._deps.link), self._timing.clock()
        is_paused = not self._deps.storage.look()
        with self._lock:
            self._is_woken = False
            waiting = [sent for live in self._live.values() for sent in live.waiting.values()]
            ends_s = {live.id: live.last_request_s + self._timing.operator_s for live in self._live.values()}
        waits_s = [LONGEST_WAIT_S, *(end_s - now_s for end_s in ends_s.values())]
        for sent in waiting:
            if sent.online_state != (online_state := presence.online_state(sent.device)):
                sent.online_state = online_state
                sent.opened.note(presence)
            wait_s = sent.opened.wait_s()
            if wait_s <= 0 or sent.opened.is_paused is not is_paused:
                sent.opened.look()
                wait_s = sent.opened.wait_s()
            waits_s.append(wait_s)
        acts = [functools.partial(self._answer_for, sent) for sent in waiting if sent.given_up is not None]
        acts += [functools.partial(self._end_abandoned, relay) for relay, end_s in ends_s.items() if end_s <= now_s]
        for act in acts:
            with suppress(CloudStopping):  # repeated after the restart
                self._deps.storage.insist(act, self._refuse_closed)  # waits while the disk is full
        return 0.0 if acts else min(waits_s)

    def close(self) -> None:
        """End `watch` and all streams; the relays continue at the next start."""
        with self._lock:
            self._closed = True
            self._times.notify_all()
            self._arrived.notify_all()

    def _refuse_closed(self) -> None:
        with self._lock:
            if self._closed:
                raise CloudStopping("the cloud is stopping; its relays continue at the next start")

    # The caller has the lock.

    def _wait_for_news(self, relay: str, sent: set[int], timeout_s: float) -> None:
        def has_news() -> bool:
            live = self._live.get(relay)
            return live is None or self._closed or not live.replies.keys() <= sent

        self._arrived.wait_for(has_news, timeout_s)

    # The caller does not have the lock.

    def _running(self, relay: str) -> LiveRelay:
        with self._lock:
            live = self._live.get(relay)
            if live is not None:
                live.last_request_s = self._timing.clock()
                return live
        row = self._deps.rows.get(relay)
        raise NotFound(f"{relay} has ended: {row['state']}{', ' + row['error'] if row['error'] else ''}")

    def _enter(self, relay: str, bundle: Signed) -> LiveRelay:
        contents, now_s = BlobStore(self._deps.folder / relay), self._timing.clock()
        paused_s = self._deps.storage.paused_s()
        with self._lock:
            live = self._live[relay] = LiveRelay(relay, bundle, contents, now_s, paused_s)
        self.wake()
        return live

    def _open(self, live: LiveRelay, message: RelayMessage, assignment: Deliver, *, is_announced: bool = False) -> None:
        """Start waiting for a message's answer; send it to its device, unless that was done before a restart."""
        timing = self._timing
        terms = Terms(deadline_s=assignment.deadline_s, offline_grace_s=timing.device_s, return_s=timing.return_s)
        around = Surroundings(
            clock=timing.clock, storage=self._deps.storage, act=lambda instruction: self._execute(instruction, sent)
        )
        opened = OpenRound(assignment, (message.device,), terms, around)
        opened.source = live.contents.path(message.content_sha256)
        opened.record = functools.partial(self._deps.rows.answer, live.id, message.number, lost=False)
        sent = SentMessage(live.id, message.number, message.device, opened)
        with self._lock:
            live.waiting[message.number] = sent
            live.devices.add(message.device)
            live.last = message.number
        self._deps.rounds.add(opened)
        opened.begin(is_announced=is_announced)

    def _execute(self, instruction: Instruction, sent: SentMessage) -> None:
        """Execute an instruction of a message's exchange, under its round's lock."""
        match instruction:
            case Announce():
                self._deps.link.send_job(sent.device, sent.opened.assignment)
            case Yield():
                self._forward(sent, sent.opened.take(sent.device), lost=False)
            case GiveUp(reason=reason):
                sent.given_up = reason  # `look` answers for the device, because that may have to wait for the disk

    def _forward(self, sent: SentMessage, answer: AnswerRow, *, lost: bool) -> bool:
        """Pass a durable answer to the operator's stream; False if it is no longer needed."""
        line = self._line(sent.relay, sent.number, answer, lost=lost)
        with self._arrived:
            live = self._live.get(sent.relay)
            if live is None or live.waiting.pop(sent.number, None) is None:
                return False
            live.replies[sent.number] = line
            self._arrived.notify_all()
        self._deps.rounds.remove(sent.opened)
        self._deps.link.close_round(sent.relay, sent.number)
        return True

    def _answer_for(self, sent: SentMessage) -> None:
        """Answer in place of a device that was given up, and tell the device."""
        with self._lock:
            live = self._live.get(sent.relay)
            if live is None or sent.number not in live.waiting:
                return
        is_offline = sent.given_up is GiveUpReason.OFFLINE
        reason = f"offline for {self._timing.device_s:g} s" if is_offline else "no reply in time"
        answer = AnswerRow(device=sent.device, reason=f"device {sent.device}: {reason}")
        self._deps.rows.answer(sent.relay, sent.number, answer, lost=True)
        if self._forward(sent, answer, lost=True):
            event(_log, logging.WARNING, "message.lost", relay=sent.relay, number=sent.number, device=sent.device,
                  reason=reason)  # fmt: skip
            self._tell_closed(sent)

    def _end_abandoned(self, relay: str) -> None:
        self.end(relay, "failed", f"its operator sent no request for {self._timing.operator_s:g} s")

    def _within_s(self, message: RelayMessage) -> float:
        return max(1.0, message.expires_s - self._timing.time_of_day())

    def _tell_closed(self, sent: SentMessage) -> None:
        self._deps.link.send_job(sent.device, RoundClosed(job=sent.relay, round=sent.number, job_ended=False))

    def _line(self, relay: str, number: int, answer: AnswerRow, *, lost: bool) -> Line:
        path = self._deps.spool.file(relay, number, answer.device) if answer.file is not None else None
        size = path.stat().st_size if path is not None else 0
        return {"number": number, "device": answer.device, "size": size, "reason": answer.reason, "lost": lost}
