"""A part of the cloud is restarted, or the process stops with its error; health checks are cached."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest

from cloud import supervisor as supervisor_module
from cloud.state.store import open_database
from cloud.supervisor import LOW_DISK_BYTES, MAX_FAULTS, Supervisor, database_fault, disk_fault
from edgefl.errors import PartFailed
from edgefl.testing import ManualClock


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(supervisor_module, "LONGEST_PAUSE_S", 0.001)


def test_a_part_that_raises_now_and_then_is_started_again(caplog) -> None:
    clock = ManualClock()
    supervisor = Supervisor(clock)
    runs = []

    def work() -> None:
        runs.append(clock())
        clock.advance(20)
        if len(runs) < 3 * MAX_FAULTS:
            raise ZeroDivisionError

    supervisor.run("relays", work)
    assert len(runs) == 3 * MAX_FAULTS
    assert supervisor.failure is None
    assert "part.fault part=relays" in caplog.text


def test_a_part_that_fails_too_often_stops_the_process_with_its_reason() -> None:
    supervisor, ends, runs = Supervisor(ManualClock()), [], []
    supervisor.on_end = lambda: ends.append(1)

    def work() -> None:
        runs.append(1)
        raise ZeroDivisionError("by zero\n\x1b")

    supervisor.run("relays", work)
    assert len(runs) == MAX_FAULTS
    assert ends == [1]
    assert isinstance(supervisor.failure, PartFailed)
    assert "a part failed: relays, ZeroDivisionError" in str(supervisor.failure)
    assert supervisor.reasons()["relays"] == "it has ended: ZeroDivisionError('by zero\\n\\x1b')"


def test_the_first_failure_is_the_reason() -> None:
    supervisor = Supervisor(ManualClock())
    supervisor.report_failure("link", ValueError("first"))
    supervisor.report_failure("broker", ValueError("second"))
    assert "link" in str(supervisor.failure)
    assert set(supervisor.reasons()) == {"link", "broker"}


def test_nothing_is_started_again_while_the_process_ends(monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(supervisor_module, "LONGEST_PAUSE_S", 60.0)
    supervisor, raised = Supervisor(), threading.Event()

    def work() -> None:
        raised.set()
        raise ZeroDivisionError

    kept = threading.Thread(target=supervisor.run, args=("relays", work))
    kept.start()
    assert raised.wait(5)
    supervisor.close()
    kept.join(5)
    assert not kept.is_alive()
    assert supervisor.failure is None


def test_results_of_the_checks_are_cached_for_a_second() -> None:
    clock, looks = ManualClock(), []
    supervisor = Supervisor(clock)

    def look() -> str:
        looks.append(clock())
        return "" if len(looks) == 1 else "gone\nforged=line"

    supervisor.add_check("link", look)
    assert supervisor.reasons() == supervisor.reasons() == {"link": ""}
    clock.advance(1.0)
    assert supervisor.reasons() == {"link": "gone forged=line"}
    assert len(looks) == 2


def test_a_part_whose_check_fails_is_unhealthy() -> None:
    supervisor = Supervisor()

    def look() -> str:
        raise PermissionError(13, "Permission denied")

    supervisor.add_check("disk", look)
    assert "its health cannot be checked" in supervisor.reasons()["disk"]


def test_a_database_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "LOCK_PATIENCE_S", 0.01)
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
    monkeypatch.setattr(supervisor_module.shutil, "disk_usage", lambda _: usage)
    assert disk_fault(tmp_path) == ""
    usage.free -= 1
    assert "63 MB free" in disk_fault(tmp_path)
