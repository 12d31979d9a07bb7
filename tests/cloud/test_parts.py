"""Parts: kept, or loudly ended; looked at once for all who ask; each fault named."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest

from cloud import parts as parts_module
from cloud.parts import LOW_DISK_BYTES, MAX_FAULTS, Parts, database_fault, disk_fault
from cloud.state.store import open_database
from edgefl.errors import PartFailed
from edgefl.testing import ManualClock


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(parts_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(parts_module, "LONGEST_PAUSE_S", 0.001)


def test_a_part_that_raises_now_and_then_is_started_again(caplog) -> None:
    clock = ManualClock()
    parts = Parts(clock)
    runs = []

    def work() -> None:
        runs.append(clock())
        clock.advance(20)
        if len(runs) < 3 * MAX_FAULTS:
            raise ZeroDivisionError

    parts.keep("relays", work)
    assert len(runs) == 3 * MAX_FAULTS
    assert parts.failure is None
    assert "part.fault part=relays" in caplog.text


def test_a_part_that_cannot_be_kept_ends_the_process_with_its_reason() -> None:
    parts, ends, runs = Parts(ManualClock()), [], []
    parts.on_end = lambda: ends.append(1)

    def work() -> None:
        runs.append(1)
        raise ZeroDivisionError("by zero\n\x1b")

    parts.keep("relays", work)
    assert len(runs) == MAX_FAULTS
    assert ends == [1]
    assert isinstance(parts.failure, PartFailed)
    assert "a part failed: relays, ZeroDivisionError" in str(parts.failure)
    assert parts.reasons()["relays"] == "it has ended: ZeroDivisionError('by zero\\n\\x1b')"


def test_the_first_failure_is_the_reason() -> None:
    parts = Parts(ManualClock())
    parts.ended("link", ValueError("first"))
    parts.ended("broker", ValueError("second"))
    assert "link" in str(parts.failure)
    assert set(parts.reasons()) == {"link", "broker"}


def test_nothing_is_started_again_while_the_process_ends(monkeypatch) -> None:
    monkeypatch.setattr(parts_module, "FIRST_PAUSE_S", 60.0)
    parts, raised = Parts(), threading.Event()

    def work() -> None:
        raised.set()
        raise ZeroDivisionError

    kept = threading.Thread(target=parts.keep, args=("relays", work))
    kept.start()
    assert raised.wait(5)
    parts.close()
    kept.join(5)
    assert not kept.is_alive()
    assert parts.failure is None


def test_one_look_serves_all_who_ask_for_a_second() -> None:
    clock, looks = ManualClock(), []
    parts = Parts(clock)

    def look() -> str:
        looks.append(clock())
        return "" if len(looks) == 1 else "gone\nforged=line"

    parts.check("link", look)
    assert parts.reasons() == parts.reasons() == {"link": ""}
    clock.advance(1.0)
    assert parts.reasons() == {"link": "gone forged=line"}
    assert len(looks) == 2


def test_what_cannot_be_looked_at_is_not_well() -> None:
    parts = Parts()

    def look() -> str:
        raise PermissionError(13, "Permission denied")

    parts.check("disk", look)
    assert "its health cannot be checked" in parts.reasons()["disk"]


def test_a_database_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts_module, "LOCK_PATIENCE_S", 0.01)
    path = tmp_path / "cloud.db"
    open_database(path).dispose()
    assert database_fault(path) == ""
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert database_fault(path) == "cloud.db: database is locked"
        other.rollback()
    assert database_fault(path) == ""
    path.write_bytes(b"no database" * 1000)
    assert "not a database" in database_fault(path)
    path.unlink()
    assert "unable to open" in database_fault(path)
    assert not path.exists()


def test_a_disk_that_is_nearly_full_is_named(tmp_path, monkeypatch) -> None:
    usage = SimpleNamespace(free=LOW_DISK_BYTES)
    monkeypatch.setattr(parts_module.shutil, "disk_usage", lambda _: usage)
    assert disk_fault(tmp_path) == ""
    usage.free -= 1
    assert "63 MB free" in disk_fault(tmp_path)
