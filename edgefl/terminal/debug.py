"""`--debug`: show the stack trace of an error. Without it, one line that says whose fault it is.

The flag is stored in the environment, so that the processes that a command starts know it, too: user code often
runs in a worker, whose errors reach the command only as text.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from types import TracebackType

from edgefl.terminal.text import lines, one_line

VARIABLE = "EDGEFL_DEBUG"
FLAG = "--debug"

_shown: deque[BaseException] = deque(maxlen=16)  # already shown; not repeated at the end of the command


def wanted() -> bool:
    """Whether to show stack traces."""
    return os.environ.get(VARIABLE, "0") not in {"", "0"}


def ask_for() -> None:
    """Make this process, and those that it starts, show stack traces."""
    os.environ[VARIABLE] = "1"


def taken_from(arguments: list[str]) -> list[str]:
    """Return the arguments without any `--debug` before a `--`; turn stack traces on if it was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if FLAG in arguments[:end]:
        ask_for()
    return [one for place, one in enumerate(arguments) if one != FLAG or place > end]


def show(raised: BaseException) -> None:
    """Print the stack trace of an exception that other processes get only as text, if --debug is set."""
    if wanted() and not _was_shown(raised):
        _shown.append(raised)
        traceback.print_exception(raised)


def tell(error: BaseException) -> None:
    """Print the error that ended a command: one line, after its stack trace if --debug is set."""
    if not _was_shown(error.__cause__):
        show(error)
    sys.stderr.write(f"error: {lines(str(error))}\n")


def tell_unexpected(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: report an unexpected exception in one line, as a fault of edgefl."""
    if wanted() or not issubclass(kind, Exception):
        sys.__excepthook__(kind, raised, trace)
        return
    last = traceback.extract_tb(trace)[-1:]
    where = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
    said = one_line(f"{kind.__name__}: {raised}".rstrip(": "))
    sys.stderr.write(
        f"error: a fault of edgefl itself, not of your task or settings: {said}{where}; {FLAG} shows the stack\n"
    )


def _was_shown(raised: BaseException | None) -> bool:
    return any(one is raised for one in _shown)
