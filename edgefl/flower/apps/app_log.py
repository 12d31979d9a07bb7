"""Show an app's log, but not Flower's own reports of rounds, because edgefl shows the rounds itself.

Apps use Flower's logger, `flwr`, too: Flower's examples print results with it. Flower's other messages
(waiting for nodes, secure aggregation, deprecations) and all warnings are shown.
Invariant: after the context Flower's logger is as it was.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import flwr
from flwr.common.logger import ConsoleHandler

LOGGER = "flwr"
_FLOWER = Path(flwr.__file__).parent
_REPORTS = tuple(  # reports of a run and its rounds, by the module that logs them
    str(_FLOWER / part)
    for part in (
        "serverapp/strategy/", "server/strategy/", "server/server.py", "server/compat/app.py",
        "server/workflow/default_workflows.py",
    )
)  # fmt: skip
_KEPT = {"sample_nodes"}  # functions in these modules that say what a run waits for


class _StderrNow:
    """Writes to the current sys.stderr: a live table or a test may have replaced it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def is_report(record: logging.LogRecord) -> bool:
    """Whether a record is Flower's own report of rounds, below the level of a warning."""
    return record.levelno < logging.WARNING and record.pathname.startswith(_REPORTS) and record.funcName not in _KEPT


def _is_shown(record: logging.LogRecord) -> bool:
    return not is_report(record)


@contextmanager
def app_log() -> Iterator[None]:
    """Show the app's log inside the context."""
    logger = logging.getLogger(LOGGER)
    consoles = [one for one in logger.handlers if isinstance(one, ConsoleHandler)]
    before = [(one.level, one.stream, one.colored) for one in consoles]
    logger.addFilter(_is_shown)
    for one in consoles:
        one.stream = _StderrNow()
        one.colored = one.colored and sys.stderr.isatty()
    try:
        yield
    finally:
        logger.removeFilter(_is_shown)
        for one, (level, stream, colored) in zip(consoles, before, strict=True):
            one.setLevel(level)  # an app may have set a lower level
            one.stream, one.colored = stream, colored
