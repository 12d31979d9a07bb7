"""The inbox: order, again after a passing error, one item's defect costs that item, bounded under each key."""

from __future__ import annotations

import queue
import sqlite3
import threading
import time

import pytest
import sqlalchemy as sa

from cloud.broker import inbox as inbox_module
from cloud.broker.inbox import MAX_WAITING, Inbox, is_temporary
from edgefl.errors import ProtocolError


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(inbox_module, "FIRST_PAUSE_S", 0.001)
    made = []

    def start(work):
        made.append(Inbox("test", work))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.close()


def locked() -> sa.exc.OperationalError:
    return sqlite_error(sqlite3.SQLITE_BUSY, "database is locked")


def sqlite_error(code: int, text: str) -> sa.exc.OperationalError:
    cause = sqlite3.OperationalError(text)
    cause.sqlite_errorcode = code
    return sa.exc.OperationalError("UPDATE", {}, cause)


@pytest.mark.parametrize(
    "error", [locked(), OSError(28, "No space left on device"), OSError(24, "Too many open files")]
)
def test_a_passing_error_is_tried_again_and_nothing_overtakes(make, error, caplog) -> None:
    done: queue.Queue[int] = queue.Queue()
    faults = [error] * 5

    def work(item: int) -> None:
        if item == 1 and faults:
            raise faults.pop()
        done.put(item)

    inbox = make(work)
    for item in range(4):
        inbox.put(str(item), item)
    assert [done.get(timeout=5) for _ in range(4)] == [0, 1, 2, 3]
    assert inbox.reason == ""
    assert caplog.text.count("inbox.waits") == 1


def test_while_it_waits_it_says_why(make) -> None:
    tried, over = threading.Event(), threading.Event()

    def work(_item: str) -> None:
        if not over.is_set():
            tried.set()
            raise locked()

    inbox = make(work)
    inbox.put("k", "item")
    assert tried.wait(5)
    until_s = time.monotonic() + 5
    while not inbox.reason and time.monotonic() < until_s:
        over.wait(0.001)
    assert "database is locked" in inbox.reason
    over.set()


@pytest.mark.parametrize(
    "error", [ProtocolError("nonsense"), ZeroDivisionError(), UnicodeEncodeError("utf-8", "", 0, 1, "")]
)
def test_another_error_costs_that_item_only(make, error, caplog) -> None:
    done: queue.Queue[int] = queue.Queue()

    def work(item: int) -> None:
        if item == 1:
            raise error
        done.put(item)

    inbox = make(work)
    for item in range(3):
        inbox.put("k", item)
    assert [done.get(timeout=5), done.get(timeout=5)] == [0, 2]
    assert "inbox.refused" in caplog.text or "inbox.item_lost" in caplog.text


def test_one_key_cannot_fill_it_and_its_newest_stay(make) -> None:
    done: queue.Queue[tuple[str, int]] = queue.Queue()
    free, at_work = threading.Event(), threading.Event()

    def work(item: tuple[str, int]) -> None:
        at_work.set()
        free.wait(5)
        done.put(item)

    inbox = make(work)
    inbox.put("first", ("first", 0))
    assert at_work.wait(5)
    for number in range(1000):
        inbox.put("noisy", ("noisy", number))
    inbox.put("quiet", ("quiet", 0))
    free.set()
    seen = [done.get(timeout=5) for _ in range(MAX_WAITING + 2)]
    assert seen == [("first", 0), *(("noisy", number) for number in range(1000 - MAX_WAITING, 1000)), ("quiet", 0)]


def test_closing_does_not_wait_for_the_database(make) -> None:
    tried = threading.Event()

    def work(_item: str) -> None:
        tried.set()
        raise locked()

    inbox = make(work)
    inbox.put("k", "item")
    assert tried.wait(5)
    inbox.close()
    assert not [one for one in threading.enumerate() if one.name == "test"]


def test_what_is_temporary_by_hand() -> None:
    assert is_temporary(locked())
    assert is_temporary(OSError(28, "full"))
    assert is_temporary(sqlite_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file"))
    assert is_temporary(sa.exc.TimeoutError("QueuePool limit"))
    assert not is_temporary(sqlite_error(sqlite3.SQLITE_ERROR, "no such table"))
    assert not is_temporary(ValueError())
    assert not is_temporary(ProtocolError("x"))
