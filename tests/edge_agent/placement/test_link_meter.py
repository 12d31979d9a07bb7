"""Rates and loads by hand."""

from __future__ import annotations

import pytest

from edge_agent.placement.link_meter import MOST_MBPS, WEIGHT, LinkMeter


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
    assert meter.link.up_mbps == pytest.approx(20 + WEIGHT * (10 - 20))
    assert str(meter) == "18 Mbit/s, 31 ms"


def test_a_call_that_took_no_time_is_no_infinite_rate() -> None:
    meter = LinkMeter()
    meter.note_ping(5)
    meter.note_call(10**9, 1, 1)
    assert meter.link.up_mbps == MOST_MBPS


def test_loads_follow_what_is_measured() -> None:
    meter = LinkMeter()
    meter.note_device(30, 10)
    assert meter.device_load == pytest.approx(2)  # between what was expected and what was seen
    meter.note_device(40, 10)
    assert meter.device_load == pytest.approx((1 + 3 + 4) / 3)
    for _ in range(50):
        meter.note_device(20, 10)
        meter.note_cloud(5, 10)
        meter.note_device(7, 0)  # nothing was expected: it says nothing
    assert meter.device_load == pytest.approx(2, abs=0.01)
    assert meter.cloud_load == pytest.approx(0.5, abs=0.01)
