"""Whose fault an error is: a failure of edgefl below a call of the user's code is reported as edgefl's fault.

`ErrorBoundary` wraps a grid's methods, without which the run cannot continue: it records edgefl's failures, so that
the caller of the ServerApp can distinguish them from the app's. `BestEffort` wraps code that only observes (sizes,
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

MAX_QUOTED = 500  # characters of an exception's message

_OURS = Path(__file__).parents[2]

_log = logging.getLogger(__name__)


class ErrorBoundary:
    """Records the first fault of edgefl; suppresses no exception."""

    def __init__(self) -> None:
        self.fault: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> None:
        if self.fault is None and isinstance(raised, Exception) and is_own_fault(raised):
            self.fault = raised

    def raise_fault(self, app: str) -> None:
        """Raise OwnFault if a fault was recorded."""
        if self.fault is not None:
            raise OwnFault(f"a fault of edgefl itself, not of {app}: {describe(self.fault)}") from self.fault


class BestEffort:
    """Suppresses exceptions of code that only observes, and logs the first one."""

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
            text = "a fault of edgefl itself, not of the app; the run continues, but %s may be incomplete: %s"
            _log.warning(text, self._doing, describe(raised), exc_info=raised if debug.wanted() else None)
        return True


def is_own_fault(raised: BaseException) -> bool:
    """Whether the deepest frame of the user's code or edgefl's is edgefl's, and it did not raise on purpose."""
    if isinstance(raised, EdgeflError):
        return False
    file = _place(raised)[0]
    return file is not None and file.is_relative_to(_OURS)


def describe(raised: BaseException) -> str:
    """Return an exception's message, with the deepest line of the user's code or edgefl's in its traceback."""
    file, line = _place(raised)
    where = "" if file is None else f" ({file}:{line})"
    return f"{type(raised).__name__}: {raised}".rstrip(": ")[:MAX_QUOTED] + where


def _place(raised: BaseException) -> tuple[Path | None, int]:
    """Return the deepest line that belongs neither to Python nor to another installed package."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    found: tuple[Path | None, int] = (None, 0)
    for frame, line in traceback.walk_tb(raised.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_OURS) or (
            file.is_absolute() and not any(file.is_relative_to(folder) for folder in installed)
        ):
            found = file, line
    return found
