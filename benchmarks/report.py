"""The report of a benchmark: rows with edgefl's value and the other system's, the machine, a table and JSON.

A ratio above 1 always means that edgefl is better. A row that could not be run says why in `skipped`
and has not met its target.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import click

VERSIONS = ("edgefl-fleet", "numpy", "grpcio", "torch", "onnxruntime", "aiomqtt", "flwr", "ray", "pfl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One bound to reach: for our value, or for the ratio to the other system's."""

    of: str  # "ours" or "ratio"
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.of not in {"ours", "ratio"} or (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self!r} needs of='ours' or 'ratio', and one of at_least and at_most")

    def __str__(self) -> str:
        return f"{self.of} >= {self.at_least:g}" if self.at_least is not None else f"{self.of} <= {self.at_most:g}"

    def reached(self, value: float | None) -> bool:
        """Whether a measured value is within the bound; False if it was not measured."""
        if value is None:
            return False
        return value >= self.at_least if self.at_least is not None else value <= float(self.at_most or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured quantity, for edgefl and another system."""

    workload: str
    metric: str
    unit: str
    ours: float | None = None
    rival: str | None = None  # name and version
    theirs: float | None = None
    limit: float | None = None  # the machine's limit: the lower bound
    targets: tuple[Target, ...] = ()  # all must be reached
    more_is_better: bool = False
    skipped: str | None = None
    detail: Mapping[str, object] = field(default_factory=dict)  # samples and other details

    @property
    def ratio(self) -> float | None:
        """How many times better our value is than the other system's."""
        if self.ours is None or self.theirs is None:
            return None
        better, worse = (self.ours, self.theirs) if self.more_is_better else (self.theirs, self.ours)
        return better / worse if worse else None

    @property
    def over_limit(self) -> float | None:
        """Our value divided by the limit."""
        return self.ours / self.limit if self.ours is not None and self.limit else None

    @property
    def met(self) -> bool:
        """Whether the row was measured and every target, if it has any, is reached."""
        values = {"ours": self.ours, "ratio": self.ratio}
        return self.skipped is None and all(target.reached(values[target.of]) for target in self.targets)

    def as_json(self) -> dict[str, object]:
        """Return the row as the public JSON shows it."""
        return {
            "workload": self.workload,
            "metric": self.metric,
            "unit": self.unit,
            "ours": self.ours,
            "rival": self.rival,
            "theirs": self.theirs,
            "limit": self.limit,
            "over_limit": self.over_limit,
            "ratio": self.ratio,
            "target": " and ".join(str(target) for target in self.targets) or None,
            "met": self.met,
            "skipped": self.skipped,
            "detail": dict(self.detail),
        }


class Measure(Protocol):
    """A benchmark module's function: yields its rows as they are measured."""

    def __call__(self, *, quick: bool) -> Iterable[Row]: ...


def median(samples: Iterable[float]) -> float | None:
    """Return the median, or None if there are no samples."""
    values = list(samples)
    return statistics.median(values) if values else None


def machine() -> dict[str, object]:
    """Describe the machine, without names of hosts or users and without paths."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
    }


def installed(package: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("workload", "metric", "rival", "ours", "theirs", "limit", "ours/limit", "ratio", "target", "met")
    for row in rows:
        numbers = (row.ours, row.theirs, row.limit, row.over_limit, row.ratio)
        met = ("yes" if row.met else "no") if row.targets else "-"
        target = " and ".join(str(target) for target in row.targets)
        table.add_row(
            row.workload, f"{row.metric}, {row.unit}", row.rival or "-", *(shown(n) for n in numbers), target, met
        )
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width)
    console.print(table)
    for row in rows:
        if row.skipped:
            console.print(f"skipped: {row.workload}, {row.metric}: {row.skipped}", soft_wrap=True, markup=False)


def shown(value: float | None) -> str:
    """Return a value with three significant figures, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_json(rows: Sequence[Row], file: str) -> None:
    """Write the report to a file, or to standard output for `-`."""
    text = json.dumps({"rows": [row.as_json() for row in rows], "machine": machine()}, indent=2, allow_nan=False)
    if file == "-":
        click.echo(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def command(measure: Measure, doc: str) -> click.Command:
    """Make a module's command line from its measure function. It exits with 1 if a row failed to run."""

    @click.command(help=doc)
    @click.option("--quick", is_flag=True, help="Fewer repeats; skips what takes minutes.")
    @click.option("--json", "json_file", metavar="FILE", help="Write the rows as JSON; - for standard output.")
    def main(json_file: str | None, *, quick: bool) -> None:
        signal.signal(signal.SIGTERM, leave)
        say(list(measure(quick=quick)), json_file, strict=not quick)

    return main


def say(rows: Sequence[Row], json_file: str | None, *, strict: bool) -> None:
    """Print the rows, and write them if a file is given; exit with 1 if `strict` and a row failed to run."""
    if json_file != "-":
        print_table(rows)
    if json_file is not None:
        write_json(rows, json_file)
    if strict and any(row.skipped for row in rows):
        sys.exit(1)


def leave(number: int, _frame: FrameType | None) -> None:
    """Exit by an exception, so that every started process is ended."""
    sys.exit(128 + number)
