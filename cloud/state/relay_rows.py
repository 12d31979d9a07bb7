"""Relays in the database: which are running, which messages are waiting, and which are answered.

A relay carries the messages of a Flower app between its ServerApp, on the operator's machine, and the
ClientApps on devices. A message is durable before it is announced, its answer before it is acknowledged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cloud.jobs.answers import AnswerRow
from cloud.state.store import errands, relays
from edgefl.errors import NotFound
from edgefl.protocols.messages import Signed, from_json

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RelayMessage:
    """One message on its way to a device. The operator numbers a relay's messages from 1."""

    number: int
    device: str
    envelope: str  # its metadata, which the cloud does not read
    content_sha256: str  # of the file with its content, which messages may share
    expires_s: float  # seconds since 1970
    answer: AnswerRow | None = None
    lost: bool = False  # the cloud gave the device up and answered in its place


class RelayRows:
    """The relays of one database. Methods may be called from any thread."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def create(self, relay: str, app: str, bundle: Signed, name: str | None = None, label: str | None = None) -> None:
        """Create a running relay."""
        values = {"id": relay, "app": app, "name": name, "label": label, "bundle": dataclasses.asdict(bundle),
                  "state": "running", "sent": 0, "answered": 0, "created_s": self._clock()}  # fmt: skip
        with self._engine.begin() as db:
            db.execute(relays.insert().values(values))

    def running(self) -> dict[str, Signed]:
        """Return the bundles of the running relays, by id."""
        with self._engine.begin() as db:
            rows = db.execute(sa.select(relays.c.id, relays.c.bundle).where(relays.c.state == "running"))
            return {row.id: from_json(Signed, row.bundle) for row in rows}

    def messages(self, relay: str) -> list[RelayMessage]:
        """Return a relay's messages, in order."""
        with self._engine.begin() as db:
            rows = db.execute(errands.select().where(errands.c.relay == relay).order_by(errands.c.number)).mappings()
            return [_message(row) for row in rows]

    def add(self, relay: str, messages: Sequence[RelayMessage]) -> list[RelayMessage]:
        """Store messages in increasing order of their numbers; return the new ones."""
        with self._engine.begin() as db:
            sent = db.scalar(sa.select(relays.c.sent).where(relays.c.id == relay)) or 0
            new = [message for message in messages if message.number > sent]
            if new:
                db.execute(errands.insert(), [_row(relay, message) for message in new])
                db.execute(relays.update().where(relays.c.id == relay).values(sent=new[-1].number))
        return new

    def answer(self, relay: str, number: int, answer: AnswerRow, *, lost: bool) -> None:
        """Make an answer durable, before it is acknowledged."""
        here = (errands.c.relay == relay) & (errands.c.number == number)
        with self._engine.begin() as db:
            db.execute(
                errands.update().where(here).values(answered=True, file=answer.file, reason=answer.reason, lost=lost)
            )
            db.execute(relays.update().where(relays.c.id == relay).values(answered=relays.c.answered + 1))

    def drop(self, relay: str, numbers: Sequence[int]) -> None:
        """Delete messages, answered or not."""
        with self._engine.begin() as db:
            db.execute(errands.delete().where((errands.c.relay == relay) & errands.c.number.in_(numbers)))

    def end(self, relay: str, state: str, error: str | None) -> bool:
        """Mark a running relay as ended, and delete its messages; False if it had already ended."""
        running = (relays.c.id == relay) & (relays.c.state == "running")
        with self._engine.begin() as db:
            ended = db.execute(relays.update().where(running).values(state=state, error=error, ended_s=self._clock()))
            db.execute(errands.delete().where(errands.c.relay == relay))
            return bool(ended.rowcount)

    def list(self) -> Rows:
        """Return every relay as the REST plane shows it, the newest first."""
        with self._engine.begin() as db:
            return [_shown(row) for row in db.execute(relays.select().order_by(relays.c.created_s.desc())).mappings()]

    def get(self, relay: str) -> dict[str, Any]:
        """Return one relay; raises NotFound for an unknown id."""
        with self._engine.begin() as db:
            row = db.execute(relays.select().where(relays.c.id == relay)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no relay {relay!r}; list them with `edgefl jobs list`")
        return _shown(row)


def _row(relay: str, message: RelayMessage) -> dict[str, Any]:
    kept = ("number", "device", "envelope", "content_sha256", "expires_s")
    values = {name: getattr(message, name) for name in kept}
    return values | {"relay": relay, "answered": False, "file": None, "reason": None, "lost": False}


def _message(row: Any) -> RelayMessage:
    answer = AnswerRow(device=row["device"], file=row["file"], reason=row["reason"]) if row["answered"] else None
    return RelayMessage(
        number=row["number"],
        device=row["device"],
        envelope=row["envelope"],
        content_sha256=row["content_sha256"],
        expires_s=row["expires_s"],
        answer=answer,
        lost=row["lost"],
    )


def _shown(row: Any) -> dict[str, Any]:
    names = ("id", "state", "sent", "answered", "error", "created_s", "ended_s")
    shown = {"kind": "relay", "task": row["app"], "name": row["name"] or row["app"], "label": row["label"]}
    return shown | {name: row[name] for name in names}
