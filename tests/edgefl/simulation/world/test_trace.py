"""Traces: what a line says, and which line is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.world.trace import TracedAvailability, read_trace

DAY_S = 86_400.0


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    table = write(tmp_path, "speed,rtt_s,available\n120,0,0-28800;79200-86400\n\n 30 ,0.1,\n")
    lines = write(
        tmp_path,
        '{"speed": 120, "rtt_s": 0, "available": [[0, 28800], [79200, 86400]]}\n\n'
        '{"speed": 30.0, "rtt_s": 0.1, "available": null}\n',
        "trace.jsonl",
    )
    first, second = read_trace(table, DAY_S)
    assert read_trace(lines, DAY_S) == (first, second)
    assert first.numbers == {"speed": 120.0, "rtt_s": 0.0}
    assert first.windows == ((0.0, 28800.0), (79200.0, 86400.0))
    assert second.windows is None


def test_windows_repeat_and_go_over_midnight(tmp_path: Path) -> None:
    file = write(tmp_path, "available\n0-28800;79200-86400\n3600-7200\n0-86400\n\n")
    there = TracedAvailability(read_trace(file, DAY_S), DAY_S)
    there.spend(0, 0.0, 1.0)
    assert there.available(np.arange(6), 5000.0).tolist() == [True] * 6
    assert there.available(np.arange(6), 40_000.0).tolist() == [False, False, True] * 2  # client i is line i mod 3
    assert there.until_s(0, 80_000.0) == DAY_S + 28800
    assert there.until_s(4, DAY_S + 5000.0) == DAY_S + 7200
    assert there.until_s(1, 40_000.0) == 40_000.0
    assert there.until_s(2, 1.0) == math.inf


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("speed\nfast\n", ":2: speed='fast'; expected a finite number, above 0"),
        ("speed,rtt_s\n1,1\n\n0,1\n", ":4: speed='0'"),
        ("speed,rtt_s\n1,-1\n", ":2: rtt_s='-1'; expected a finite number, 0 or more"),
        ("speed\nnan\n", ":2: speed='nan'"),
        ("speed\ninf\n", ":2: speed='inf'"),
        ("speed,rtt_s\n1\n", ":2: 1 values; the header has 2 columns"),
        ("speed,colour\n1,red\n", ":1: the header is 'speed,colour'; expected"),
        ("speed,speed\n1,1\n", ":1: the header"),
        ("available\n5-3\n", ":2: available='5-3'; expected windows"),
        ("available\n1-5;4-9\n", ":2: available"),
        ("available\n0-90000\n", ":2: available"),
        ("available\nnight\n", ":2: available"),
        ("speed\n", "has no devices"),
        ("", "has no devices"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        read_trace(write(tmp_path, text), DAY_S)
    assert str(tmp_path / "trace.csv") in str(caught.value)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: a JSON list; expected one object per line"),
        ('{"speeed": 1}', r":2: unknown keys \['speeed'\]; known are: speed"),
        ('{"speed": true}', ":2: speed=True"),
        ('{"speed": [1]}', r":2: speed=\[1\]"),
        ('{"available": [[1]]}', ":2: available"),
        ('{"available": 7}', ":2: available"),
        ('{"available": []}', ":2: available"),
        ("[" * 100_000, ":2: not JSON"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        read_trace(write(tmp_path, f'{{"speed": 1}}\n{line}\n', "t.jsonl"), DAY_S)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "binary"):
        with pytest.raises(ConfigError, match="cannot read the trace"):
            read_trace(tmp_path / name, DAY_S)
