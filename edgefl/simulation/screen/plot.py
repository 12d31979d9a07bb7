"""Rounds as a picture: accuracy, loss and bytes over rounds and over time, and who took part.

Time is virtual where the simulation has devices, else what the rounds took here. Several runs share the axes.
Drawn without a display and without pyplot's global state, so that it works in any thread and notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefl.errors import ConfigError, MissingExtra
from edgefl.records import Counts, no_counts
from edgefl.simulation.screen.panels import (
    Along,
    Rounds,
    Run,
    draw_bytes,
    draw_losses,
    draw_metrics,
    draw_outcomes,
    draw_participation,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOBODY: Mapping[str, Counts] = MappingProxyType({})

_INCHES = (11, 13)
_PIXELS_PER_INCH = 110
_UNITS_S = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))
_COLORS = 10  # of matplotlib's own cycle; more runs than that take theirs from a gradient
_STEPS = (1, 2, 5, 10)  # between ticks that count
_LEGEND_LETTERS = 110  # in a line of the legend


def require_matplotlib() -> None:
    """Raise MissingExtra where matplotlib is not installed: better before the rounds than after them."""
    try:
        import matplotlib  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra("a plot", "sim") from cause


def draw_rounds(runs: Mapping[str, Rounds], took_part: Mapping[str, Counts] = NOBODY) -> Figure:
    """Draw each run's rounds, and how often its clients took part; raises MissingExtra without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    drawn = [
        Run(name=name, rounds=rounds, color=color, took_part=took_part.get(name, no_counts(0)))
        for (name, rounds), color in zip(runs.items(), _colors(len(runs)), strict=True)
    ]
    figure = Figure(figsize=_INCHES, dpi=_PIXELS_PER_INCH, layout="constrained")
    panels = figure.subplots(4, 2, sharey="row", gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    over_time, time_label = _time_axis(drawn)
    for row, draw in enumerate((draw_metrics, draw_losses, draw_bytes)):
        draw(panels[row][0], drawn, _numbers)
        draw(panels[row][1], drawn, over_time)
        panels[row][0].set_xlabel("round")
        panels[row][1].set_xlabel(time_label)
        panels[row][1].set_ylabel("")
    panels[3][1].remove()  # it would share the axis of its neighbour, which counts something else
    counted = figure.add_subplot(4, 2, 8)
    draw_outcomes(panels[3][0], drawn)
    draw_participation(counted, drawn)
    panels[3][0].set_xlabel("round")
    _finish([*(panels[row][0] for row in range(4)), counted], [panels[row][1] for row in range(3)], len(drawn))
    _title(figure, drawn)
    return figure


def write_plot(runs: Mapping[str, Rounds], path: Path, took_part: Mapping[str, Counts] = NOBODY) -> None:
    """Draw into a file of the kind that its name ends with; raises ConfigError where it cannot be written."""
    try:
        draw_rounds(runs, took_part).savefig(path)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"cannot write --plot {path}: {cause}") from cause


def _numbers(rounds: Rounds) -> Sequence[float]:
    return [one["round"] for one in rounds]


def _time_axis(runs: Sequence[Run]) -> tuple[Along, str]:
    """Return where in time rounds end, and what that axis is called."""
    virtual = any(run.rounds for run in runs) and all("virtual_end_s" in one for run in runs for one in run.rounds)

    def ends_s(rounds: Rounds) -> list[float]:
        return [one["virtual_end_s"] for one in rounds] if virtual else [*accumulate(one["seconds"] for one in rounds)]

    last_s = max((ends_s(run.rounds)[-1] for run in runs if run.rounds), default=0.0)
    scale, unit = next(((scale, unit) for least, scale, unit in _UNITS_S if last_s >= least), (1, "seconds"))
    label = f"{'virtual time' if virtual else 'time in rounds'} ({unit})"
    return lambda rounds: [end_s / scale for end_s in ends_s(rounds)], label


def _colors(number: int) -> Sequence[object]:
    if number <= _COLORS:
        return [f"C{index}" for index in range(number)]
    from matplotlib import colormaps

    return [colormaps["viridis"](index / (number - 1)) for index in range(number)]


def _finish(counted: Sequence[Axes], timed: Sequence[Axes], num_runs: int) -> None:
    """Whole numbers where things are counted, a grid, and a legend where one run has several parts."""
    from matplotlib.ticker import MaxNLocator

    for axes in counted:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_STEPS))
    for axes in counted[-2:]:  # clients: there are no halves of them
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=_STEPS))
    for axes in timed:
        axes.set_xlim(left=0)
    for axes in (*counted, *timed):
        axes.grid(visible=True, alpha=0.3)
        axes.set_axisbelow(True)
    for axes in counted if num_runs == 1 else ():
        if len(axes.get_legend_handles_labels()[0]) > 1:
            bars = axes.get_ylabel().startswith("clients")
            axes.legend(fontsize="small", loc="upper center" if bars else "best", ncols=4 if bars else 1)


def _title(figure: Figure, runs: Sequence[Run]) -> None:
    """One run's name, or the legend of several."""
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    elif runs:
        from matplotlib.lines import Line2D

        longest = max(len(run.name) for run in runs) + 8
        figure.legend(
            [Line2D([], [], color=run.color, lw=2.5) for run in runs], [run.name for run in runs],
            loc="outside upper center", ncols=max(1, min(len(runs), _LEGEND_LETTERS // longest)), fontsize="small",
        )  # fmt: skip
