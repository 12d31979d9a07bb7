"""A line is an event with fields, whatever they hold; repeated lines are counted, by a clock that is turned by hand."""

import io
import logging
import subprocess
import sys

import pytest

from edgefl.logs import FORM, LINES_OF_ALL, LINES_OF_ONE, MAX_KEYS, WINDOW_S, LimitedHandler, LineFormatter, event
from edgefl.terminal.text import is_safe


def test_an_event_is_one_line_of_fields(caplog):
    with caplog.at_level(logging.INFO):
        event(logging.getLogger("t"), logging.INFO, "round.done", job="j", round=2, seconds=0.123456789, reason='a "b"')
    assert caplog.messages == ['round.done job=j round=2 seconds=0.123457 reason="a \\"b\\""']


def test_a_line_break_in_a_field_does_not_make_a_second_line(caplog):
    event(logging.getLogger("t"), logging.WARNING, "update.refused", reason="one\ntwo", empty="")
    assert caplog.messages == ['update.refused reason="one\\ntwo" empty=""']


@pytest.mark.parametrize("text", ["\x1b[2J", "a\x07", "x\x7f", "\x9b31m", "\u202e", "\u2028", "\ud800", "a\rb", "\0"])
def test_no_field_moves_a_cursor(caplog, text):
    event(logging.getLogger("t"), logging.WARNING, "update.refused", reason=text, device="cam-1")
    [line] = caplog.messages
    assert is_safe(line)
    assert line.endswith(" device=cam-1")


def test_a_librarys_message_is_one_line_and_a_stack_is_indented():
    formatter = LineFormatter(FORM)
    error = ValueError("first\n2026-11-25 00:00:00,000 INFO    forged line\x1b[2J")
    seen = (type(error), error, None)
    record = logging.LogRecord("uvicorn", logging.ERROR, "", 1, "bad %s", ("a\nINFO forged\x1b",), seen)
    first, *stack = formatter.format(record).split("\n")
    assert first.endswith("ERROR   uvicorn bad a INFO forged\\x1b")
    assert all(line.startswith("    ") for line in stack)
    assert stack[-1].strip() == "2026-11-25 00:00:00,000 INFO    forged line\\x1b[2J"


def test_that_is_how_a_program_logs():
    script = (
        "import logging; from edgefl.logs import set_up_logging; set_up_logging();"
        "logging.getLogger('x').warning('one\\nINFO two\\x1b[31m')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(" WARNING x one INFO two\\x1b[31m\n")


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


def test_the_log_in_a_home_has_what_stderr_has_and_is_bounded(tmp_path):
    path = tmp_path / "agent.log"
    script = (
        "import logging, sys; from pathlib import Path; from edgefl import logs; logs.FILE_BYTES = 2000\n"
        "logs.set_up_logging()\n"
        "with logs.logging_to(Path(sys.argv[1])):\n"
        "    for number in range(100): logging.getLogger('edgefl').info('line %d', number)\n"
        "logging.getLogger('edgefl').info('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    kept = path.with_name("agent.log.1").read_text() + path.read_text()
    assert done.stderr.endswith(" after\n")
    assert kept.endswith("line 99\n")
    assert kept.rstrip() in done.stderr
    assert path.stat().st_size <= 2000


def test_a_log_that_cannot_be_written_costs_nothing_else(tmp_path):
    script = (
        "import logging, sys; from pathlib import Path; from edgefl import logs; logs.set_up_logging()\n"
        "with logs.logging_to(Path('/no/such/folder/x.log')): logging.getLogger('edgefl').info('said')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("\n") == 1


def test_a_full_disk_costs_lines_of_the_file_and_no_exit_status(tmp_path):
    full = tmp_path / "full.log"
    full.symlink_to("/dev/full")
    script = (
        "import logging, os, sys; from pathlib import Path; from edgefl import logs; logs.set_up_logging()\n"
        "path = Path(sys.argv[1]); log = logging.getLogger('edgefl')\n"
        "with logs.logging_to(path):\n"
        "    log.info('lost')\n"
        "    path.unlink()\n"  # there is space again
        "    log.info('kept')\n"
        "    path.unlink(); path.symlink_to('/dev/full')\n"
        "    logging.getLogger().handlers[0]._targets[-1].stream.close()\n"
        "    log.info('lost, too')\n"
        "    path.unlink()\n"
        "    log.info('kept, too')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(full)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.count("\n") == 4
    assert [line.split()[-2:] for line in full.read_text().splitlines()] == [["kept,", "too"]]
