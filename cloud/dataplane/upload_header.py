"""Checks the header of an upload, before any byte of the update is accepted."""

from __future__ import annotations

import math

from edgefl.protocols import fleet_pb2 as pb
from edgefl.terminal.text import is_safe

MAX_METRICS, MAX_METRIC_CHARS = 100, 200  # per update, because they are kept with the round


def header_fault(header: pb.UploadHeader, most: int) -> str | None:
    """Return why the update is refused; None if it is not. An update may have `most` bytes."""
    if header.size > most:
        return f"the update has {header.size} bytes; at most {most} are allowed in this round"
    longest = max(map(len, header.metrics), default=0)
    if len(header.metrics) > MAX_METRICS or longest > MAX_METRIC_CHARS:
        return (
            f"the update has {len(header.metrics)} metrics, with names of up to {longest} characters; at most "
            f"{MAX_METRICS} metrics with names of {MAX_METRIC_CHARS} characters are allowed"
        )
    if not math.isfinite(header.weight):
        return f"the update's weight is {header.weight}, expected a finite number"
    for name, value in header.metrics.items():
        if not math.isfinite(value) or not is_safe(name):
            return (
                f"the update's metric {name!r} is {value}; expected a finite number, and a name without control "
                "characters"
            )
    return None
