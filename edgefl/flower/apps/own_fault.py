"""Whose fault it is: what fails in our code under a call of the user's is told as ours, not blamed on their line.

`Border` stands around a grid's methods, whose failure the run cannot go on without: it notes our faults, so that
whoever called the ServerApp can tell them from the app's. `Bystander` stands around what only looks on (sizes,
metrics, the screen): a failure there is logged once, and changes nothing else.
"""

from __future__ import annotations

import logging
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

from edgefl.errors import EdgeflError, OwnFault
from edgefl.terminal import debug

MAX_QUOTED = 500  # characters of what an exception says

_OURS = Path(__file__).parents[2]

_log = logging.getLogger(__name__)


class Border:
    """Notes the first fault of ours that passes; lets all of them pass."""

    def __init__(self) -> None:
        self.fault: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> None:
        if self.fault is None and isinstance(raised, Exception) and is_ours(raised):
            self.fault = raised

    def raise_fault(self, app: str) -> None:
        """Raise what was noted, if anything was, as an error that says whose it is."""
        if self.fault is not None:
            raise OwnFault(f"a fault of edgefl itself, not of {app}: {said(self.fault)}") from self.fault


class Bystander:
    """Stops what fails while we only look on, and logs the first failure of each kind of look."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self.fault: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(raised, Exception):
            return False
        if self.fault is None:
            self.fault = raised
            text = "a fault of edgefl itself, not of the app; the run goes on, but %s may be incomplete: %s"
            _log.warning(text, self._doing, said(raised), exc_info=raised if debug.wanted() else None)
        return True


def is_ours(raised: BaseException) -> bool:
    """Whether the deepest code that is the user's or ours is ours, and did not raise on purpose."""
    if isinstance(raised, EdgeflError):
        return False
    file = _place(raised)[0]
    return file is not None and file.is_relative_to(_OURS)


def said(raised: BaseException) -> str:
    """Return what an exception says, and the deepest line of the user's code or ours that it came through."""
    file, line = _place(raised)
    where = "" if file is None else f" ({file}:{line})"
    return f"{type(raised).__name__}: {raised}".rstrip(": ")[:MAX_QUOTED] + where


def _place(raised: BaseException) -> tuple[Path | None, int]:
    """Return the deepest line that is neither Python's nor an installed package's but ours."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    found: tuple[Path | None, int] = (None, 0)
    for frame, line in traceback.walk_tb(raised.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_OURS) or (
            file.is_absolute() and not any(file.is_relative_to(folder) for folder in installed)
        ):
            found = file, line
    return found
