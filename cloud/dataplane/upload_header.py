"""What the header of an upload may say: checked before a byte of the update is taken."""

from __future__ import annotations

import math

from edgefl.protocols import fleet_pb2 as pb
from edgefl.terminal.text import is_safe

MAX_METRICS, MAX_METRIC_CHARS = 100, 200  # of one update: they are kept with the round


def header_fault(header: pb.UploadHeader, most: int) -> str | None:
    """Say why an update cannot be taken, whatever its bytes are; None where it can. At most `most` bytes are taken."""
    if header.size > most:
        return f"the update has {header.size} bytes; at most {most} are taken in this round"
    longest = max(map(len, header.metrics), default=0)
    if len(header.metrics) > MAX_METRICS or longest > MAX_METRIC_CHARS:
        return (
            f"it has {len(header.metrics)} metrics, the longest name of {longest} characters; at most {MAX_METRICS} "
            f"of {MAX_METRIC_CHARS} are taken"
        )
    if not math.isfinite(header.weight):
        return f"its weight is {header.weight}, not a finite number"
    for name, value in header.metrics.items():
        if not math.isfinite(value) or not is_safe(name):
            return f"its metric {name!r} is {value}; names without control characters and finite numbers are taken"
    return None
