"""Calls of the user's code: an exception in it becomes a TaskError of one short message, with the user's file and line.

Invariant: the message does not depend on how the code was called (directly, traced by torch, mapped over clients, on
a device): what torch adds about its own tracing is left out. `--debug` shows the stack trace.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from edgefl.errors import TaskError
from edgefl.terminal import debug

MAX_QUOTED = 500  # characters of the user's own message that an error repeats

_OURS = Path(__file__).parents[1]
# What torch appends to a message: how it was tracing, its own stack, and advice for its developers.
_ABOUT_TRACING = re.compile(
    r"\s*(?:from user code:|The following call raised|While executing |Original traceback|Exception raised from |"
    r"Caused by: \(|For more information, run with|For (?:extended|more) |Set TORCH|set TORCH|consider using data-)"
)
_ON_A_VALUE = ("data-dependent", "calling .item() on a Tensor")  # how torch says it, when tracing and when mapping


class TaskFolder(str):
    """An entry of sys.path for a task's modules."""

    __slots__ = ()


class BundleFolder(TaskFolder):
    """A task's folder that was unpacked from a bundle: messages name its files by their names in the bundle."""

    __slots__ = ()


class UserCode:
    """A context for calls of the user's code: an exception inside becomes a TaskError with its file and line.

    `on_change` is called with what the user's code is asked to do, and with "" when it returns: a process that
    watches this one uses it to say what ended it.
    """

    on_change: ClassVar[Callable[[str], None] | None] = None
    _now: ClassVar[str] = ""

    def __init__(self, task: str, doing: str, kind: str = "task") -> None:
        self._task, self._doing, self._kind = task, doing, kind
        self._before = ""

    def __enter__(self) -> None:
        if UserCode.on_change is not None:
            self._before, UserCode._now = UserCode._now, self._doing
            UserCode.on_change(self._doing)

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> None:
        if UserCode.on_change is not None:
            UserCode._now = self._before
            UserCode.on_change(self._before)
        if isinstance(raised, TaskError) or not isinstance(raised, (Exception, SystemExit)):
            return
        debug.show(raised)  # other processes get only its text
        raise TaskError(
            f"{self._kind} {self._task!r}: {self._doing} raised {quoted(raised)}{place_of(raised)}"
        ) from raised


def quoted(raised: BaseException) -> str:
    """Return an exception's type and message, without what torch adds about its tracing."""
    said = str(raised)
    if any(phrase in said for phrase in _ON_A_VALUE):
        said = "a tensor's value decides what is computed (if, float(), .item()), which cannot be traced"
    elif (added := _ABOUT_TRACING.search(said)) is not None and added.start() > 0:
        said = said[: added.start()]
    said = f"{type(raised).__name__}: {said}".rstrip(": \n")
    return said if len(said) <= MAX_QUOTED else said[: MAX_QUOTED - 3] + "..."


def place_of(raised: BaseException) -> str:
    """Return the place in the user's files where it was raised; empty if none of the user's code was running."""
    if isinstance(raised, SyntaxError):
        return f" ({_shown(Path(raised.filename or '?'))}:{raised.lineno})"
    stdlib, *packages = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))
    places = []  # (file, line, installed)
    for frame, line in traceback.walk_tb(raised.__traceback__):
        file = Path(frame.f_code.co_filename)
        installed = any(file.is_relative_to(folder) for folder in packages)
        if file.is_absolute() and not file.is_relative_to(_OURS) and (installed or not file.is_relative_to(stdlib)):
            places.append((file, line, installed))
    # The deepest line in the user's own files; for an installed task, the line that edgefl called.
    chosen = [place for place in places if not place[2]][-1:] or places[:1]
    return "".join(f" ({_shown(file)}:{line})" for file, line, _ in chosen)


def _shown(file: Path) -> Path:
    for folder in sys.path:
        if isinstance(folder, BundleFolder) and file.is_relative_to(folder):
            return file.relative_to(folder)
    return file
