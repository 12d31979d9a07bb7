"""When devices are expected: by hand, and what misses and strangers change."""

from __future__ import annotations

import json

import pytest

from edgefl.exchange import Durations, Expectation


def learnt(*rounds: dict[str, float]) -> Durations:
    durations = Durations()
    for took_s in rounds:
        durations.learn(took_s, {})
    return durations


def late_s(durations: Durations, device: str) -> float:
    return durations.expected([device])[device].late_s


def test_expectations_by_hand() -> None:
    # first: mean 8, deviation 2 * 0.75 (the first is no deviation from itself); late after 8 + 4 * 1.5
    assert learnt({"a": 8.0}).expected(["a"]) == {"a": Expectation(8.0, 8.0, 14.0)}
    # then: |12 - 8| = 4; deviation 1.5 + (4 - 1.5) / 4 = 2.125; mean 8 + 4 / 4 = 9; late after 9 + 4 * 2.125
    assert learnt({"a": 8.0}, {"a": 12.0}).expected(["a"]) == {"a": Expectation(9.0, 9.0, 17.5)}


def test_a_steady_device_is_expected_when_it_always_comes() -> None:
    assert late_s(learnt(*[{"a": 10.0}] * 40), "a") == pytest.approx(10.0, abs=0.01)


def test_a_late_device_has_half_the_chance_in_as_much_time_again_up_to_twice_the_usual() -> None:
    first = Expectation(10.0, 10.0, 12.0)
    late = first.later()
    assert late == Expectation(12.0, 10.0, 12.0)
    second = late.later()
    assert second == Expectation(14.0, 10.0, 12.0, 0.5)
    assert second.later() == Expectation(18.0, 10.0, 12.0, 0.25)
    assert Expectation(18.0, 10.0, 12.0, 0.25).later() is None  # 26 s are more than twice 10
    assert Expectation(10.0, 10.0, 10.0).later() is None  # it never takes longer


def test_of_nobody_nothing_is_known_and_strangers_are_as_slow_as_the_slowest() -> None:
    assert Durations().expected(["a", "b"]) == {}
    durations = learnt({"a": 8.0, "b": 4.0})
    assert (late_s(durations, "b"), late_s(durations, "z")) == (7.0, 14.0)


def test_a_device_that_misses_is_expected_later_and_later_until_it_answers() -> None:
    durations = learnt({"a": 8.0, "b": 8.0})
    durations.learn({"b": 8.0}, {"a": 15.0})
    assert late_s(durations, "a") == 28.0
    durations.learn({}, {"a": 30.0})
    assert late_s(durations, "a") == 56.0
    assert late_s(durations, "z") <= 14.0  # it makes nobody else slow
    durations.learn({"a": 8.0}, {})
    assert late_s(durations, "a") <= 14.0


def test_a_device_that_was_given_up_before_its_time_did_not_miss() -> None:
    durations = learnt({"a": 8.0})
    durations.learn({}, {"a": 13.9})
    assert late_s(durations, "a") == 14.0


def test_a_device_that_never_answered_is_expected_after_what_it_had() -> None:
    durations = Durations()
    durations.learn({"b": 1.0}, {"a": 600.0})
    assert durations.expected(["a"]) == {"a": Expectation(600.0, 600.0, 600.0)}


def test_durations_survive_json() -> None:
    durations = learnt({"a": 8.0, "b": 1 / 3}, {"a": 9.7})
    durations.learn({}, {"b": 100.0, "c": 100.0})
    again = Durations.from_json(json.loads(json.dumps(durations.as_json())))
    names = ["a", "b", "c", "z"]
    assert again.expected(names) == durations.expected(names)
    for one in (again, durations):
        one.learn({"a": 1.0, "b": 2.0}, {"c": 300.0})
    assert again.expected(names) == durations.expected(names)
