"""Rates and loads by hand."""

from __future__ import annotations

import pytest

from edge_agent.placement.link_meter import MOST_MBPS, LinkMeter


def test_nothing_is_known_before_it_is_measured() -> None:
    meter = LinkMeter()
    meter.note_call(1_000_000, 900, 100)  # without a ping, its time cannot be divided
    assert meter.link is None
    assert str(meter) == ""


def test_what_is_left_of_a_call_is_spent_on_its_bytes() -> None:
    meter = LinkMeter()
    for ping in (30, 31, 500):
        meter.note_ping(ping)
    meter.note_call(125_000, 31 + 50 + 9, 9)  # a megabit in 50 ms
    link = meter.link
    assert (link.up_mbps, link.down_mbps, link.rtt_ms) == (pytest.approx(20), pytest.approx(20), 31)
    meter.note_call(125_000, 31 + 100, 0)
    assert meter.link.up_mbps == pytest.approx(2 / (0.05 + 0.1))  # two megabits in 150 ms
    assert str(meter) == "13.3 Mbit/s, 31 ms"


def test_a_call_counts_by_its_bytes() -> None:
    meter = LinkMeter()
    meter.note_ping(10)
    meter.note_call(125_000, 10 + 50, 0)
    meter.note_call(100, 10 + 3, 0)  # 0.3 Mbit/s, if it were all that is known
    assert meter.link.up_mbps == pytest.approx(1.0008 / 0.053)


def test_a_first_call_that_took_no_time_is_soon_forgotten() -> None:
    meter = LinkMeter()
    meter.note_ping(100)  # of a busy moment
    meter.note_call(125_000, 60, 0)
    for _ in range(5):
        meter.note_ping(10)
    assert meter.link.up_mbps == MOST_MBPS
    for share in (1 / 2, 2 / 3, 3 / 4, 4 / 5, 0.84):
        meter.note_call(125_000, 60, 0)
        assert meter.link.up_mbps == pytest.approx(20 / share, rel=0.01)


def test_a_call_that_took_no_time_is_no_infinite_rate() -> None:
    meter = LinkMeter()
    meter.note_ping(5)
    meter.note_call(10**9, 1, 1)
    assert meter.link.up_mbps == MOST_MBPS


def test_loads_are_medians_of_what_is_measured() -> None:
    meter = LinkMeter()
    assert meter.device_load == 1
    meter.note_device(200, 10)  # a first run
    assert meter.device_load == 1
    meter.note_device(20, 10)
    assert meter.device_load == 1.5  # of 1, 1, 2, 20
    meter.note_device(20, 10)
    assert meter.device_load == 2
    for _ in range(7):
        meter.note_device(30, 10)
        meter.note_cloud(5, 10)
        meter.note_device(7, 0)  # nothing was expected: it says nothing
    assert (meter.device_load, meter.cloud_load) == (3, 0.5)
