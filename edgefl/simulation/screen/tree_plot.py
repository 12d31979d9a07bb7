"""A picture of a fleet: the cloud, its regions and their devices, with the bytes of each region."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.operator.tree import CLOUD, DEVICE, REGION, FleetNode, node_text
from edgefl.simulation.screen.plot import refuse_unknown_format, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMN_INCHES, _ROW_INCHES, _PIXELS_PER_INCH = 4.0, 0.32, 110
_ONLINE, _OFFLINE, _LINE = "tab:green", "tab:gray", "0.7"
_SHAPES = {CLOUD: "s", REGION: "D", DEVICE: "o"}


def write_tree_plot(root: FleetNode, notes: Mapping[str, str], path: Path) -> None:
    """Write the picture; its format follows from the file's name. Raises ConfigError, MissingExtra."""
    require_matplotlib()
    refuse_unknown_format(path)
    from matplotlib.figure import Figure

    placed = list(_placed(root, 0, [0]))
    depth, rows = max(column for _, column, _, _ in placed) + 1, max(row for _, _, row, _ in placed) + 1
    figure = Figure(figsize=(_COLUMN_INCHES * depth, max(1.5, _ROW_INCHES * (rows + 2))), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.1, depth)
    axes.set_ylim(rows, -1)
    for node, column, row, parent_row in placed:
        _draw(axes, node, node_text(node, notes), column, row, parent_row)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _placed(
    node: FleetNode, column: int, next_row: list[int], parent_row: int | None = None
) -> Iterator[tuple[FleetNode, int, int, int | None]]:
    """Yield each node with its column and row, and its parent's row: one node a row, a parent above its children."""
    row = next_row[0]
    next_row[0] += 1
    yield node, column, row, parent_row
    for child in node.children:
        yield from _placed(child, column + 1, next_row, row)


def _draw(axes: Axes, node: FleetNode, text: str, column: int, row: int, parent_row: int | None) -> None:
    if parent_row is not None:
        axes.plot([column - 1, column - 1, column], [parent_row, row, row], color=_LINE, linewidth=1, zorder=1)
    color = _ONLINE if node.online else _OFFLINE
    axes.plot([column], [row], marker=_SHAPES[node.kind], color=color, markersize=8, zorder=2)
    axes.text(column + 0.05, row - 0.05, text, va="center", fontsize=9, zorder=3,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
