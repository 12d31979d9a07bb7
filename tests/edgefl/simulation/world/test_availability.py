"""Who is there when: a window a period, a battery that training empties, and the promise of `until_s`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.world.availability import AvailabilityConfig, Battery, Diurnal, make_availability

HOUR_S = 3600.0
ALL = np.arange(2000)


def test_always_there() -> None:
    one = make_availability(AvailabilityConfig(), 0)
    one.spend(0, 0.0, 1e9)
    assert one.available(ALL, 1e12).all()
    assert one.until_s(3, 5.0) == math.inf


def test_a_window_around_three_at_night_by_hand() -> None:
    night = Diurnal(AvailabilityConfig(kind="diurnal", scatter=0.0, share=0.25), 0)  # 0:00 to 6:00
    for hour, there in ((0, True), (5.9, True), (6, False), (23.9, False), (24, True), (72, True)):
        assert night.available(ALL[:2], hour * HOUR_S).tolist() == [there, there]
    assert night.until_s(0, 2 * HOUR_S) == 6 * HOUR_S
    assert night.until_s(0, 26 * HOUR_S) == 30 * HOUR_S


def test_fewer_are_there_by_day_and_evenly_many_where_they_are_scattered() -> None:
    def share(hour: float, scatter: float) -> float:
        one = make_availability(AvailabilityConfig(kind="diurnal", scatter=scatter), 4)
        return float(one.available(ALL, hour * HOUR_S).mean())

    assert share(3, 0.25) == 1 > share(8, 0.25) > share(13, 0.25) == 0
    for hour in (3, 8, 13):
        assert share(hour, 1.0) == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("kind", ["diurnal", "battery"])
def test_who_is_there_stays_until_then(kind: str) -> None:
    one = make_availability(AvailabilityConfig(kind=kind, scatter=1.0), 2)
    for now_s in np.linspace(0, 200_000, 40):
        for index in np.flatnonzero(one.available(ALL[:40], now_s)).tolist():
            until_s, own = one.until_s(index, now_s), np.array([index])
            assert until_s > now_s
            for share in (0.01, 0.5, 0.99):
                assert one.available(own, now_s + share * (until_s - now_s))[0]
            assert not one.available(own, until_s + 1)[0]


def test_a_battery_by_hand() -> None:
    settings = AvailabilityConfig(kind="battery", scatter=0.0, share=0.25, low=0.1, min_level=0.55, drain_per_hour=0.3)
    battery, own = Battery(settings, 0), np.array([0])
    assert battery.until_s(0, 0.0) == pytest.approx(15 * HOUR_S)  # full at 6:00; 0.9 in 18 hours: 0.55 at 15:00
    assert battery.available(own, 14 * HOUR_S)[0]
    assert not battery.available(own, 16 * HOUR_S)[0]
    battery.spend(0, 8 * HOUR_S, HOUR_S)  # 0.3 of 0.45 gone: 3 hours are left of the 9
    assert battery.until_s(0, 8.5 * HOUR_S) == pytest.approx(9 * HOUR_S)
    assert not battery.available(own, 10 * HOUR_S)[0]
    assert battery.available(np.array([1]), 10 * HOUR_S)[0]  # another's
    assert battery.available(own, 38 * HOUR_S)[0]  # charged since
    battery.spend(0, 26 * HOUR_S, 100 * HOUR_S)  # on the charger: free
    assert battery.available(own, 38 * HOUR_S)[0]


def test_open_all_day_or_never_run_down() -> None:
    for kind in ("diurnal", "battery"):
        assert make_availability(AvailabilityConfig(kind=kind, share=1.0), 0).until_s(1, 5.0) == math.inf
    lasting = Battery(AvailabilityConfig(kind="battery", low=1.0), 0)
    assert lasting.available(ALL, 12 * HOUR_S).all()


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"kind": "sometimes"}, "kind='sometimes' is not one of: always"),
        ({"dropout": 1.5}, "dropout=1.5 must be in 0..1"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"share": 0.0}, "share=0.0 must be above 0"),
        ({"period_s": 0.0}, "period_s"),
        ({"period_s": math.inf}, "period_s"),
        ({"centre_s": math.nan}, "centre_s"),
        ({"drain_per_hour": -1.0}, "drain_per_hour"),
    ],
)
def test_what_cannot_be_is_refused(told: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        AvailabilityConfig(**told)
