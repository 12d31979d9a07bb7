"""Federated evaluation in a plot: the devices' mean, a band of their spread, and the worst tenth of them.

A round's evaluation is of the parameters before the round, so it is drawn where the round before ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgefl.guards import COUNT, DEVICES, STD, WORST_TENTH
from edgefl.records import RoundReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPREAD_ALPHA = 0.15


def evaluated_names(rounds: Iterable[RoundReport]) -> set[str]:
    """Return the metrics that devices evaluated, without `devices/`."""
    return {
        name.removeprefix(DEVICES)
        for one in rounds
        for name in one.metrics
        if name.startswith(DEVICES) and name != DEVICES + COUNT and f"{name}/{STD}" in one.metrics
    }


def draw_on_devices(  # noqa: PLR0913 - what is drawn, and how
    axes: Axes, rounds: Sequence[RoundReport], final: Mapping[str, float], name: str,
    along: Callable[[Sequence[RoundReport]], Sequence[float]], *, color: Any, spread: bool,
) -> None:  # fmt: skip
    """Draw one metric over the parameters' ages; `spread`: also the band of the spread and the worst tenth."""
    ages = [0.0, *along(rounds)]
    found = [(age, metrics) for age, metrics in zip(ages, (*(one.metrics for one in rounds), final), strict=True)
             if DEVICES + name in metrics]  # fmt: skip
    if not found:
        return
    at = [age for age, _ in found]
    means = [metrics[DEVICES + name] for _, metrics in found]
    axes.plot(at, means, "--", color=color, marker="." if len(at) == 1 else None, label=f"{name} on devices")
    if not spread:
        return
    stds = [metrics.get(f"{DEVICES}{name}/{STD}", 0.0) for _, metrics in found]
    low, high = zip(*((mean - std, mean + std) for mean, std in zip(means, stds, strict=True)), strict=True)
    axes.fill_between(at, low, high, color=color, alpha=_SPREAD_ALPHA, lw=0, label="their spread")
    worst = [(age, metrics[key]) for age, metrics in found if (key := f"{DEVICES}{name}/{WORST_TENTH}") in metrics]
    if worst:
        axes.plot(*zip(*worst, strict=True), "-.", color=color, lw=1.0, label="the worst tenth")
