"""The breaker's states by hand, with a clock of the test's own."""

from __future__ import annotations

import random

from edge_agent.placement.breaker import CLOSED, HALF_OPEN, OPEN, BreakerRules, CircuitBreaker


def make(seed=1, **rules):
    return CircuitBreaker(BreakerRules(**rules), random.Random(seed))


def test_three_failures_in_a_row_open_it_and_a_success_starts_anew() -> None:
    breaker = make()
    for _ in range(2):
        breaker.failed(0.0, "lost")
    breaker.succeeded()
    for _ in range(2):
        breaker.failed(0.0, "lost")
    assert (breaker.state, breaker.allows) == (CLOSED, True)
    breaker.failed(0.0, "lost again")
    assert (breaker.state, breaker.allows, breaker.reason) == (OPEN, False, "lost again")


def test_what_would_fail_again_opens_it_at_once() -> None:
    breaker = make()
    breaker.failed(0.0, "another release", at_once=True)
    assert breaker.state == OPEN


def test_one_probe_at_a_time_and_twice_the_delay_after_each_failure() -> None:
    breaker = make(first_s=1.0, most_s=4.0)
    breaker.failed(0.0, "lost", at_once=True)
    now_s, waits_s = 0.0, []
    for _ in range(5):
        begun_s = now_s
        while not breaker.takes_probe(now_s):
            now_s += 0.01
        waits_s.append(now_s - begun_s)
        assert breaker.state == HALF_OPEN
        assert not breaker.allows
        assert not breaker.takes_probe(now_s + 100)
        breaker.failed(now_s, "still lost")
    for waited_s, delay_s in zip(waits_s, (1.0, 2.0, 4.0, 4.0, 4.0), strict=True):
        assert 0.5 * delay_s <= waited_s <= 1.5 * delay_s + 0.02
    assert breaker.takes_probe(now_s + 100)
    breaker.succeeded()
    assert (breaker.state, breaker.reason) == (CLOSED, "")
    breaker.failed(0.0, "lost", at_once=True)
    assert breaker.takes_probe(1.51)  # the first delay again


def test_requests_that_were_on_their_way_do_not_prolong_it() -> None:
    breaker = make(first_s=1.0)
    breaker.failed(0.0, "lost", at_once=True)
    for _ in range(100):
        breaker.failed(1.0, "lost")
    assert breaker.takes_probe(1.51)


def test_a_fleet_s_devices_do_not_return_at_once() -> None:
    """A thousand breakers that open at the same time probe at times that are spread over the whole interval."""
    due = []
    for seed in range(1000):
        breaker = make(seed)
        breaker.failed(0.0, "lost", at_once=True)
        due.append(next(step for step in range(200) if breaker.takes_probe(step / 100)))
    assert max(due.count(one) for one in set(due)) < 40
    assert min(due) < 60
    assert max(due) > 140
