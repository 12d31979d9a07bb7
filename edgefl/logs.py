"""A log line is an event with fields: `update.refused device=cam-3 round=2 reason="..."`.

Never a tensor, never a secret. Nothing in a field or in a library's message can start a new line or move the
cursor: the lines of a stack trace are indented, other unsafe characters are escaped.

Repeated lines are counted, not written: the first ones appear, then `... 4213 more of this in 60 s`. A client that
can cause one log line could cause a million, and fill the disk. So lines that clients cause are limited per
event (or per place in a library's code) and per client.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgefl.terminal.text import is_safe, lines, one_line

_TO_QUOTE = re.compile(r'[\s"]')
FORM = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
WINDOW_S = 60.0
LINES_OF_ONE = 10  # per window, for one event of one device or address
LINES_OF_ALL = 200  # per window, for one event of all devices and addresses
MAX_KEYS = 10_000  # kept in memory
OURS = ("edgefl", "cloud", "edge_agent")
FILE_BYTES = 1 << 20  # of a log file in a home, before it becomes FILE.1
CAUSED_BY = ("device", "peer", "source")  # fields that name the client that caused a line

Key = tuple[str, ...]


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr, one line per event; repeated lines are counted (`LimitedHandler`)."""
    # gRPC's C core bypasses Python's logging: it writes one line per handshake that a client breaks off.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = LimitedHandler(logging.StreamHandler(sys.stderr))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    handler.setFormatter(LineFormatter(FORM))


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to a file, too, within the block, if `set_up_logging` was called; it has two parts of FILE_BYTES at most.

    A full disk costs lines of the file only: stderr has them all.
    """
    limited = next((one for one in logging.getLogger().handlers if isinstance(one, LimitedHandler)), None)
    if limited is None:
        yield
        return
    handler = _LogFile(path, maxBytes=FILE_BYTES, backupCount=1, delay=True, encoding="utf-8", errors="replace")
    handler.setFormatter(LineFormatter(FORM))
    limited.add_target(handler)
    try:
        yield
    finally:
        limited.remove_target(handler)
        handler.close()


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file whose errors, such as a full disk, cost only the line; the next line opens the file again."""

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        stream, self.stream = self.stream, None  # FileHandler opens it again
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # it may hold what could not be written
                stream.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class LineFormatter(logging.Formatter):
    """Formats a record as one line, with the lines of its stack trace indented below."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if is_safe(text) else lines(text).replace("\n", "\n    ")


def event(logger: logging.Logger, level: int, name: str, **fields: object) -> None:
    """Log one event. Text with spaces is quoted as JSON."""
    text = "".join(f" {key}={_shown(value)}" for key, value in fields.items())
    logger.log(level, "%s%s", name, text, extra={"event": name, "fields": fields})


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and is_safe(text) and _TO_QUOTE.search(text) is None:
        return text
    return json.dumps(text).replace("\x7f", "\\u007f")


@dataclass(slots=True)
class _Count:
    """How often a line occurred in its window."""

    ends_s: float
    written: int
    sample: logging.LogRecord  # the last one that was not written
    held_back: int = 0


class LimitedHandler(logging.Handler):
    """Passes records to another handler, at most a few per minute of each kind.

    The number of suppressed records is written with the first record after the window, and on `close`.
    """

    def __init__(self, target: logging.Handler, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._targets, self._clock = [target], clock
        self._counts: dict[Key, _Count] = {}
        self._next_end_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or only count it."""
        now_s = self._clock()
        if now_s >= self._next_end_s:
            self._write_summaries(now_s)
        if all(self._passes(key, most, record, now_s) for key, most in _limits_of(record)):
            self._write(record)

    def add_target(self, target: logging.Handler) -> None:
        """Pass records to another handler, too."""
        self._targets = [*self._targets, target]

    def remove_target(self, target: logging.Handler) -> None:
        """Pass records to this handler no longer."""
        self._targets = [one for one in self._targets if one is not target]

    def close(self) -> None:
        """Write the counts of suppressed records, and close."""
        self._write_summaries(float("inf"))
        for target in self._targets:
            target.close()
        super().close()

    def flush(self) -> None:
        for target in self._targets:
            target.flush()

    def setFormatter(self, fmt: logging.Formatter | None) -> None:  # noqa: N802 - logging's name
        for target in self._targets:
            target.setFormatter(fmt)

    def _write(self, record: logging.LogRecord) -> None:
        for target in self._targets:
            target.handle(record)

    def _passes(self, key: Key, most: int, record: logging.LogRecord, now_s: float) -> bool:
        count = self._counts.get(key)
        if count is None:
            if len(self._counts) >= MAX_KEYS and len(key) > 1:
                return True  # names can be made up: the event as a whole is limited, too
            self._counts[key] = count = _Count(now_s + WINDOW_S, 0, record)
        if count.written < most:
            count.written += 1
            return True
        count.held_back += 1
        count.sample = record
        return False

    def _write_summaries(self, now_s: float) -> None:
        for key, count in list(self._counts.items()):
            if count.ends_s <= now_s:
                del self._counts[key]
                if count.held_back:
                    self._write(_summary(count))
        self._next_end_s = min((one.ends_s for one in self._counts.values()), default=0.0)


def _limits_of(record: logging.LogRecord) -> list[tuple[Key, int]]:
    """Return the keys that a record counts under, with the limit of each; none for lines that clients cannot cause."""
    name = getattr(record, "event", None)
    if name is None:
        place = (record.name, f"{record.pathname}:{record.lineno}")
        ours = record.name.partition(".")[0] in OURS
        return [] if ours and record.levelno < logging.WARNING else [(place, LINES_OF_ONE)]
    caused_by = tuple(str(value) for key, value in getattr(record, "fields", {}).items() if key in CAUSED_BY)
    if not caused_by and record.levelno < logging.WARNING:
        return []
    return [((name, *caused_by, ""), LINES_OF_ONE), ((name,), LINES_OF_ALL)]


def _summary(count: _Count) -> logging.LogRecord:
    last = count.sample
    text = f"... {count.held_back} more of this in {WINDOW_S:.0f} s, the last: {last.getMessage()}"
    return logging.LogRecord(last.name, last.levelno, last.pathname, last.lineno, text, None, None)
