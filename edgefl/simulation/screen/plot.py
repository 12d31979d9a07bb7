"""Plots of rounds: accuracy, loss and bytes over rounds and over time, and the participation of clients.

Time is virtual if the simulation has devices, else real. Several runs share the axes.
Drawing needs no display and no global state of pyplot, so it works in any thread and notebook.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import ConfigError, MissingExtra
from edgefl.guards import DEVICES
from edgefl.records import Counts, RoundReport, no_counts
from edgefl.rounds import without_devices
from edgefl.simulation.screen.on_devices import draw_on_devices, evaluated_names
from edgefl.simulation.screen.scales import limits_without_outliers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rounds = Sequence[RoundReport]
Along = Callable[[Rounds], Sequence[float]]  # position of each round on the x axis

LOSSES = {"loss": "-", "train_loss": ":"}
_OUTCOMES = {"admitted": "tab:green", "rejected": "tab:red", "failed": "tab:orange", "missing": "tab:gray"}
_STYLES = ("-", "--", ":", "-.")
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_FEW = 40  # up to this many points get markers; number of bars of a histogram
_HEADROOM = 1.15  # above the bars, for their legend
_DIVERGED = 1e4  # ratio of losses above which the axis is logarithmic
_LOG_FROM = 200  # ratio of bars above which the axis is logarithmic
NOBODY: Mapping[str, Counts] = MappingProxyType({})
NOTHING: Mapping[str, float] = MappingProxyType({})
NO_FINALS: Mapping[str, Mapping[str, float]] = MappingProxyType({})

_WIDTH_INCHES, _ROW_INCHES = 11, 3.25
_PIXELS_PER_INCH = 110
_UNITS_S = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))
_COLORS = 10  # in matplotlib's cycle; more runs use colours of a gradient
_STEPS = (1, 2, 5, 10)  # between ticks of counts
_LEGEND_LETTERS = 110  # per line of the legend
_NOTE_LETTERS = 60  # of a note in a panel


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run to draw."""

    name: str
    rounds: Rounds
    color: Any
    took_part: Counts = field(default_factory=lambda: no_counts(0))
    final: Mapping[str, float] = field(default_factory=dict)  # of the last parameters


def require_matplotlib() -> None:
    """Raise MissingExtra before the rounds if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra("a plot", "sim") from cause


def refuse_unknown_format(path: Path, flag: str = "--plot") -> None:
    """Raise ConfigError for a file whose extension is not a supported image format."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"{flag} {path}: the extension must be one of: .{', .'.join(known)}")


def draw_rounds(
    runs: Mapping[str, Rounds], took_part: Mapping[str, Counts] = NOBODY,
    finals: Mapping[str, Mapping[str, float]] = NO_FINALS,
) -> Figure:  # fmt: skip
    """Draw each run's rounds, how often its clients took part, and what devices evaluated of its last parameters.

    Raises MissingExtra without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    drawn = [
        Run(
            name=name,
            rounds=rounds,
            color=color,
            took_part=took_part.get(name, no_counts(0)),
            final=finals.get(name, NOTHING),
        )
        for (name, rounds), color in zip(runs.items(), _colors(len(runs)), strict=True)
    ]
    over_time, time_label = _time_axis(drawn)
    lines = [draw_metrics, draw_losses, *([draw_bytes] if _differ(drawn, _moved) else [])]
    counts = [draw for draw, of in ((draw_outcomes, _admitted), (draw_participation, _took_part)) if _differ(drawn, of)]
    height = _ROW_INCHES * (len(lines) + bool(counts))
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_PIXELS_PER_INCH, layout="constrained")
    grid = figure.add_gridspec(len(lines) + bool(counts), 2, wspace=0.04, hspace=0.04)
    counted, timed = [], []
    for row, draw in enumerate(lines):
        left = figure.add_subplot(grid[row, 0])
        right = figure.add_subplot(grid[row, 1], sharey=left)
        right.tick_params(labelleft=False)
        draw(left, drawn, _numbers)
        draw(right, drawn, over_time)
        left.set_xlabel("round")
        right.set_xlabel(time_label)
        right.set_ylabel("")
        counted.append(left)
        timed.append(right)
    of_clients = []
    for place, draw_counts in enumerate(counts):
        axes = figure.add_subplot(grid[len(lines), place] if len(counts) == 2 else grid[len(lines), :])
        draw_counts(axes, drawn)
        of_clients.append(axes)
    _finish(counted, of_clients, timed, len(drawn))
    _title(figure, drawn)
    return figure


def _differ(runs: Sequence[Run], of: Callable[[Run], Sequence[int]]) -> bool:
    """Whether a panel says something: it is of one run, or of several that differ as far as each of them went."""
    if len(runs) < 2:
        return True
    seen = [found for run in runs if len(found := of(run))]
    shortest = min(map(len, seen), default=0)
    return any(list(one[:shortest]) != list(seen[0][:shortest]) for one in seen)


def _moved(run: Run) -> list[int]:
    return [one.down_bytes + one.up_bytes for one in run.rounds]


def _admitted(run: Run) -> list[int]:
    return [one.admitted for one in run.rounds]


def _took_part(run: Run) -> list[int]:
    return sorted(run.took_part.tolist())


def write_plot(
    runs: Mapping[str, Rounds], path: Path, took_part: Mapping[str, Counts] = NOBODY,
    finals: Mapping[str, Mapping[str, float]] = NO_FINALS,
) -> None:  # fmt: skip
    """Draw into a file, in the format of its extension; raises ConfigError if it cannot be written."""
    try:
        draw_rounds(runs, took_part, finals).savefig(path)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"cannot write the plot {path}: {cause}") from cause


def _numbers(rounds: Rounds) -> Sequence[float]:
    return [one.round for one in rounds]


def _time_axis(runs: Sequence[Run]) -> tuple[Along, str]:
    """Return the end times of rounds, and the label of the axis."""
    virtual = any(run.rounds for run in runs) and all(
        one.virtual_end_s is not None for run in runs for one in run.rounds
    )

    def ends_s(rounds: Rounds) -> list[float]:
        return [one.virtual_end_s or 0.0 for one in rounds] if virtual else [*accumulate(one.seconds for one in rounds)]

    last_s = max((ends_s(run.rounds)[-1] for run in runs if run.rounds), default=0.0)
    scale, unit = next(((scale, unit) for least, scale, unit in _UNITS_S if last_s >= least), (1, "seconds"))
    label = f"{'virtual time' if virtual else 'time in rounds'} ({unit})"
    return lambda rounds: [end_s / scale for end_s in ends_s(rounds)], label


def _colors(number: int) -> Sequence[object]:
    if number <= _COLORS:
        return [f"C{index}" for index in range(number)]
    from matplotlib import colormaps

    return [colormaps["viridis"](index / (number - 1)) for index in range(number)]


def _finish(counted: Sequence[Axes], clients: Sequence[Axes], timed: Sequence[Axes], num_runs: int) -> None:
    """Set integer ticks on axes of counts, a grid, and a legend if one run has several lines."""
    from matplotlib.ticker import MaxNLocator

    for axes in (*counted, *clients):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_STEPS))
    for axes in clients:
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=_STEPS))
    for axes in timed:
        axes.set_xlim(left=0)
    for axes in (*counted, *clients, *timed):
        axes.grid(visible=True, alpha=0.3)
        axes.set_axisbelow(True)
    for axes in (*counted, *clients) if num_runs == 1 else ():
        if len(axes.get_legend_handles_labels()[0]) > 1:
            bars = axes.get_ylabel().startswith("clients")
            axes.legend(fontsize="small", loc="upper center" if bars else "best", ncols=4 if bars else 1)


def _title(figure: Figure, runs: Sequence[Run]) -> None:
    """Draw one run's name, or the legend of several runs."""
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    elif runs:
        from matplotlib.lines import Line2D

        longest = max(len(run.name) for run in runs) + 8
        figure.legend(
            [Line2D([], [], color=run.color, lw=2.5) for run in runs], [run.name for run in runs],
            loc="outside upper center", ncols=max(1, min(len(runs), _LEGEND_LETTERS // longest)), fontsize="small",
        )  # fmt: skip


def draw_metrics(axes: Axes, runs: Sequence[Run], along: Along) -> None:
    """Draw the metrics on the test data and on devices: only accuracy, if there is one."""
    names = {name for run in runs for one in run.rounds for name in without_devices(one.metrics)} - LOSSES.keys()
    names = names or {name for run in runs for name in evaluated_names(run.rounds)} - LOSSES.keys()
    shown = ["accuracy"] if "accuracy" in names else sorted(names)
    dashed = " (dashed: on devices)" if len(runs) > 1 and _evaluate_on_devices(runs) else ""
    axes.set_ylabel((shown[0] if len(shown) == 1 else "metrics") + dashed)
    for run in runs:
        for index, name in enumerate(shown):
            style = _STYLES[index % len(_STYLES)] if len(runs) > 1 else "-"
            color = run.color if len(runs) > 1 or len(shown) == 1 else None
            _line(axes, run.rounds, name, along, ls=style, color=color, label=name)
            draw_on_devices(
                axes, run.rounds, run.final, name, along, color=color or (axes.lines[-1].get_color() if axes.lines else
                None), spread=len(runs) == len(shown) == 1,
            )  # fmt: skip
    _leave_outliers_outside(axes, runs, [*shown, *(DEVICES + name for name in shown)])
    _say_if_empty(axes, "no metrics: the task has no test data, and devices do not evaluate")


def _evaluate_on_devices(runs: Sequence[Run]) -> bool:
    return any(evaluated_names(run.rounds) for run in runs)


def draw_losses(axes: Axes, runs: Sequence[Run], along: Along) -> None:
    """Draw the loss on the test data and on devices, and the training loss."""
    dashed = ", dashed: on devices" if _evaluate_on_devices(runs) else ""
    axes.set_ylabel("loss" if len(runs) == 1 else f"loss (dotted: in training{dashed})")
    for run in runs:
        for name, style in LOSSES.items():
            label = {"loss": "test", "train_loss": "training"}[name]
            _line(axes, run.rounds, name, along, ls=style, color=run.color, label=label)
        draw_on_devices(axes, run.rounds, run.final, "loss", along, color=run.color, spread=len(runs) == 1)
    if _leave_outliers_outside(axes, runs, LOSSES):
        return
    seen = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if np.isfinite(value)]
    if seen and 0 < _DIVERGED * min(seen) < max(seen):
        axes.set_yscale("log")
    _say_if_empty(axes, "no loss was reported")


def draw_bytes(axes: Axes, runs: Sequence[Run], along: Along) -> None:
    """Draw the bytes transferred so far: down and up for one run, their sum for several."""
    most = max((sum(one.down_bytes + one.up_bytes for one in run.rounds) for run in runs), default=0)
    scale, unit = next(((scale, unit) for scale, unit in _BYTES if most >= scale), (1.0, "bytes"))
    axes.set_ylabel(f"transferred so far ({unit})" if len(runs) == 1 else f"transferred so far, up and down ({unit})")
    for index, run in enumerate(runs):
        parts = (("down_bytes",), ("up_bytes",)) if len(runs) == 1 else (("down_bytes", "up_bytes"),)
        for keys in parts:
            points = list(accumulate(sum(getattr(one, key) for key in keys) / scale for one in run.rounds))
            wide = keys == ("down_bytes",)  # the line of `up` often covers it
            width = 4.0 if wide else _width(index, len(runs))
            axes.plot(
                along(run.rounds), points, "--" if keys == ("up_bytes",) else "-", color=run.color, lw=width,
                alpha=0.4 if wide else 1.0, label=keys[0].partition("_")[0],
            )  # fmt: skip
    axes.set_ylim(bottom=0)


def draw_outcomes(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the outcome of each round's clients: stacked bars for one run, the admitted clients for several."""
    axes.set_xlabel("round")
    axes.set_ylabel("clients per round" if len(runs) == 1 else "clients admitted")
    for index, run in enumerate(runs):
        numbers = [one.round for one in run.rounds]
        if len(runs) > 1:
            axes.plot(
                numbers, [one.admitted for one in run.rounds], color=run.color, lw=_width(index, len(runs)),
                marker="." if len(numbers) < _FEW else None,
            )  # fmt: skip
            continue
        below = np.zeros(len(numbers))
        for outcome, color in _OUTCOMES.items():
            counts = np.array([getattr(one, outcome) for one in run.rounds], float)
            if counts.any():
                width = 0.8 if len(numbers) < _FEW else 1.0
                axes.bar(numbers, counts, width, bottom=below, color=color, label=outcome)
            below += counts
    totals = ("admitted",) if len(runs) > 1 else tuple(_OUTCOMES)
    most = max((sum(getattr(one, outcome) for outcome in totals) for run in runs for one in run.rounds), default=0)
    axes.set_ylim(0, max(1, most) * _HEADROOM)


def draw_participation(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw how many clients took part in how many rounds."""
    axes.set_xlabel("number of rounds per client")
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
        _say(axes, "participation was not recorded")


def _leave_outliers_outside(axes: Axes, runs: Sequence[Run], metrics: Iterable[str]) -> bool:
    """Limit an axis to the runs that did not diverge, and name the others; whether there were any."""
    values = {
        run.name: [one.metrics[name] for one in run.rounds for name in metrics if name in one.metrics] for run in runs
    }
    if (found := limits_without_outliers(values)) is None:
        return False
    limits, outside = found
    axes.set_ylim(*limits)
    text = textwrap.shorten("outside: " + "; ".join(outside), _NOTE_LETTERS, placeholder=" ...")
    axes.set_title(text, loc="right", fontsize="small", color="gray")
    return True


def _line(axes: Axes, rounds: Rounds, name: str, along: Along, **look: Any) -> None:
    points = [(x, one.metrics[name]) for x, one in zip(along(rounds), rounds, strict=True) if name in one.metrics]
    if points:
        mark = "." if len(points) < _FEW else None
        axes.plot(*zip(*points, strict=True), marker=mark, **look)


def _width(index: int, of: int) -> float:
    """Return a line width: thinner lines over thicker ones, so that equal runs stay visible."""
    return 1.5 + min(of - 1 - index, 5) * 0.8


def _say_if_empty(axes: Axes, text: str) -> None:
    if not axes.lines:
        _say(axes, text)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="gray")
