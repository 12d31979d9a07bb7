"""The agent's durable state: which rounds it has answered, and updates that the cloud has not acknowledged.

Metadata is in SQLite (WAL, synchronous=FULL), updates are files. Invariant: every row of the outbox points to a
complete file on disk. So the file is written, synced and renamed before its row is added, and the row is deleted
before the file; opening the store removes what a crash left in between. A round is marked as answered in the
transaction that deletes its update. The state that follows a round, or a Flower app's message, is added in the
transaction that stores the answer. The one before it is kept, too: a round that is trained again, because the cloud
lost its answer, starts from the same state.

One spare file is kept: overwriting its pages is ten times cheaper than allocating new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.disk import require_space
from edgefl.errors import HomeError
from edgefl.process.durable import flush
from edgefl.protocols.fields import to_json
from edgefl.protocols.messages import MAX_ROUND
from edgefl.records import DeviceEvaluation

SCHEMA_VERSION = 4
LOW_DISK_BYTES = 64 << 20  # with less free space no spare file is kept
MAX_ANSWERED = 10_000  # answered rounds to remember; the cloud never sends plans older than that again

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
  job TEXT, round INTEGER, file TEXT NOT NULL, size INTEGER NOT NULL, blake3 TEXT NOT NULL, weight REAL NOT NULL,
  metrics TEXT NOT NULL, evaluation TEXT, model TEXT NOT NULL DEFAULT '', PRIMARY KEY (job, round));
CREATE TABLE IF NOT EXISTS failures (
  job TEXT, round INTEGER, reason TEXT NOT NULL, model TEXT NOT NULL DEFAULT '', PRIMARY KEY (job, round));
CREATE TABLE IF NOT EXISTS answered (
  id INTEGER PRIMARY KEY, job TEXT NOT NULL, round INTEGER NOT NULL, UNIQUE (job, round));
CREATE TABLE IF NOT EXISTS kept_states (job TEXT, round INTEGER, file TEXT NOT NULL, PRIMARY KEY (job, round));
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """An update that the cloud has not acknowledged yet."""

    job: str
    round: int
    path: Path
    size: int
    blake3: str
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: DeviceEvaluation | None = None
    model: str = ""  # SHA-256 of the model that it was trained from; empty = an older agent has made it


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureNote:
    """A round that failed on this device; the cloud is not informed yet."""

    job: str
    round: int
    reason: str
    model: str = ""  # as of an update


class Store:
    """The durable state of one agent. Used from one thread."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "outbox"
        self._states = home / "states"
        for folder in (self.folder, self._states):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._in_memory: dict[tuple[str, int], FailureNote] = {}  # failures that did not fit on a full disk
        self._db = _open(home / "agent.db")
        self._clean()

    def close(self) -> None:
        self._db.close()

    def draft(self, job: str, number: int) -> Path:
        """Return where to write a round's update. The file may exist: overwrite its old bytes."""
        draft, spare = self._file(job, number).with_suffix(".draft"), self.folder / "spare"
        if spare.exists():
            spare.replace(draft)
        return draft

    def require_space(self, size: int) -> None:
        """Raise DiskFull unless there is space for an update of `size` bytes."""
        spare = self.folder / "spare"
        here = spare.stat().st_size if spare.exists() else 0
        require_space(self.folder, max(0, size - here), "the update")

    def discard(self, draft: Path) -> None:
        """Drop a draft: keep its file as the spare one, or delete it if the disk is nearly full."""
        if draft.exists():
            if shutil.disk_usage(self.folder).free < LOW_DISK_BYTES:
                draft.unlink()
            else:
                draft.replace(self.folder / "spare")

    def put(self, update: Outgoing, state: Path | None = None) -> None:
        """Add an update to the outbox; its path is a draft that is written and synced. Raises HomeError.

        `state` is the job's next state: a `state_draft`, also written and synced.
        """
        path = self._file(update.job, update.round)
        update.path.replace(path)
        flush(self.folder)
        if state is not None:
            state = state.replace(state.with_suffix(".state"))
            flush(self._states)
        try:
            self._insert(update, path, state)
        except HomeError:
            for file in (path, *([state] if state else [])):
                file.unlink()
            raise
        if state is not None:
            self._drop_older_states(update.job)

    def state_draft(self, job: str, number: int) -> Path:
        """Return where to write the state that follows a job's message."""
        return self._states / f"{_name(job, number)}.draft"

    def state(self, job: str, before: int = MAX_ROUND) -> Path | None:
        """Return the file of a job's newest state, of rounds before this one; None if there is none."""
        query = "SELECT file FROM kept_states WHERE job = ? AND round < ? ORDER BY rowid DESC"
        files = (self._states / row["file"] for row in self._select(query, (job, before)))
        return next((file for file in files if file.exists()), None)

    def has_state(self, job: str, number: int) -> bool:
        """Whether there is a state that follows this round."""
        rows = self._select("SELECT file FROM kept_states WHERE job = ? AND round = ?", (job, number))
        return any((self._states / row["file"]).exists() for row in rows)

    def state_files(self, job: str, number: int) -> dict[str, Any]:
        """Return fields of a trainer's request: where a client's state is, and where its next one goes."""
        return {"state": str(self.state(job, before=number) or ""), "state_out": str(self.state_draft(job, number))}

    def jobs_with_state(self) -> list[str]:
        """Return the jobs that have a state on this device."""
        return [row["job"] for row in self._select("SELECT job FROM kept_states GROUP BY job ORDER BY min(rowid)")]

    def forget_state(self, job: str) -> None:
        """Delete a job's states: the job has ended."""
        self._drop_states(self._select("SELECT job, round, file FROM kept_states WHERE job = ?", (job,)))

    def _drop_older_states(self, job: str) -> None:
        """Keep the two newest states of a job; on a full disk, more of them."""
        with contextlib.suppress(HomeError):
            self._drop_states(
                self._select(
                    "SELECT job, round, file FROM kept_states WHERE job = ? ORDER BY rowid DESC LIMIT -1 OFFSET 2",
                    (job,),
                )
            )

    def _drop_states(self, rows: Sequence[sqlite3.Row]) -> None:
        with self._change():
            self._db.executemany(
                "DELETE FROM kept_states WHERE job = ? AND round = ?", [(row["job"], row["round"]) for row in rows]
            )
        for row in rows:
            (self._states / row["file"]).unlink(missing_ok=True)

    def _insert(self, update: Outgoing, path: Path, state: Path | None) -> None:
        with self._change():
            if state is not None:
                values = (update.job, update.round, state.name)
                self._db.execute("INSERT OR REPLACE INTO kept_states VALUES (?, ?, ?)", values)
            self._db.execute(
                "INSERT OR REPLACE INTO outbox (job, round, file, size, blake3, weight, metrics, evaluation, model) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (update.job, update.round, path.name, update.size, update.blake3, update.weight,
                 json.dumps(dict(update.metrics)),
                 None if update.evaluation is None else json.dumps(to_json(update.evaluation)),
                 update.model),
            )  # fmt: skip

    def outbox(self) -> list[Outgoing]:
        """Return the updates not yet acknowledged, oldest first."""
        return [_outgoing(self.folder, row) for row in self._select("SELECT * FROM outbox ORDER BY rowid")]

    def note_failure(self, note: FailureNote) -> None:
        """Store a failure until the cloud is informed of it.

        If the disk is full, only this process remembers it.
        """
        self._in_memory[note.job, note.round] = note
        with contextlib.suppress(HomeError):
            with self._change():
                self._db.execute(
                    "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)",
                    (note.job, note.round, note.reason, note.model),
                )
            del self._in_memory[note.job, note.round]  # committed

    def failures(self) -> list[FailureNote]:
        """Return the failures that the cloud is not informed of yet."""
        rows = self._select("SELECT job, round, reason, model FROM failures ORDER BY rowid")
        kept = [FailureNote(**row) for row in rows]
        return [*kept, *self._in_memory.values()]

    def mark_answered(self, job: str, number: int) -> None:
        """Mark a round as answered or closed: delete its update, and never train for it again."""
        self._in_memory.pop((job, number), None)
        with self._change():
            self._db.execute("DELETE FROM outbox WHERE job = ? AND round = ?", (job, number))
            self._db.execute("DELETE FROM failures WHERE job = ? AND round = ?", (job, number))
            self._db.execute("INSERT OR IGNORE INTO answered (job, round) VALUES (?, ?)", (job, number))
            self._db.execute(
                "DELETE FROM answered WHERE id <= (SELECT max(id) FROM answered) - ?", (MAX_ANSWERED,)
            )  # keep the newest
        path = self._file(job, number)
        if path.exists():
            path.replace(self.folder / "spare")

    def is_answered(self, job: str, number: int) -> bool:
        """Whether this round needs no training: it was answered or closed, or its answer is in the outbox."""
        if (job, number) in self._in_memory:
            return True
        found = self._select(
            "SELECT 1 FROM answered WHERE job = :job AND round = :round UNION ALL "
            "SELECT 1 FROM outbox WHERE job = :job AND round = :round UNION ALL "
            "SELECT 1 FROM failures WHERE job = :job AND round = :round",
            {"job": job, "round": number},
        )
        return bool(found)

    def last_answered(self) -> int:
        """Return a number that grows with each `mark_answered`."""
        return int(self._select("SELECT ifnull(max(id), 0) FROM answered")[0][0])

    def reopen(self, job: str, number: int, answered_until: int) -> None:
        """Unmark a round that the cloud waits for, unless it was marked after `answered_until` (`last_answered`)."""
        with self._change():
            self._db.execute(
                "DELETE FROM answered WHERE job = ? AND round = ? AND id <= ?", (job, number, answered_until)
            )

    def drop_spare(self) -> None:
        """Delete the spare file to free its disk space."""
        (self.folder / "spare").unlink(missing_ok=True)

    def _select(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[sqlite3.Row]:
        """Return rows; raises HomeError if the database cannot be read now."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.OperationalError as cause:
            raise HomeError(f"{self.folder.parent / 'agent.db'} cannot be read: {cause}. Check its disk") from cause

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Run one transaction; if it cannot be written, raise HomeError and change nothing."""
        try:
            with self._db:
                yield
        except sqlite3.OperationalError as cause:
            raise HomeError(
                f"{self.folder.parent / 'agent.db'} cannot be written: {cause}. Free some space on its disk"
            ) from cause

    def _file(self, job: str, number: int) -> Path:
        return self.folder / f"{_name(job, number)}.update"

    def _clean(self) -> None:
        """Delete files without a row, and rows whose file is incomplete: the cloud asks for those rounds again."""
        kept = set()
        for update in self.outbox():
            if update.path.exists() and update.path.stat().st_size == update.size:
                kept.add(update.path.name)
                continue
            with contextlib.suppress(HomeError), self._change():  # on a full disk the row stays, but is never sent
                self._db.execute("DELETE FROM outbox WHERE job = ? AND round = ?", (update.job, update.round))
        kept |= {row["file"] for row in self._select("SELECT file FROM kept_states")}
        for folder in (self.folder, self._states):
            for file in folder.iterdir():
                if file.name not in kept:
                    file.unlink()


def _name(job: str, number: int) -> str:
    return hashlib.sha256(f"{number}/{job}".encode()).hexdigest()[:32]  # a job's id may not be a valid file name


def _open(path: Path) -> sqlite3.Connection:
    try:
        try:
            db = _connect(path, locking="NORMAL")
        except sqlite3.OperationalError:
            # A full disk has no space for SQLite's shared-memory file; a single process works without it.
            db = _connect(path, locking="EXCLUSIVE")
    except sqlite3.DatabaseError as cause:
        raise HomeError(
            f"{path} cannot be opened: {cause}. Move it away; updates that were not sent are trained again"
        ) from cause
    return db


def _connect(path: Path, *, locking: str) -> sqlite3.Connection:
    """Open the database; if it already has the schema, nothing is written."""
    with contextlib.ExitStack() as undo:
        db = sqlite3.connect(path, timeout=10)
        undo.callback(db.close)
        db.row_factory = sqlite3.Row
        db.execute(f"PRAGMA locking_mode = {locking}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise HomeError(
                f"{path} has schema {version}; this edgefl supports up to {SCHEMA_VERSION}. Install a newer edgefl"
            )
        if version < SCHEMA_VERSION:
            db.executescript(_SCHEMA)
            columns = {row["name"] for row in db.execute("PRAGMA table_info(outbox)")}
            if "evaluation" not in columns:  # version 1
                db.execute("ALTER TABLE outbox ADD COLUMN evaluation TEXT")
            if "model" not in columns:  # version 3
                db.execute("ALTER TABLE outbox ADD COLUMN model TEXT NOT NULL DEFAULT ''")
                if "model" not in {row["name"] for row in db.execute("PRAGMA table_info(failures)")}:
                    db.execute("ALTER TABLE failures ADD COLUMN model TEXT NOT NULL DEFAULT ''")
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'states'").fetchone():  # version 2
                db.execute("INSERT INTO kept_states SELECT job, 0, file FROM states")
                db.execute("DROP TABLE states")
                db.commit()
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        undo.pop_all()
    return db


def _outgoing(folder: Path, row: sqlite3.Row) -> Outgoing:
    return Outgoing(
        job=row["job"],
        round=row["round"],
        path=folder / row["file"],
        size=row["size"],
        blake3=row["blake3"],
        weight=row["weight"],
        metrics=json.loads(row["metrics"]),
        evaluation=None if row["evaluation"] is None else DeviceEvaluation(**json.loads(row["evaluation"])),
        model=row["model"],
    )
