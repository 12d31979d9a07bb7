"""What the device says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from edge_agent.resources import default_memory_limit_mb, measure
from edgefl.protocols.messages import Telemetry, decode, encode


def test_figures_make_sense_and_travel(tmp_path):
    seen = measure(tmp_path)
    assert seen.cpu_count >= 1
    assert 0 <= seen.cpu_percent <= 100 * seen.cpu_count
    assert 0 < seen.ram_available_mb <= seen.ram_total_mb
    assert seen.disk_free_mb > 0
    assert decode(Telemetry, encode(seen)) == seen


@pytest.mark.parametrize("battery", [None, (80, 3600, False)])
def test_a_battery_where_there_is_one(tmp_path, monkeypatch, battery):
    answer = battery and SimpleNamespace(percent=battery[0], secsleft=battery[1], power_plugged=battery[2])
    monkeypatch.setattr(psutil, "sensors_battery", lambda: answer, raising=False)
    seen = measure(tmp_path)
    assert (seen.battery_percent, seen.on_mains) == ((80.0, False) if battery else (None, None))


def test_the_trainer_may_have_three_quarters():
    total_mb = psutil.virtual_memory().total / 2**20
    assert 0.7 * total_mb < default_memory_limit_mb() < 0.8 * total_mb
