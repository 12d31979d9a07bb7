"""Pauses of the disk: what begins one, who waits, what ends it; with errors of a disk that is full."""

import errno
import os
import sqlite3
import subprocess
import threading

import pytest
import sqlalchemy as sa

from cloud.state.storage import LOOK_S, Storage, waits_for
from cloud.state.store import open_database
from edgefl.errors import JobCancelled
from edgefl.testing import ManualClock

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def go_on():
    """Nobody interrupts."""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte, and what fills it."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    with (folder / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space") as full:
        file.writelines([b"\0" * 1024] * 8192)
    return full.value


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM])
def test_what_passes_is_told_from_what_does_not(number):
    assert waits_for(OSError(number, "text"))
    assert not waits_for(OSError(errno.EIO, "a bad sector"))
    assert not waits_for(FileNotFoundError(errno.ENOENT, "gone"))
    assert not waits_for(ValueError("no"))


def test_a_locked_database_passes_and_a_wrong_statement_does_not(tmp_path):
    engine = open_database(tmp_path / "cloud.db")
    other = sqlite3.connect(tmp_path / "cloud.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with engine.begin() as db:
        db.exec_driver_sql("PRAGMA busy_timeout=0")
        with pytest.raises(sa.exc.OperationalError) as locked:
            db.exec_driver_sql("CREATE TABLE x (y)")
        with pytest.raises(sa.exc.OperationalError) as wrong:
            db.exec_driver_sql("SELECT * FROM nowhere")
    other.close()
    assert waits_for(locked.value) == "the database"
    assert waits_for(wrong.value) == ""
    engine.dispose()


def test_a_full_disk_pauses_until_a_trial_finds_the_room_that_was_wanted(small_disk):
    clock = ManualClock(10.0)
    storage = Storage(small_disk, clock)
    changes = []
    storage.changed = lambda: changes.append(storage.pause_times())
    assert storage.waiting() == ""
    assert storage.refused(fill(small_disk), 2 << 20)
    assert storage.waiting().startswith(f"waiting for disk space in {small_disk}: ")
    clock.advance(LOOK_S)
    assert not storage.look()
    (small_disk / "fill").write_bytes(b"\0" * (3 << 20))  # a megabyte is free: not enough
    clock.advance(LOOK_S)
    assert not storage.look()
    storage.worked(10)  # something small was written
    assert storage.waiting() != ""
    (small_disk / "fill").unlink()
    assert not storage.look()  # too soon after the last trial
    clock.advance(LOOK_S)
    assert storage.look()
    assert storage.waiting() == ""
    assert storage.paused_s() == pytest.approx(3 * LOOK_S)
    assert changes == [(0.0, 10.0), (pytest.approx(3 * LOOK_S), None)]
    clock.advance(100)
    assert storage.paused_s() == pytest.approx(3 * LOOK_S)
    assert list(small_disk.iterdir()) == []


def test_a_database_on_a_full_disk_is_waited_for(small_disk):
    engine = open_database(small_disk / "cloud.db")
    storage = Storage(small_disk)
    tried = threading.Event()

    def commit():
        try:
            with engine.begin() as db:
                db.exec_driver_sql("CREATE TABLE x AS SELECT zeroblob(1000000) AS y")
        finally:
            tried.set()

    fill(small_disk)
    waiter = threading.Thread(target=storage.insist, args=(commit, go_on))
    waiter.start()
    assert tried.wait(10)
    (small_disk / "fill").unlink()
    waiter.join(10)
    assert not waiter.is_alive()
    with engine.begin() as db:
        assert db.exec_driver_sql("SELECT length(y) FROM x").scalar() == 1_000_000
    engine.dispose()


def test_who_waits_is_woken_by_what_stops_the_job():
    storage, stopped, tried = Storage(), threading.Event(), threading.Event()
    caught = []

    def refuse_stopped():
        if stopped.is_set():
            raise JobCancelled("cancelled by its operator")

    def full():
        tried.set()
        raise FULL

    def wait():
        with pytest.raises(JobCancelled) as error:
            storage.insist(full, refuse_stopped)
        caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert tried.wait(10)
    stopped.set()
    storage.wake()
    waiter.join(10)
    assert len(caught) == 1


def test_what_will_not_pass_is_raised_at_once():
    calls = []

    def damaged():
        calls.append(1)
        raise OSError(errno.EIO, "a bad sector")

    storage = Storage()
    with pytest.raises(OSError, match="bad sector"):
        storage.insist(damaged, go_on)
    assert calls == [1]
    assert storage.waiting() == ""
    assert storage.insist(lambda: 7, go_on) == 7
