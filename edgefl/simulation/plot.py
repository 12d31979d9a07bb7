"""Rounds as a picture: accuracy, loss, bytes moved, who took part. Several runs share the axes.

Drawn without a display and without pyplot's global state, so that it works in any thread and notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rounds = Sequence[Mapping[str, Any]]  # as in a result's JSON

_OUTCOMES = {"admitted": "tab:green", "rejected": "tab:red", "failed": "tab:orange", "missing": "tab:gray"}
_LOSSES = {"loss": "-", "train_loss": ":"}
_INCHES = (10, 7)
_PIXELS_PER_INCH = 120


def require_matplotlib() -> None:
    """Raise MissingExtra where matplotlib is not installed: better before the rounds than after them."""
    try:
        import matplotlib  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra("a plot", "sim") from cause


def draw_rounds(runs: Mapping[str, Rounds]) -> Figure:
    """Draw each run's rounds; raises MissingExtra without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_PIXELS_PER_INCH, layout="constrained")
    metrics, losses, traffic, clients = figure.subplots(2, 2).flat
    _draw_metrics(metrics, runs)
    _draw_losses(losses, runs)
    _draw_bytes(traffic, runs)
    _draw_participation(clients, runs)
    for axes in (metrics, losses, traffic, clients):
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="lower right" if axes is clients else "best")
    return figure


def write_plot(runs: Mapping[str, Rounds], path: Path) -> None:
    """Draw into a file of the kind that its name ends with; raises ConfigError where it cannot be written."""
    try:
        draw_rounds(runs).savefig(path)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"cannot write --plot {path}: {cause}") from cause


def _draw_metrics(axes: Axes, runs: Mapping[str, Rounds]) -> None:
    """The task's metrics on its test data; accuracy by itself where it is there."""
    names = {name for rounds in runs.values() for one in rounds for name in one["metrics"]} - _LOSSES.keys()
    shown = ["accuracy"] if "accuracy" in names else sorted(names)
    axes.set_title("accuracy" if shown == ["accuracy"] else "metrics")
    for run, rounds in runs.items():
        for name in shown:
            _draw(axes, rounds, name, _label(run, name, len(runs), len(shown)), "-")


def _draw_losses(axes: Axes, runs: Mapping[str, Rounds]) -> None:
    axes.set_title("loss")
    for index, (run, rounds) in enumerate(runs.items()):
        for name, style in _LOSSES.items():
            text = {"loss": "test", "train_loss": "training"}[name]
            _draw(axes, rounds, name, f"{run}, {text}" if len(runs) > 1 else text, style, color=f"C{index}")


def _draw_bytes(axes: Axes, runs: Mapping[str, Rounds]) -> None:
    axes.set_title("megabytes moved, in all")
    for index, (run, rounds) in enumerate(runs.items()):
        for key, style, width in (("down_bytes", "-", 4.0), ("up_bytes", "--", 1.5)):  # they often lie on each other
            total, points = 0.0, []
            for one in rounds:
                total += one[key] / 1e6
                points.append(total)
            text = "down" if key == "down_bytes" else "up"
            label = f"{run}, {text}" if len(runs) > 1 else text
            axes.plot(
                [one["round"] for one in rounds],
                points,
                style,
                color=f"C{index}",
                label=label,
                lw=width,
                alpha=0.4 if width > 2 else 1.0,
            )
    axes.set_ylim(bottom=0)


def _draw_participation(axes: Axes, runs: Mapping[str, Rounds]) -> None:
    """What became of a round's clients: stacked bars of one run, lines of the admitted of several."""
    axes.set_title("clients")
    if len(runs) > 1:
        for run, rounds in runs.items():
            axes.plot([one["round"] for one in rounds], [one["admitted"] for one in rounds], label=f"{run}, admitted")
        axes.set_ylim(bottom=0)
        return
    for rounds in runs.values():
        below = [0] * len(rounds)
        for outcome, color in _OUTCOMES.items():
            counts = [int(one[outcome]) for one in rounds]
            if any(counts):
                axes.bar([one["round"] for one in rounds], counts, bottom=below, color=color, label=outcome)
            below = [low + count for low, count in zip(below, counts, strict=True)]


def _draw(axes: Axes, rounds: Rounds, name: str, label: str, style: str, color: str | None = None) -> None:
    points = [(one["round"], one["metrics"][name]) for one in rounds if name in one["metrics"]]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, color=color, marker="." if len(points) < 40 else None)


def _label(run: str, name: str, num_runs: int, num_metrics: int) -> str:
    if num_runs == 1:
        return name
    return run if num_metrics == 1 else f"{run}, {name}"
