"""A log line is an event with fields: `update.refused device=cam-3 round=2 reason="..."`.

Never a tensor, never a secret. Whatever a field or a library's message holds, it starts no line of its own and
moves no cursor: a stack's lines are indented, other unsafe characters are escaped.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from edgefl.process.log_limits import LimitedHandler
from edgefl.terminal.text import is_safe, lines, one_line

FORM = "%(asctime)s %(levelname)-7s %(name)s %(message)s"


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr, a line an event; what repeats is counted (`edgefl.process.log_limits`)."""
    # gRPC's C core writes past Python's logging: a line for each handshake that a stranger breaks off.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = LimitedHandler(logging.StreamHandler(sys.stderr))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    handler.setFormatter(LineFormatter(FORM))


class LineFormatter(logging.Formatter):
    """A record as one line; the lines of its stack below it, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record)).replace("\n", "\n    ")


def event(logger: logging.Logger, level: int, name: str, **fields: object) -> None:
    """Log one event. Text with spaces is quoted as JSON."""
    text = "".join(f" {key}={_shown(value)}" for key, value in fields.items())
    logger.log(level, "%s%s", name, text, extra={"event": name, "fields": fields})


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and is_safe(text) and not any(c.isspace() or c == '"' for c in text):
        return text
    return json.dumps(text).replace("\x7f", "\\u007f")
