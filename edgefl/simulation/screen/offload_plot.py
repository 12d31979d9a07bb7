"""A picture of a plan for a split model: what each cut costs, what crosses it, and what was read from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgefl.offload.leak import Leak
from edgefl.offload.plans.planner import ALL_DEVICE, Prediction
from edgefl.simulation.screen.plot import refuse_unknown_format, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PIXELS_PER_INCH, _ROW_INCHES, _NAME_LETTERS, _LETTER_POINTS = 110, 2.8, 28, 7
_COLORS = {"device": "tab:green", "link": "tab:orange", "cloud": "tab:blue"}


def write_offload_plot(
    cuts: Sequence[Prediction], chosen: Prediction, predicted_ms: Mapping[int, float], leaks: Mapping[int, Leak],
    title: str, path: Path,
) -> None:  # fmt: skip
    """Write the picture; its format follows from the file's name. Raises ConfigError, MissingExtra.

    `cuts` are in the order of the layers. By layers on the device: `predicted_ms` of cuts whose stages were timed, and
    `leaks`, empty if none was measured.
    """
    require_matplotlib()
    refuse_unknown_format(path)
    from matplotlib.figure import Figure

    rows = 2 + bool(leaks)
    width = min(22.0, max(7.0, 2.5 + 0.28 * len(cuts)))
    figure = Figure(figsize=(width, _ROW_INCHES * rows + 1.6), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    figure.suptitle(title, fontsize=10)
    _draw_times(axes[0], cuts, chosen, predicted_ms)
    _draw_bytes(axes[1], cuts, chosen)
    if leaks:
        _draw_leaks(axes[2], cuts, chosen, leaks)
    axes[-1].set_xticks(
        range(len(cuts)), [_name(one) for one in cuts], rotation=90, fontsize=6 if len(cuts) > 40 else 8
    )
    axes[-1].set_xlim(-0.7, len(cuts) - 0.3)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _draw_times(
    axes: Axes, cuts: Sequence[Prediction], chosen: Prediction, predicted_ms: Mapping[int, float]
) -> None:  # fmt: skip
    bottom = np.zeros(len(cuts))
    for part, color in _COLORS.items():
        height = np.array([getattr(one, f"{part}_ms") for one in cuts])
        axes.bar(range(len(cuts)), height, bottom=bottom, color=color, label=part, width=0.8)
        bottom += height
    predicted = [predicted_ms.get(one.option.num_head, np.nan) for one in cuts]
    if predicted_ms:
        axes.plot(range(len(cuts)), predicted, "D", color="black", markersize=4, markerfacecolor="white",
                  label="predicted, where measured")  # fmt: skip
    _mark(axes, cuts, chosen, f"chosen: {chosen.latency_ms:.3g} ms")
    axes.set_ylabel("ms for one request")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, ncols=5, frameon=False)
    axes.set_ylim(0, 1.05 * max(bottom.max(), np.nanmax([0.0, *predicted])))


def _draw_bytes(axes: Axes, cuts: Sequence[Prediction], chosen: Prediction) -> None:
    up = [max(one.option.up_bytes, 1) if one.option.form else np.nan for one in cuts]
    axes.plot(range(len(cuts)), up, "o-", color=_COLORS["link"], markersize=3, label="bytes up")
    axes.plot(range(len(cuts)), [max(1, one.option.device_bytes) for one in cuts], "s-", color=_COLORS["device"],
              markersize=3, label="bytes on the device: weights and activations")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("bytes")
    _mark(axes, cuts, chosen)
    axes.legend(loc="best", fontsize=8)


def _draw_leaks(axes: Axes, cuts: Sequence[Prediction], chosen: Prediction, leaks: Mapping[int, Leak]) -> None:
    found = [leaks.get(one.option.num_head) for one in cuts]
    measure = next(iter(leaks.values())).measure
    axes.plot(range(len(cuts)), [np.nan if one is None else one.value for one in found], "o-", color="tab:red",
              markersize=3, label="strongest attack")  # fmt: skip
    axes.plot(range(len(cuts)), [np.nan if one is None else one.blind for one in found], ":", color="0.4",
              label="a guess that sees nothing")  # fmt: skip
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel(f"leak: {measure}")
    _mark(axes, cuts, chosen)
    axes.legend(loc="best", fontsize=8)


def _mark(axes: Axes, cuts: Sequence[Prediction], chosen: Prediction, label: str | None = None) -> None:
    at = next(at for at, one in enumerate(cuts) if one.option.num_head == chosen.option.num_head)
    axes.axvline(at, color="black", linewidth=1, linestyle="--", label=label)
    axes.grid(axis="y", alpha=0.3)


def _name(one: Prediction) -> str:
    name = one.option.name.removeprefix("split:")
    short = name if len(name) <= _NAME_LETTERS else f"…{name[1 - _NAME_LETTERS :]}"
    return short if one.option.name == ALL_DEVICE else f"{short} {one.option.form}"
