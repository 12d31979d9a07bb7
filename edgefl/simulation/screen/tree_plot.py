"""A picture of a fleet: the cloud, its regions and their devices, with the bytes of each region."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.operator.tree import CLOUD, DEVICE, REGION, FleetNode, details_text
from edgefl.simulation.screen.plot import refuse_unknown_format, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES, _INDENT_INCHES, _ROW_INCHES, _PIXELS_PER_INCH = 8.0, 0.35, 0.3, 110  # wider if a text is
_ONLINE, _OFFLINE, _LINE, _DETAILS = "tab:green", "tab:gray", "0.7", "0.35"
_SHAPES = {CLOUD: "s", REGION: "D", DEVICE: "o"}


def write_tree_plot(root: FleetNode, path: Path) -> None:
    """Write the picture; its format follows from the file's name. Raises ConfigError, MissingExtra."""
    require_matplotlib()
    refuse_unknown_format(path)
    from matplotlib.figure import Figure

    placed = list(_placed(root, 0, [0]))
    rows = max(row for _, _, row, _ in placed) + 1
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, _WIDTH_INCHES)
    axes.set_ylim(rows - 0.5, -0.5)
    for node, column, row, parent_row in placed:
        _draw(axes, node, _INDENT_INCHES * (column + 0.5), row, parent_row)
    figure.savefig(path, dpi=_PIXELS_PER_INCH, bbox_inches="tight", pad_inches=0.15)


def _placed(
    node: FleetNode, column: int, next_row: list[int], parent_row: int | None = None
) -> Iterator[tuple[FleetNode, int, int, int | None]]:
    """Yield each node with its column and row, and its parent's row: one node a row, a parent above its children."""
    row = next_row[0]
    next_row[0] += 1
    yield node, column, row, parent_row
    for child in node.children:
        yield from _placed(child, column + 1, next_row, row)


def _draw(axes: Axes, node: FleetNode, x: float, row: int, parent_row: int | None) -> None:
    if parent_row is not None:
        above = x - _INDENT_INCHES
        axes.plot([above, above, x], [parent_row, row, row], color=_LINE, linewidth=1, zorder=1)
    color = _ONLINE if node.online else _OFFLINE
    axes.plot([x], [row], marker=_SHAPES[node.kind], color=color, markersize=8, zorder=2)
    name = axes.text(x + 0.13, row, node.name, va="center", fontsize=9, weight="bold")
    axes.annotate(
        details_text(node), xy=(1, 0.5), xycoords=name, xytext=(8, 0), textcoords="offset points", va="center",
        fontsize=9, color=_DETAILS,
    )  # fmt: skip
