"""The durable store: what survives, and what is cleaned."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from edge_agent.store import FailureNote, Outgoing, Store
from edgefl.errors import HomeError
from edgefl.records import DeviceEvaluation


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def put(store: Store, number: int = 1, data: bytes = b"update", state: bytes | None = None) -> None:
    draft, state_draft = store.draft("j", number), store.state_draft("j", number)
    draft.write_bytes(data)
    update = Outgoing(job="j", round=number, path=draft, size=len(data), blake3="00", weight=2.5, metrics={"a": 0.5})
    if state is not None:
        state_draft.write_bytes(state)
    store.put(update, None if state is None else state_draft)


def test_an_update_survives_a_restart(store, tmp_path):
    put(store)
    again = Store(tmp_path)
    [update] = again.outbox()
    assert update.path.read_bytes() == b"update"
    assert (update.job, update.round, update.weight, update.metrics) == ("j", 1, 2.5, {"a": 0.5})
    assert again.is_answered("j", 1)
    again.close()


def test_settled_is_gone_yet_remembered(store):
    put(store)
    store.mark_answered("j", 1)
    assert store.outbox() == []
    assert store.is_answered("j", 1)
    assert not store.is_answered("j", 2)
    assert not store.is_answered("other", 1)


def test_a_failure_is_remembered_until_it_is_settled(store):
    store.note_failure(FailureNote(job="j", round=1, reason="why"))
    assert store.failures() == [FailureNote(job="j", round=1, reason="why")]
    assert store.is_answered("j", 1)
    store.mark_answered("j", 1)
    assert store.failures() == []
    assert store.is_answered("j", 1)


def test_the_pages_of_a_settled_update_serve_the_next(store):
    put(store)
    [update] = store.outbox()
    inode = update.path.stat().st_ino
    store.mark_answered("j", 1)
    assert store.draft("j", 2).stat().st_ino == inode


def test_a_discarded_draft_is_the_spare(store):
    draft = store.draft("j", 1)
    draft.write_bytes(b"half")
    store.discard(draft)
    assert not draft.exists()
    assert store.draft("j", 2).read_bytes() == b"half"
    store.drop_spare()


def test_orphans_and_drafts_are_removed_at_start(store, tmp_path):
    put(store)
    [update] = store.outbox()
    (store.folder / "orphan.update").write_bytes(b"renamed, but killed before its row")
    store.draft("j", 2).write_bytes(b"half")
    again = Store(tmp_path)
    assert list(again.folder.iterdir()) == [update.path]
    again.close()


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_row_without_its_whole_file_is_dropped_and_trained_again(store, tmp_path, damage):
    put(store)
    [update] = store.outbox()
    update.path.unlink() if damage == "gone" else update.path.write_bytes(b"up")
    again = Store(tmp_path)
    assert again.outbox() == []
    assert not again.is_answered("j", 1)
    again.close()


def test_a_job_name_is_never_a_path(store):
    assert store.draft("../../etc/passwd", 1).parent == store.folder


def test_updates_leave_in_their_order(store):
    for number in (3, 1, 2):
        put(store, number)
    assert [update.round for update in store.outbox()] == [3, 1, 2]


def test_a_newer_schema_is_refused(store, tmp_path):
    db = sqlite3.connect(tmp_path / "agent.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(HomeError, match="schema 99"):
        Store(tmp_path)


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "agent.db").write_bytes(b"not a database, and long enough to be taken for one" * 100)
    with pytest.raises(HomeError, match="cannot be opened"):
        Store(tmp_path)


def fill_disk(store: Store) -> None:
    """Let the database grow no more, as on a full disk."""
    [pages] = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_is_said_and_changes_nothing(store):
    put(store)
    fill_disk(store)
    with pytest.raises(HomeError, match=r"agent.db cannot be written: database or disk is full. Free some space"):
        store.mark_answered("j" * 100_000, 2)
    draft = store.draft("j", 3)
    draft.write_bytes(b"x")
    update = Outgoing(job="j", round=3, path=draft, size=1, blake3="x" * 100_000, weight=1.0)
    with pytest.raises(HomeError):
        store.put(update)
    assert [update.round for update in store.outbox()] == [1]
    assert store.failures() == []
    assert [file.name for file in store.folder.iterdir()] == [store.outbox()[0].path.name]


def test_a_failure_is_told_without_the_disk_that_failed(store):
    fill_disk(store)
    note = FailureNote(job="j", round=2, reason="x" * 100_000)
    store.note_failure(note)
    assert store.failures() == [note]
    assert store.is_answered("j", 2)
    store.mark_answered("j", 2)
    assert store.failures() == []


def test_on_a_disk_that_is_nearly_full_no_spare_file_is_kept(store, monkeypatch):
    monkeypatch.setattr("edge_agent.store.LOW_DISK_BYTES", 1 << 60)
    draft = store.draft("j", 1)
    draft.write_bytes(b"half")
    store.discard(draft)
    assert list(store.folder.iterdir()) == []


def test_a_round_is_asked_again_only_if_it_was_settled_before_that(store):
    store.mark_answered("j", 1)
    asked = store.last_answered()
    store.mark_answered("j", 2)
    for number in (1, 2):
        store.reopen("j", number, asked)
    assert [store.is_answered("j", number) for number in (1, 2)] == [False, True]


def test_a_state_moves_on_with_the_reply_that_made_it(store, tmp_path):
    put(store, 1, state=b"one")
    put(store, 2, state=b"two")
    put(store, 3)
    store.state_draft("j", 4).write_bytes(b"its reply was never taken in")
    again = Store(tmp_path)
    assert again.state("j").read_bytes() == b"two"
    assert again.jobs_with_state() == ["j"]
    assert len(list((tmp_path / "states").iterdir())) == 2
    again.forget_state("j")
    assert (again.state("j"), again.state("other")) == (None, None)
    assert list((tmp_path / "states").iterdir()) == []
    again.close()


def test_a_round_that_is_trained_again_starts_from_the_same_state(store, tmp_path):
    for number, state in ((1, b"one"), (3, b"three"), (4, b"four"), (6, b"six"), (6, b"six again")):
        put(store, number, state=state)
    found = {number: store.state("j", before=number) for number in (4, 5, 6, 7)}
    seen = {number: None if one is None else one.read_bytes() for number, one in found.items()}
    assert seen == {4: None, 5: b"four", 6: b"four", 7: b"six again"}
    assert len(list((tmp_path / "states").iterdir())) == 2  # the newest two


def test_there_is_a_state_after_a_round_only_if_its_file_is_there(store, tmp_path):
    put(store, 1, state=b"one")
    put(store, 2)  # an update without a state
    assert [store.has_state("j", number) for number in (0, 1, 2)] == [False, True, False]
    assert not store.has_state("other", 1)
    for file in (tmp_path / "states").iterdir():
        file.unlink()
    assert not store.has_state("j", 1)


def test_a_state_of_a_store_of_version_2_is_kept(tmp_path):
    Store(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as db:
        db.executescript(
            "DROP TABLE kept_states; CREATE TABLE states (job TEXT PRIMARY KEY, file TEXT NOT NULL); "
            "INSERT INTO states VALUES ('j', 'old.state'); PRAGMA user_version = 2;"
        )
    (tmp_path / "states" / "old.state").write_bytes(b"old")
    store = Store(tmp_path)
    assert store.state("j").read_bytes() == b"old"
    put(store, 5, state=b"five")
    assert (store.state("j").read_bytes(), store.state("j", before=5).read_bytes()) == (b"five", b"old")
    store.close()


def test_a_state_that_cannot_be_noted_is_the_one_before(store, tmp_path):
    put(store, 1, state=b"one")
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(HomeError):
        put(store, 2, state=b"two")
    assert store.state("j").read_bytes() == b"one"
    assert len(list((tmp_path / "states").iterdir())) == 1


def test_a_database_that_cannot_be_read_now_is_named(tmp_path):
    store = Store(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as other:
        other.execute("DROP TABLE failures")
        with pytest.raises(HomeError, match=r"agent\.db cannot be read: no such table"):
            store.failures()
    store.close()


def test_an_evaluation_survives_with_its_update_also_in_a_store_of_version_1(tmp_path):
    db = sqlite3.connect(tmp_path / "agent.db")
    db.executescript(
        "CREATE TABLE outbox (job TEXT, round INTEGER, file TEXT NOT NULL, size INTEGER NOT NULL, blake3 TEXT NOT "
        "NULL, weight REAL NOT NULL, metrics TEXT NOT NULL, PRIMARY KEY (job, round)); PRAGMA user_version = 1;"
    )
    db.close()
    with contextlib.closing(Store(tmp_path)) as store:
        put(store)
        draft = store.draft("j", 2)
        draft.write_bytes(b"update")
        found = DeviceEvaluation(metrics={"accuracy": 0.5}, weight=4.0)
        store.put(Outgoing(job="j", round=2, path=draft, size=6, blake3="00", weight=1.0, evaluation=found))
    with contextlib.closing(Store(tmp_path)) as again:
        assert [one.evaluation for one in again.outbox()] == [None, found]


def test_an_update_knows_its_model_also_in_a_store_of_version_3(tmp_path):
    db = sqlite3.connect(tmp_path / "agent.db")
    db.executescript(
        "CREATE TABLE outbox (job TEXT, round INTEGER, file TEXT NOT NULL, size INTEGER NOT NULL, blake3 TEXT NOT "
        "NULL, weight REAL NOT NULL, metrics TEXT NOT NULL, evaluation TEXT, PRIMARY KEY (job, round)); "
        "INSERT INTO outbox VALUES ('j', 1, 'old.update', 3, '00', 1.0, '{}', NULL); CREATE TABLE failures "
        "(job TEXT, round INTEGER, reason TEXT NOT NULL, PRIMARY KEY (job, round)); "
        "INSERT INTO failures VALUES ('j', 5, 'why'); PRAGMA user_version = 3;"
    )
    db.close()
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "old.update").write_bytes(b"old")
    with contextlib.closing(Store(tmp_path)) as store:
        draft = store.draft("j", 2)
        draft.write_bytes(b"update")
        store.put(Outgoing(job="j", round=2, path=draft, size=6, blake3="00", weight=1.0, model="ab"))
        store.note_failure(FailureNote(job="j", round=6, reason="no", model="cd"))
    with contextlib.closing(Store(tmp_path)) as again:
        assert [one.model for one in again.outbox()] == ["", "ab"]
        assert [(one.round, one.model) for one in again.failures()] == [(5, ""), (6, "cd")]
