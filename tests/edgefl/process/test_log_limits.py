"""Repeated lines are counted: by hand, with a clock that is turned by hand."""

import io
import logging
import sys

import pytest

from edgefl.logs import event
from edgefl.process.log_limits import LINES_OF_ALL, LINES_OF_ONE, MAX_KEYS, WINDOW_S, LimitedHandler


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def log():
    return Log()


class Log:
    """A logger of ours and one of a library's, on one handler."""

    def __init__(self):
        self.clock, self._stream = Clock(), io.StringIO()
        self.handler = LimitedHandler(logging.StreamHandler(self._stream), self.clock)
        self.ours, self.theirs = logging.getLogger("cloud.test"), logging.getLogger("asyncio.test")
        for logger in (self.ours, self.theirs):
            logger.handlers, logger.propagate = [self.handler], False
            logger.setLevel(logging.DEBUG)

    def lines(self):
        return self._stream.getvalue().splitlines()


def test_the_first_lines_of_a_device_are_written_and_the_rest_counted(log):
    for number in range(5000):
        event(log.ours, logging.WARNING, "update.failed", device="cam-1", number=number)
    event(log.ours, logging.WARNING, "update.failed", device="cam-2", number=0)
    assert len(log.lines()) == LINES_OF_ONE + 1
    log.clock.now_s += WINDOW_S
    event(log.ours, logging.INFO, "round.done", round=1)
    assert log.lines()[LINES_OF_ONE + 1 :] == [
        f"... {5000 - LINES_OF_ONE} more of this in 60 s, the last: update.failed device=cam-1 number=4999",
        "round.done round=1",
    ]


def test_a_window_that_has_ended_begins_anew(log):
    for _ in range(3):
        for _ in range(LINES_OF_ONE):
            event(log.ours, logging.WARNING, "broker.refused", device="", peer="192.0.2.1")
        log.clock.now_s += WINDOW_S
    assert len(log.lines()) == 3 * LINES_OF_ONE


def test_names_that_are_made_up_do_not_get_around_it(log):
    for number in range(MAX_KEYS + 500):
        event(log.ours, logging.INFO, "device.online", device=f"made-up-{number}")
    assert len(log.lines()) == LINES_OF_ALL
    log.handler.close()
    assert f"... {MAX_KEYS + 500 - LINES_OF_ALL} more of this" in log.lines()[-1]


def test_a_librarys_lines_count_by_where_they_come_from(log):
    for number in range(1000):
        log.theirs.error("accept failed for %s", number)
        log.theirs.info("socket %s", number)
    log.handler.close()
    assert len(log.lines()) == 2 * LINES_OF_ONE + 2


def test_what_only_we_cause_is_not_limited(log):
    for number in range(1000):
        event(log.ours, logging.INFO, "round.done", round=number)
    assert len(log.lines()) == 1000


def test_a_traceback_is_counted_too(log):
    for _ in range(100):
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            log.theirs.error("Exception in ASGI application", exc_info=sys.exc_info())
    log.handler.close()
    assert sum("Traceback" in line for line in log.lines()) == LINES_OF_ONE
    assert log.lines()[-1] == "... 90 more of this in 60 s, the last: Exception in ASGI application"
