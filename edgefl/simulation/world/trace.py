"""Traces of real devices: one device per line, as CSV with a header, or one JSON object per line.

    speed,memory_mb,downlink_mbps,uplink_mbps,rtt_s,available
    120,4096,50,10,0.05,0-28800;79200-86400

Any column may be missing or a value empty: then the configured spread is used. `available` lists windows
in seconds of a period; in JSON a list of [start, end]. Client i is line i modulo the number of lines.
Invariant: every line of a trace is valid, or ConfigError names file and line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError
from edgefl.simulation.world.availability import Mask
from edgefl.simulation.world.draws import Indices

NUMBERS = ("speed", "memory_mb", "downlink_mbps", "uplink_mbps", "rtt_s")
MAY_BE_ZERO = ("rtt_s",)
COLUMNS = (*NUMBERS, "available")

Windows = tuple[tuple[float, float], ...]  # seconds of a period, in order, not overlapping


@dataclass(frozen=True, slots=True)
class TracedDevice:
    """The values of one line; missing values are absent."""

    numbers: Mapping[str, float]
    windows: Windows | None


def read_trace(file: Path, period_s: float) -> tuple[TracedDevice, ...]:
    """Read a trace; raises ConfigError with file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read the trace {file}: {cause}") from cause
    rows = _json_rows if file.suffix in {".jsonl", ".json", ".ndjson"} else _csv_rows
    devices = []
    for line, row in rows(file, text):
        try:
            devices.append(_device(row, period_s))
        except ValueError as cause:
            raise ConfigError(f"{file}:{line}: {cause}") from cause
    if not devices:
        raise ConfigError(f"the trace {file} has no devices; expected one line per device with: {', '.join(COLUMNS)}")
    return tuple(devices)


class TracedAvailability:
    """The windows of a trace, repeated each period; a device without windows is always available."""

    def __init__(self, devices: tuple[TracedDevice, ...], period_s: float) -> None:
        self._devices, self._period_s = devices, period_s

    def available(self, indices: Indices, now_s: float) -> Mask:
        lines = np.asarray(indices) % len(self._devices)
        there = {line: self._window(line, now_s) is not None for line in np.unique(lines).tolist()}
        return np.array([there[line] for line in lines.tolist()], np.bool_)

    def until_s(self, index: int, now_s: float) -> float:
        end_s = self._window(index % len(self._devices), now_s)
        return now_s if end_s is None else end_s

    def spend(self, index: int, start_s: float, training_s: float) -> None:
        """Do nothing: a trace already includes the effect of batteries."""

    def _window(self, line: int, now_s: float) -> float | None:
        """Return when the current window ends."""
        windows = self._devices[line].windows
        if windows is None:
            return math.inf
        periods, into_s = divmod(now_s, self._period_s)
        for start_s, end_s in windows:
            if start_s <= into_s < end_s:
                over_midnight = end_s == self._period_s and windows[0][0] == 0 and len(windows) > 1
                ends_s = end_s + windows[0][1] if over_midnight else end_s
                always = (start_s, end_s) == (0, self._period_s)
                return math.inf if always else periods * self._period_s + ends_s
        return None


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(text.splitlines())
    header = [name.strip() for name in next(reader, [])]
    if len(set(header) & set(COLUMNS)) < len(header):
        raise ConfigError(
            f"{file}:1: the header is {','.join(header)!r}; expected some of these columns, each once: "
            f"{', '.join(COLUMNS)}"
        )
    for row in reader:
        if not any(value.strip() for value in row):
            continue
        if len(row) != len(header):
            raise ConfigError(f"{file}:{reader.line_num}: {len(row)} values; the header has {len(header)} columns")
        yield reader.line_num, {name: value.strip() for name, value in zip(header, row, strict=True) if value.strip()}


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as cause:
            raise ConfigError(f"{file}:{number}: not JSON: {cause}; expected one object per line") from cause
        if not isinstance(row, dict):
            raise ConfigError(f"{file}:{number}: a JSON {type(row).__name__}; expected one object per line")
        if unknown := sorted(set(row) - set(COLUMNS)):
            raise ConfigError(f"{file}:{number}: unknown keys {unknown}; known are: {', '.join(COLUMNS)}")
        yield number, {name: value for name, value in row.items() if value is not None}


def _device(row: Mapping[str, Any], period_s: float) -> TracedDevice:
    numbers = {name: _number(name, row[name]) for name in NUMBERS if name in row}
    return TracedDevice(numbers, _windows(row["available"], period_s) if "available" in row else None)


def _number(name: str, value: Any) -> float:
    wanted = "0 or more" if name in MAY_BE_ZERO else "above 0"
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number < math.inf) or (number == 0 and name not in MAY_BE_ZERO):
        raise ValueError(f"{name}={value!r}; expected a finite number, {wanted}")
    return number


def _windows(value: Any, period_s: float) -> Windows:
    wanted = f"expected windows start-end, in order, apart, within 0..{period_s:g}, such as 0-28800;79200-86400"
    try:
        pairs = [one.split("-") for one in value.split(";")] if isinstance(value, str) else list(value)
        windows = tuple((float(start), float(end)) for start, end in pairs)
    except (TypeError, ValueError) as cause:
        raise ValueError(f"available={value!r}; {wanted}") from cause
    edges = [edge for window in windows for edge in window]
    rising = all(before < after for before, after in pairwise(edges))
    if not edges or not rising or not (edges[0] >= 0 and edges[-1] <= period_s):
        raise ValueError(f"available={value!r}; {wanted}")
    return windows
