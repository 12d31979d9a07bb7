"""A curve in one line of text, for a table: `▁▂▄▆█`; in ASCII where the terminal has no block characters.

Many values are drawn as the means of equal groups. A value that is not finite leaves a blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=*#"


def curve_text(values: Sequence[float], max_chars: int, encoding: str | None = "utf-8") -> str:
    """Return the values as at most `max_chars` characters, from the lowest finite value to the highest."""
    marks = BLOCKS if _can_encode(BLOCKS, encoding) else ASCII
    points = _grouped(values, max_chars)
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return ""
    lowest, highest = min(finite), max(finite)

    def mark(point: float) -> str:
        if not math.isfinite(point):
            return " "
        height = (point / 2 - lowest / 2) / (highest / 2 - lowest / 2) if highest > lowest else 0.5  # no overflow
        return marks[min(len(marks) - 1, int(height * len(marks)))]

    return "".join(mark(point) for point in points)


def _grouped(values: Sequence[float], most: int) -> list[float]:
    count = min(most, len(values))
    groups = [values[index * len(values) // count : (index + 1) * len(values) // count] for index in range(count)]
    return [_mean([one for one in group if math.isfinite(one)]) for group in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(one / len(values) for one in values) if values else math.nan


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
