"""Devices among jobs: exclusive, in the order of priority and fair shares, without starvation."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.jobs.device_shares import DeviceShares, Wait
from edgefl.testing import ManualClock

ALL = ["a", "b", "c", "d"]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def shares(clock):
    return DeviceShares(clock)


def turns(shares, clock, jobs, count, num_rounds, seconds=1.0):
    """Let jobs ask for `count` of all devices all the time; return who got a round, in order."""
    got = []
    for _ in range(num_rounds):
        for job in jobs:
            answer = shares.ask(job, ALL, count)
            if not isinstance(answer, Wait):
                got.append(job)
                shares.keep(job, answer[:count])
                clock.advance(seconds)
                shares.release(job)
                break
        else:
            pytest.fail("nobody got a round")
    return got


def test_a_device_works_for_one_job_and_is_free_when_it_has_answered(shares, clock):
    for job in ("one", "two"):
        shares.enter(job)
    assert shares.ask("one", ALL, 3) == ALL
    shares.keep("one", ["a", "b", "c"])
    assert shares.ask("two", ALL, 2) == Wait(1, ("one",), 1)
    assert shares.ask("two", ALL, 2).text() == "waiting for 1 device that works for one; position 1 in the queue"
    clock.advance(1.0)
    shares.release("one", ["a"])  # which costs it a second: `two` is first now
    assert shares.ask("two", ALL, 2) == ["a", "d"]
    assert [shares.holder(device) for device in ALL] == ["two", "one", "one", "two"]
    shares.leave("one")
    assert [shares.holder(device) for device in ALL] == ["two", None, None, "two"]


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), (30, 30)), ((2, 1), (40, 20)), ((1, 5), (10, 50))])
def test_shares_follow_the_weights(shares, clock, weights, expected):
    for job, weight in zip(("one", "two"), weights, strict=True):
        shares.enter(job, weight=weight)
    shares.ask("two", ALL, 4) and shares.release("two")  # both have said what they want
    got = turns(shares, clock, ("one", "two"), 4, 60)
    assert abs(got.count("one") - expected[0]) <= 2


def test_a_higher_priority_has_every_round_until_it_leaves(shares, clock):
    shares.enter("low")
    shares.enter("high", priority=1)
    shares.ask("high", ALL, 4) and shares.release("high")
    assert set(turns(shares, clock, ("low", "high"), 4, 10)) == {"high"}
    shares.leave("high")
    assert set(turns(shares, clock, ("low",), 4, 3)) == {"low"}


def test_devices_that_have_answered_are_kept_for_the_next_round_of_a_higher_priority(shares, clock):
    shares.enter("low")
    shares.enter("high", priority=1)
    assert shares.ask("high", ALL, 4) == ALL
    shares.keep("high", ALL)
    clock.advance(1.0)
    shares.release("high", ALL)  # its round is still open: it folds and steps
    assert shares.ask("low", ALL, 1) == Wait(1, ("high",), 1)


def test_a_job_that_wants_many_is_not_starved_by_one_that_wants_few(shares, clock):
    shares.enter("few")
    shares.enter("many")
    assert shares.ask("few", ALL, 1) == ALL
    shares.keep("few", ["a"])
    clock.advance(1.0)
    assert isinstance(shares.ask("many", ALL, 4), Wait)
    shares.release("few")
    assert shares.ask("few", ALL, 1) == Wait(1, ("many",), 2)
    assert shares.ask("many", ALL, 4) == ALL


def test_a_newcomer_does_not_catch_up_on_the_past(shares, clock):
    shares.enter("old")
    turns(shares, clock, ("old",), 4, 10)
    shares.enter("new")
    shares.ask("new", ALL, 4) and shares.release("new")
    got = turns(shares, clock, ("new", "old"), 4, 10)
    assert 4 <= got.count("old") <= 6


def test_a_job_that_lacks_absent_devices_reserves_nothing(shares):
    shares.enter("one")
    shares.enter("two")
    assert shares.ask("one", ALL, 4) == ALL
    shares.release("one")
    assert isinstance(shares.ask("two", ALL, 1), Wait)  # `one` is between two rounds, and first
    shares.rest("one")
    assert shares.ask("two", ALL, 1) == ALL


def test_a_cohort_from_before_a_restart_gets_its_devices_back(shares):
    shares.enter("one")
    shares.keep("one", ["a", "b"])
    shares.enter("two")
    assert shares.ask("two", ALL, 3) == Wait(1, ("one",), 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=60))
def test_no_device_has_two_jobs_and_the_first_in_order_always_gets_on(steps):
    clock = ManualClock()
    shares, working = DeviceShares(clock), dict[str, set[str]]()
    for number in range(4):
        shares.enter(f"job-{number}", priority=number % 2)
    for number, count, is_release in steps:
        job = f"job-{number}"
        clock.advance(1.0)
        if is_release or job in working:
            shares.release(job)
            working.pop(job, None)
        elif not isinstance(answer := shares.ask(job, ALL, count), Wait):
            shares.keep(job, answer[:count])
            working[job] = set(answer[:count])
        for one, other in itertools.combinations(working.values(), 2):
            assert not one & other
    for job in working:
        shares.release(job)
    answers = [shares.ask(f"job-{number}", ALL, 1) for number in range(4)]
    assert any(not isinstance(answer, Wait) for answer in answers)
