"""The durable store: what survives, and what is cleaned."""

from __future__ import annotations

import sqlite3

import pytest

from edge_agent.store import FailureNote, Outgoing, Store
from edgefl.errors import HomeError


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def put(store: Store, number: int = 1, data: bytes = b"update") -> None:
    draft = store.draft("j", number)
    draft.write_bytes(data)
    store.put(Outgoing(job="j", round=number, path=draft, size=len(data), blake3="00", weight=2.5, metrics={"a": 0.5}))


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
    store.settle("j", 1)
    assert store.outbox() == []
    assert store.is_answered("j", 1)
    assert not store.is_answered("j", 2)
    assert not store.is_answered("other", 1)


def test_a_failure_is_remembered_until_it_is_settled(store):
    store.note_failure(FailureNote(job="j", round=1, reason="why"))
    assert store.failures() == [FailureNote(job="j", round=1, reason="why")]
    assert store.is_answered("j", 1)
    store.settle("j", 1)
    assert store.failures() == []
    assert store.is_answered("j", 1)


def test_the_pages_of_a_settled_update_serve_the_next(store):
    put(store)
    [update] = store.outbox()
    inode = update.path.stat().st_ino
    store.settle("j", 1)
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
    with pytest.raises(HomeError, match="cannot be used"):
        Store(tmp_path)
