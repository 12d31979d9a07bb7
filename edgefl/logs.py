"""A log line is an event with fields: `update.refused device=cam-3 round=2 reason="..."`.

Never a tensor, never a secret.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from edgefl.log_limits import LimitedHandler


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr, a line an event; what repeats is counted (`edgefl.log_limits`)."""
    # gRPC's C core writes past Python's logging: a line for each handshake that a stranger breaks off.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = LimitedHandler(logging.StreamHandler(sys.stderr))
    form = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
    logging.basicConfig(handlers=[handler], level=level, format=form, force=True)


def event(logger: logging.Logger, level: int, name: str, **fields: object) -> None:
    """Log one event. Text with spaces is quoted as JSON."""
    text = "".join(f" {key}={_shown(value)}" for key, value in fields.items())
    logger.log(level, "%s%s", name, text, extra={"event": name, "fields": fields})


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and not any(c.isspace() or c == '"' for c in text) else json.dumps(text)
