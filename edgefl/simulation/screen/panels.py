"""The panels of a simulation's picture, each drawn by one function from the rounds of one run or several.

One run tells its parts apart by colour; several have a colour each, and parts by the line's style.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.records import Counts, no_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rounds = Sequence[Mapping[str, Any]]  # as in a result's JSON
Along = Callable[[Rounds], Sequence[float]]  # where on the x axis each round stands

LOSSES = {"loss": "-", "train_loss": ":"}
_OUTCOMES = {"admitted": "tab:green", "rejected": "tab:red", "failed": "tab:orange", "missing": "tab:gray"}
_STYLES = ("-", "--", ":", "-.")
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_FEW = 40  # points that are worth a mark each, and bars of a histogram
_HEADROOM = 1.15  # above the bars, for their legend
_DIVERGED = 1e4  # times more loss in one place than in another: only a logarithm shows both
_LOG_FROM = 200  # times more clients in one bar than in another


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run, as it is drawn."""

    name: str
    rounds: Rounds
    color: Any
    took_part: Counts = field(default_factory=lambda: no_counts(0))


def draw_metrics(axes: Axes, runs: Sequence[Run], along: Along) -> None:
    """The metrics on the test data: accuracy by itself where it is there."""
    names = {name for run in runs for one in run.rounds for name in one["metrics"]} - LOSSES.keys()
    shown = ["accuracy"] if "accuracy" in names else sorted(names)
    axes.set_ylabel(shown[0] if len(shown) == 1 else "metrics")
    for run in runs:
        for index, name in enumerate(shown):
            style = _STYLES[index % len(_STYLES)] if len(runs) > 1 else "-"
            color = run.color if len(runs) > 1 or len(shown) == 1 else None
            _line(axes, run.rounds, name, along, ls=style, color=color, label=name)
    _say_if_empty(axes, "no metrics: the task has no test data")


def draw_losses(axes: Axes, runs: Sequence[Run], along: Along) -> None:
    """Loss on the test data, and of the training."""
    axes.set_ylabel("loss" if len(runs) == 1 else "loss (dotted: in training)")
    for run in runs:
        for name, style in LOSSES.items():
            label = {"loss": "test", "train_loss": "training"}[name]
            _line(axes, run.rounds, name, along, ls=style, color=run.color, label=label)
    seen = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if np.isfinite(value)]
    if seen and 0 < _DIVERGED * min(seen) < max(seen):
        axes.set_yscale("log")
    _say_if_empty(axes, "no loss was reported")


def draw_bytes(axes: Axes, runs: Sequence[Run], along: Along) -> None:
    """What has moved by then: down and up of one run, both together of several."""
    most = max((sum(one["down_bytes"] + one["up_bytes"] for one in run.rounds) for run in runs), default=0)
    scale, unit = next(((scale, unit) for scale, unit in _BYTES if most >= scale), (1.0, "bytes"))
    axes.set_ylabel(f"moved so far ({unit})" if len(runs) == 1 else f"moved so far, both ways ({unit})")
    for index, run in enumerate(runs):
        parts = (("down_bytes",), ("up_bytes",)) if len(runs) == 1 else (("down_bytes", "up_bytes"),)
        for keys in parts:
            points = list(accumulate(sum(one[key] for key in keys) / scale for one in run.rounds))
            wide = keys == ("down_bytes",)  # up often lies on it
            width = 4.0 if wide else _width(index, len(runs))
            axes.plot(
                along(run.rounds), points, "--" if keys == ("up_bytes",) else "-", color=run.color, lw=width,
                alpha=0.4 if wide else 1.0, label=keys[0].partition("_")[0],
            )  # fmt: skip
    axes.set_ylim(bottom=0)


def draw_outcomes(axes: Axes, runs: Sequence[Run]) -> None:
    """What became of each round's clients: stacked bars of one run, the admitted of several."""
    axes.set_ylabel("clients of the round" if len(runs) == 1 else "clients admitted")
    for index, run in enumerate(runs):
        numbers = [one["round"] for one in run.rounds]
        if len(runs) > 1:
            axes.plot(
                numbers, [one["admitted"] for one in run.rounds], color=run.color, lw=_width(index, len(runs)),
                marker="." if len(numbers) < _FEW else None,
            )  # fmt: skip
            continue
        below = np.zeros(len(numbers))
        for outcome, color in _OUTCOMES.items():
            counts = np.array([int(one[outcome]) for one in run.rounds], float)
            if counts.any():
                width = 0.8 if len(numbers) < _FEW else 1.0
                axes.bar(numbers, counts, width, bottom=below, color=color, label=outcome)
            below += counts
    totals = ("admitted",) if len(runs) > 1 else tuple(_OUTCOMES)
    most = max((sum(one[outcome] for outcome in totals) for run in runs for one in run.rounds), default=0)
    axes.set_ylim(0, max(1, most) * _HEADROOM)


def draw_participation(axes: Axes, runs: Sequence[Run]) -> None:
    """How many clients took part in how many rounds."""
    axes.set_xlabel("rounds that a client took part in")
    axes.set_ylabel("clients")
    most = max((int(run.took_part.max()) for run in runs if len(run.took_part)), default=0)
    step = -(-(most + 1) // _FEW)
    edges = np.arange(0, most + step + 1, step) - 0.5
    tallest, lowest = 0, 0
    for index, run in enumerate(runs):
        if not len(run.took_part):
            continue
        clients = np.histogram(run.took_part, edges)[0]
        tallest = max(tallest, int(clients.max()))
        lowest = min(lowest or tallest, int(clients[clients > 0].min()))
        axes.stairs(clients, edges, color=run.color, fill=len(runs) == 1, lw=_width(index, len(runs)))
    if tallest > _LOG_FROM * lowest > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    if not tallest:
        _say(axes, "nobody counted them")


def _line(axes: Axes, rounds: Rounds, name: str, along: Along, **look: Any) -> None:
    points = [(x, one["metrics"][name]) for x, one in zip(along(rounds), rounds, strict=True) if name in one["metrics"]]
    if points:
        mark = "." if len(points) < _FEW else None
        axes.plot(*zip(*points, strict=True), marker=mark, **look)


def _width(index: int, of: int) -> float:
    """Thinner lines over thicker ones: runs that do the same lie on each other."""
    return 1.5 + min(of - 1 - index, 5) * 0.8


def _say_if_empty(axes: Axes, text: str) -> None:
    if not axes.lines:
        _say(axes, text)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="gray")
