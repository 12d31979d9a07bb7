"""Disks: a copy is what a kill leaves, a commit can be refused, and a power cut costs what was not flushed."""

from __future__ import annotations

import random
import sqlite3

import pytest

from edgefl.faults.machine import disk, threads
from edgefl.faults.machine.kernel import Kernel, Killed, Node


@pytest.fixture
def node(tmp_path):
    kernel = Kernel(6)
    threads.enter(kernel)
    made = kernel.node = Node(kernel, "n", tmp_path / "home")
    made.home.mkdir()
    yield made
    threads.leave()
    kernel.close()


def opened(node):
    db = disk.SimSqlite().connect(node.home / "db")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE t (x)")
    return db


def rows(folder):
    db = sqlite3.connect(folder / "db")
    try:
        return [x for (x,) in db.execute("SELECT x FROM t")]
    finally:
        db.close()


def test_a_copy_has_what_is_committed_and_nothing_else(node, tmp_path):
    db = opened(node)
    with db:
        db.execute("INSERT INTO t VALUES (1)")
    db.execute("INSERT INTO t VALUES (2)")
    disk.copy_home(node.home, tmp_path / "copy")
    db.commit()
    assert rows(tmp_path / "copy") == [1]
    assert rows(node.home) == [1, 2]


@pytest.mark.parametrize(("when", "left"), [("before", []), ("after", [1])])
def test_a_kill_at_a_commit(node, tmp_path, when, left):
    class Commits:
        def before(self):
            self.look("before")

        def after(self):
            self.look("after")

        def look(self, now):
            if now == when:
                disk.copy_home(node.home, tmp_path / "copy")
                raise Killed

    db = opened(node)
    node.commits = Commits()
    with pytest.raises(Killed), db:
        db.execute("INSERT INTO t VALUES (1)")
    assert rows(tmp_path / "copy") == left


def test_a_dead_node_commits_nothing(node):
    db = opened(node)
    db.execute("INSERT INTO t VALUES (1)")
    node.kernel.kill(node)
    with pytest.raises(Killed):
        db.commit()


def test_a_full_disk_refuses_commits_and_writes_until_it_has_space(node):
    db = opened(node)
    node.disk_full_until_s = 1.0
    with pytest.raises(sqlite3.OperationalError, match="full") as caught, db:
        db.execute("INSERT INTO t VALUES (1)")
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_FULL
    assert not db.in_transaction
    for call in (lambda os: os.pwrite(0, b"", 0), lambda os: os.fsync(0), lambda os: os.posix_fallocate(0, 0, 1)):
        with pytest.raises(OSError, match="No space left"):
            call(disk.SimOs())
    node.kernel.now_s = 1.0
    with db:
        db.execute("INSERT INTO t VALUES (1)")
    assert rows(node.home) == [1]


def test_a_power_cut_harms_incomplete_files_only(tmp_path):
    (tmp_path / "whole").write_bytes(b"x" * 100)
    (tmp_path / "a.part").write_bytes(b"x" * 100)
    disk.damage_parts(tmp_path, random.Random(1))
    assert (tmp_path / "whole").read_bytes() == b"x" * 100
    assert len((tmp_path / "a.part").read_bytes()) < 100
