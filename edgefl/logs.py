"""A log line is an event with fields: `update.refused device=cam-3 round=2 reason="..."`.

Never a tensor, never a secret.
"""

from __future__ import annotations

import json
import logging
import sys


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr, a line an event."""
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)-7s %(name)s %(message)s", force=True
    )


def event(logger: logging.Logger, level: int, name: str, **fields: object) -> None:
    """Log one event. Text with spaces is quoted as JSON."""
    logger.log(level, "%s%s", name, "".join(f" {key}={_shown(value)}" for key, value in fields.items()))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and not any(c.isspace() or c == '"' for c in text) else json.dumps(text)
