"""Delays between attempts, by hand."""

import pytest

from edgefl.protocols.backoff import Backoff


def test_delays_double_up_to_the_limit_and_begin_anew_after_a_success():
    backoff = Backoff(0.2, 2.0)
    assert [backoff.next_s() for _ in range(5)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 2.0])
    backoff.reset()
    assert backoff.next_s() == pytest.approx(0.2)


def test_where_there_is_no_place_they_are_longer():
    backoff = Backoff(0.2, 2.0)
    backoff.next_s()
    assert [backoff.next_s(full=True) for _ in range(5)] == pytest.approx([5, 10, 20, 40, 60])
    assert backoff.next_s() == 2.0


def test_a_fleet_is_spread_over_the_first_delay():
    delays = [Backoff(1.0, 2.0, f"cam-{number}").next_s() for number in range(100)]
    assert min(delays) < 1.2
    assert max(delays) > 1.8
    assert all(1 <= one <= 2 for one in delays)
    full = [Backoff(1.0, 2.0, f"cam-{number}") for number in range(100)]
    last = [[one.next_s(full=True) for _ in range(9)][-1] for one in full]
    assert 60 <= min(last) < 72
    assert 108 < max(last) <= 120
