"""Which values of several runs an axis shows: one run that diverged must not flatten all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

FAR = 10.0  # a run whose values span so many times what is usual among the runs is left outside
MARGIN = 0.05  # of the height, above and below


def limits_without_outliers(values: Mapping[str, Sequence[float]]) -> tuple[tuple[float, float], list[str]] | None:
    """Return the limits that show all runs but those far outside, and the names of these; None if there are none.

    A run is far outside if its values, together with what the usual runs have, span `FAR` times as much as the usual
    runs do. The usual runs are the half (at least one) with the smallest spans.
    """
    finite = {name: [one for one in line if np.isfinite(one)] for name, line in values.items()}
    lines = {name: (min(line), max(line)) for name, line in finite.items() if line}
    if len(lines) < 2:
        return None
    by_span = sorted(lines, key=lambda name: lines[name][1] - lines[name][0])
    usual = by_span[: (len(by_span) + 1) // 2]
    low, high = min(lines[name][0] for name in usual), max(lines[name][1] for name in usual)
    span = high - low
    if span <= 0:
        return None
    outside = [name for name in lines if max(high, lines[name][1]) - min(low, lines[name][0]) > FAR * span]
    if not outside:
        return None
    shown = [bounds for name, bounds in lines.items() if name not in outside]
    low, high = min(bounds[0] for bounds in shown), max(bounds[1] for bounds in shown)
    pad = MARGIN * (high - low)
    return (low - pad, high + pad), outside
