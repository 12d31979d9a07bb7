"""What an agent must not forget: rounds it has answered, and updates the cloud has not acknowledged.

SQLite (WAL, synchronous=FULL) for the facts, files for the bytes. Invariant: a row of the outbox
points at a whole file that is on disk. So the file is written, synced and renamed before its row, and
the row goes before the file; what a crash leaves between the two is cleaned when the store opens. A
round is noted as answered in the same transaction that drops its update. The state of a Flower app's client
moves on in the transaction that takes its reply in, so that a message done again meets the state it met before.

One spare file is kept: overwriting pages that the system already has is ten times cheaper than new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.disk import require_space
from edgefl.errors import HomeError

SCHEMA_VERSION = 1
LOW_DISK_BYTES = 64 << 20  # below it no spare file is kept
MAX_ANSWERED = 10_000  # rounds remembered; a plan older than so many rounds does not come again

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
  job TEXT, round INTEGER, file TEXT NOT NULL, size INTEGER NOT NULL, blake3 TEXT NOT NULL, weight REAL NOT NULL,
  metrics TEXT NOT NULL, PRIMARY KEY (job, round));
CREATE TABLE IF NOT EXISTS failures (job TEXT, round INTEGER, reason TEXT NOT NULL, PRIMARY KEY (job, round));
CREATE TABLE IF NOT EXISTS answered (
  id INTEGER PRIMARY KEY, job TEXT NOT NULL, round INTEGER NOT NULL, UNIQUE (job, round));
CREATE TABLE IF NOT EXISTS states (job TEXT PRIMARY KEY, file TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """An update that waits to be acknowledged."""

    job: str
    round: int
    path: Path
    size: int
    blake3: str
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureNote:
    """A round that this device could not do, and has to say so."""

    job: str
    round: int
    reason: str


class Store:
    """The durable state of one agent. Used from one thread."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "outbox"
        self._states = home / "states"
        for folder in (self.folder, self._states):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._untold: dict[tuple[str, int], FailureNote] = {}  # failures that a full disk did not take
        self._db = _open(home / "agent.db")
        self._clean()

    def close(self) -> None:
        self._db.close()

    def draft(self, job: str, number: int) -> Path:
        """Return where to write a round's update; it may hold old bytes that are to be overwritten."""
        draft, spare = self._file(job, number).with_suffix(".draft"), self.folder / "spare"
        if spare.exists():
            spare.replace(draft)
        return draft

    def require_space(self, size: int) -> None:
        """Raise DiskFull unless an update of so many bytes can be written."""
        spare = self.folder / "spare"
        here = spare.stat().st_size if spare.exists() else 0
        require_space(self.folder, max(0, size - here), "the update")

    def discard(self, draft: Path) -> None:
        """A draft came to nothing; its pages serve the next, unless they are the last."""
        if draft.exists():
            if shutil.disk_usage(self.folder).free < LOW_DISK_BYTES:
                draft.unlink()
            else:
                draft.replace(self.folder / "spare")

    def put(self, update: Outgoing, state: Path | None = None) -> None:
        """Take an update into the outbox; its path is a draft, written and synced. Raises HomeError.

        `state` is the job's next state, a `state_draft` that is written and synced too.
        """
        path, former = self._file(update.job, update.round), self.state(update.job)
        update.path.replace(path)
        _sync_folder(self.folder)
        if state is not None:
            state = state.replace(state.with_suffix(".state"))
            _sync_folder(self._states)
        try:
            self._insert(update, path, state)
        except HomeError:
            for file in (path, *([state] if state else [])):
                file.unlink()
            raise
        if state is not None and former is not None and former != state:
            former.unlink(missing_ok=True)

    def state_draft(self, job: str, number: int) -> Path:
        """Return where to write the state after a job's message."""
        return self._states / f"{_name(job, number)}.draft"

    def state(self, job: str) -> Path | None:
        """Return a job's state, if it has one."""
        found = self._select("SELECT file FROM states WHERE job = ?", (job,))
        return self._states / found[0]["file"] if found else None

    def jobs_with_state(self) -> list[str]:
        """Return the jobs that have a state here."""
        return [row["job"] for row in self._select("SELECT job FROM states ORDER BY rowid")]

    def forget_state(self, job: str) -> None:
        """The job is over."""
        state = self.state(job)
        with self._change():
            self._db.execute("DELETE FROM states WHERE job = ?", (job,))
        if state is not None:
            state.unlink(missing_ok=True)

    def _insert(self, update: Outgoing, path: Path, state: Path | None) -> None:
        with self._change():
            if state is not None:
                self._db.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (update.job, state.name))
            self._db.execute(
                "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?, ?, ?, ?)",
                (update.job, update.round, path.name, update.size, update.blake3, update.weight,
                 json.dumps(dict(update.metrics))),
            )  # fmt: skip

    def outbox(self) -> list[Outgoing]:
        """Return the updates not yet acknowledged, oldest first."""
        return [_outgoing(self.folder, row) for row in self._select("SELECT * FROM outbox ORDER BY rowid")]

    def note_failure(self, note: FailureNote) -> None:
        """Remember to tell the cloud that a round cannot be done here.

        Where the disk is full it is remembered by this process only: a failure is told without what failed.
        """
        self._untold[note.job, note.round] = note
        with contextlib.suppress(HomeError):
            with self._change():
                self._db.execute(
                    "INSERT OR REPLACE INTO failures VALUES (?, ?, ?)", (note.job, note.round, note.reason)
                )
            del self._untold[note.job, note.round]  # committed

    def failures(self) -> list[FailureNote]:
        """Return the failures that the cloud has not been told of."""
        rows = self._select("SELECT job, round, reason FROM failures ORDER BY rowid")
        kept = [FailureNote(job=job, round=number, reason=reason) for job, number, reason in rows]
        return [*kept, *self._untold.values()]

    def settle(self, job: str, number: int) -> None:
        """The cloud has the answer, or wants none: drop it and never train for this round again."""
        self._untold.pop((job, number), None)
        with self._change():
            self._db.execute("DELETE FROM outbox WHERE job = ? AND round = ?", (job, number))
            self._db.execute("DELETE FROM failures WHERE job = ? AND round = ?", (job, number))
            self._db.execute("INSERT OR IGNORE INTO answered (job, round) VALUES (?, ?)", (job, number))
            self._db.execute(
                "DELETE FROM answered WHERE id <= (SELECT max(id) FROM answered) - ?", (MAX_ANSWERED,)
            )  # the newest are kept
        path = self._file(job, number)
        if path.exists():
            path.replace(self.folder / "spare")

    def is_answered(self, job: str, number: int) -> bool:
        """Whether this round needs no training: settled, or its answer is on its way."""
        if (job, number) in self._untold:
            return True
        found = self._select(
            "SELECT 1 FROM answered WHERE job = :job AND round = :round UNION ALL "
            "SELECT 1 FROM outbox WHERE job = :job AND round = :round UNION ALL "
            "SELECT 1 FROM failures WHERE job = :job AND round = :round",
            {"job": job, "round": number},
        )
        return bool(found)

    def last_settled(self) -> int:
        """Return a number that rises with each `settle`."""
        return int(self._select("SELECT ifnull(max(id), 0) FROM answered")[0][0])

    def ask_again(self, job: str, number: int, settled_until: int) -> None:
        """The cloud waits for a round: forget that it was settled, if that was not after `settled_until`."""
        with self._change():
            self._db.execute(
                "DELETE FROM answered WHERE job = ? AND round = ? AND id <= ?", (job, number, settled_until)
            )

    def drop_spare(self) -> None:
        """Give the spare file's disk space back."""
        (self.folder / "spare").unlink(missing_ok=True)

    def _select(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[sqlite3.Row]:
        """Return rows; raises HomeError where they cannot be read now."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.OperationalError as cause:
            raise HomeError(f"{self.folder.parent / 'agent.db'} cannot be read: {cause}. Look at its disk") from cause

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction; raises HomeError where it cannot be written, and nothing has changed then."""
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
        """Remove files without a row, and rows whose file is not whole: the cloud asks for those rounds again."""
        kept = set()
        for update in self.outbox():
            if update.path.exists() and update.path.stat().st_size == update.size:
                kept.add(update.path.name)
                continue
            with contextlib.suppress(HomeError), self._change():  # on a full disk it stays, and is never sent
                self._db.execute("DELETE FROM outbox WHERE job = ? AND round = ?", (update.job, update.round))
        kept |= {row["file"] for row in self._select("SELECT file FROM states")}
        for folder in (self.folder, self._states):
            for file in folder.iterdir():
                if file.name not in kept:
                    file.unlink()


def _name(job: str, number: int) -> str:
    return hashlib.sha256(f"{number}/{job}".encode()).hexdigest()[:32]  # a job's id is no file name


def _open(path: Path) -> sqlite3.Connection:
    try:
        try:
            db = _connect(path, locking="NORMAL")
        except sqlite3.OperationalError:
            # A full disk has no room for the shared-memory file; the only process at the database needs none.
            db = _connect(path, locking="EXCLUSIVE")
    except sqlite3.DatabaseError as cause:
        raise HomeError(f"{path} cannot be used: {cause}. Move it away: unsent updates are trained again") from cause
    return db


def _connect(path: Path, *, locking: str) -> sqlite3.Connection:
    """Open the database, and write nothing to one that has the schema already."""
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
                f"{path} has schema {version}; this edgefl knows {SCHEMA_VERSION}. Install the newer version"
            )
        if version < SCHEMA_VERSION:
            db.executescript(_SCHEMA)
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
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
