"""Which values of several runs an axis shows: one run that diverged must not flatten all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

FAR = 10.0  # a run that is so many times further from the middle than is usual is left outside
MARGIN = 0.05  # of the height, above and below


def limits_without_outliers(values: Mapping[str, Sequence[float]]) -> tuple[tuple[float, float], list[str]] | None:
    """Return the limits that show all runs but those far outside, and the names of these; None if there are none.

    The middle is the median of the runs' medians, of two middle ones the smaller in magnitude. A run's distance is that
    of its furthest value from the middle. It is far outside if its distance is `FAR` times the median distance, or
    the middle's own magnitude if that is larger: runs that stay constant say nothing about the scale.
    """
    lines = {name: [one for one in line if np.isfinite(one)] for name, line in values.items()}
    lines = {name: line for name, line in lines.items() if line}
    if len(lines) < 2:
        return None
    middle = _lower_median(sorted((float(np.median(line)) for line in lines.values()), key=abs))
    distances = {name: max(abs(one - middle) for one in line) for name, line in lines.items()}
    usual = max(abs(middle), _lower_median(sorted(distances.values())))
    outside = [name for name, distance in distances.items() if distance > FAR * usual > 0]
    if not outside or len(outside) == len(lines):
        return None
    shown = [one for name, line in lines.items() if name not in outside for one in line]
    pad = MARGIN * (max(shown) - min(shown) or usual)
    return (min(shown) - pad, max(shown) + pad), outside


def _lower_median(ordered: Sequence[float]) -> float:
    return ordered[(len(ordered) - 1) // 2]
