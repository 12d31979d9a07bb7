import logging
import subprocess
import sys

import pytest

from edgefl.logs import FORM, LineFormatter, event
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
