"""Devices: the same machine whenever it is asked for, and a cohort that costs what it is."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgefl.config import from_dict
from edgefl.errors import ConfigError
from edgefl.simulation.world.devices import Devices, DevicesConfig, SimulatedDevice
from edgefl.simulation.world.names import Names

NIGHTLY = {"availability": {"kind": "diurnal", "scatter": 1.0}}


def devices(count: int, seed: int = 0, **settings: Any) -> Devices:
    return Devices(from_dict(DevicesConfig, settings), Names(count), seed)


def test_seconds_on_the_network_by_hand() -> None:
    device = SimulatedDevice(speed=50.0, memory_mb=1.0, downlink_mbps=8.0, uplink_mbps=2.0, rtt_s=0.5)
    assert device.compute_s(300) == 6.0
    assert device.download_s(2_000_000) == 2.5  # 16 Mbit at 8 Mbit/s
    assert device.upload_s(2_000_000) == 8.5


def test_a_device_is_the_same_whenever_it_is_asked_for() -> None:
    speed = {"kind": "lognormal", "mean": 200.0, "std": 100.0}
    fleet, again = (devices(1000, speed=speed) for _ in range(2))
    ahead = [fleet.device(name) for name in fleet.names[:5]]
    assert [again.device(name) for name in reversed(again.names[:5])] == ahead[::-1]
    assert len({device.speed for device in ahead}) == 5
    assert devices(1000, seed=1, speed=speed).device("client-000") != ahead[0]


def test_a_spread_that_reaches_zero_makes_no_endless_device() -> None:
    fleet = devices(200, speed={"kind": "normal", "mean": 1.0, "std": 5.0})
    assert min(fleet.device(name).speed for name in fleet.names) == 1e-3


def test_a_trace_goes_before_the_spreads(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("speed,available\n7,\n9,0-10\n")
    fleet = devices(4, speed={"mean": 50.0}, rtt_s={"mean": 0.25}, trace=str(tmp_path / "trace.csv"))
    assert [fleet.device(name).speed for name in fleet.names] == [7.0, 9.0, 7.0, 9.0]
    assert fleet.device("client-0").rtt_s == 0.25
    assert fleet.available(20.0, wanted=0, round_number=1) == ["client-0", "client-2"]
    assert fleet.until_s("client-1", 5.0) == 10.0


def test_drop_outs_come_as_often_as_told_and_anew_each_round() -> None:
    fleet = devices(2000, availability={"dropout": 0.3})
    first, second = ([fleet.drops_out(name, number) for name in fleet.names] for number in (1, 2))
    lost = [share for share in first if share is not None]
    assert len(lost) / 2000 == pytest.approx(0.3, abs=0.05)
    assert all(0 < share < 1 for share in lost)
    assert first != second
    assert devices(5).drops_out("client-0", 1) is None


def test_delays_are_drawn_anew_each_round() -> None:
    fleet = devices(5, delay_s={"kind": "normal", "mean": 10.0, "std": 1.0})
    assert fleet.delay_s("client-0", 1) == fleet.delay_s("client-0", 1) != fleet.delay_s("client-0", 2)


def test_of_few_all_that_are_there_and_of_many_as_many_as_wanted() -> None:
    few, many = devices(900, **NIGHTLY), devices(100_000, **NIGHTLY)
    assert 200 < len(few.available(0.0, wanted=10, round_number=1)) < 400
    chosen = many.available(0.0, wanted=10, round_number=1)
    assert len(chosen) == 10
    assert chosen == sorted(set(chosen))
    assert all(many.until_s(name, 0.0) > 0.0 for name in chosen)
    assert chosen == many.available(0.0, wanted=10, round_number=1) != many.available(0.0, wanted=10, round_number=2)
    assert len(many.available(0.0, wanted=0, round_number=1)) == pytest.approx(100_000 / 3, rel=0.05)


def test_where_too_few_are_there_all_of_them_are_found() -> None:
    asleep = devices(30_000, availability={"kind": "diurnal", "scatter": 1.0, "share": 0.001})
    found = asleep.available(0.0, wanted=500, round_number=1)
    assert found == asleep.available(0.0, wanted=0, round_number=1)
    assert 0 < len(found) < 100


def test_a_million_devices_cost_what_the_cohort_costs() -> None:
    def seconds(count: int) -> float:
        start = time.perf_counter()
        fleet = devices(count, speed={"kind": "lognormal", "mean": 9.0, "std": 3.0}, **NIGHTLY)
        for number in range(10):
            for name in fleet.available(0.0, wanted=100, round_number=number):
                fleet.device(name)
        return time.perf_counter() - start

    few, many = (min(seconds(count) for _ in range(3)) for count in (1000, 1_000_000))
    assert many < 2 * few + 0.05
    tracemalloc.start()
    seconds(1_000_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_machine_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"population.devices.speed.mean=0 must be above 0"):
        from_dict(DevicesConfig, {"speed": {}})
    with pytest.raises(ConfigError, match="uplink"):
        from_dict(DevicesConfig, {"uplink": {"mean": 1.0}})
