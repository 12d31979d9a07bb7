"""The switch's arithmetic: when a frame has left a link."""

from __future__ import annotations

import pytest

from benchmarks.network.switch import Port


def test_frames_follow_each_other_at_the_link_s_rate() -> None:
    port = Port("a", -1, delay_s=0.01, mbps=8)  # a byte in a microsecond
    assert port.through_s("up", 100.0, 1000) == pytest.approx(100.011)
    assert port.through_s("up", 100.0, 1000) == pytest.approx(100.012)  # behind the first one
    assert port.through_s("down", 100.0, 1000) == pytest.approx(100.011)  # the other direction is free
    assert port.through_s("up", 200.0, 1000) == pytest.approx(200.011)


def test_a_link_without_a_rate_only_delays() -> None:
    port = Port("a", -1, delay_s=0.01)
    assert [port.through_s("up", 5.0, 10**6) for _ in range(2)] == [5.01, 5.01]
