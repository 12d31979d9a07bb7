"""Write the table of simulations in docs/numbers.md, between its two markers: one row per measured row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Row, machine, shown

BEGIN, END = "<!-- simulation-table -->", "<!-- /simulation-table -->"
_JUDGED = ("clients a second", "100 rounds")  # metrics with an accuracy in the same row
_SHOWN = ("torch", "flwr", "ray", "pfl")
_HEAD = ("workload", "metric", "edgefl", "compared with", "its value", "ratio", "target", "accuracy of both")


def write_readme(rows: Sequence[Row], file: Path) -> None:
    """Replace the text between the markers; raises ValueError unless both occur once, in order."""
    text = file.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{file} must have {BEGIN} and, after it, {END}, once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    file.write_text(f"{before}{BEGIN}\n{_where()}\n\n{table(rows)}\n{END}{after}", encoding="utf-8")


def _where() -> str:
    said = machine()
    versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items() if name in _SHOWN)
    return f"On {said['cores']} cores ({said['cpu']}), {said['ram_gb']:.0f} GB, Python {said['python']}; {versions}."


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown; accuracies are in the rows of their rates."""
    accuracies = {(row.workload, row.rival): row for row in rows if row.metric.startswith("accuracy")}
    shown_rows = [_cells(row, accuracies) for row in rows if not row.metric.startswith("accuracy")]
    return "\n".join(_line(cells) for cells in (_HEAD, ["---"] * len(_HEAD), *shown_rows))


def _cells(row: Row, accuracies: Mapping[tuple[str, str | None], Row]) -> list[str]:
    measure = f"{row.metric}, {row.unit}".removesuffix(", 1/s")
    if row.skipped:
        return [row.workload, measure, shown(row.ours), row.rival or "", "not run", "", "", ""]
    met = "" if not row.targets else (" ✓" if row.met else " ✗")
    target = " and ".join(str(target) for target in row.targets).replace("ratio ", "").replace("ours ", "")
    same = accuracies.get((row.workload, row.rival)) if row.metric in _JUDGED else None
    both = f"{_percent(same.ours)} / {_percent(same.theirs)}" if same else ""
    ours, theirs, ratio = (shown(value) for value in (row.ours, row.theirs, row.ratio))
    return [row.workload, measure, ours, row.rival or "", theirs, ratio, f"{target}{met}", both]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
