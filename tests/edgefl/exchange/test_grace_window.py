"""The grace window by hand and by law: it begins with the quorum, and ends when waiting no longer pays."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefl.config import RoundsConfig
from edgefl.errors import ConfigError
from edgefl.exchange import (
    Admitted,
    Answered,
    Back,
    Begin,
    Close,
    Durations,
    Event,
    Exchange,
    Expectation,
    GiveUp,
    GiveUpReason,
    Instruction,
    Offline,
    Paused,
    Resumed,
    Terms,
    Tick,
    Withdrawn,
    Yield,
)
from tests.edgefl.exchange.traces import Trace, law, run, traces


def expected(**late_s: float) -> dict[str, Expectation]:
    """Return expectations of devices that are never late."""
    return {device: Expectation(seconds, seconds, seconds) for device, seconds in late_s.items()}


AUTO = Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=2, expected=expected(a=10.0, b=10.0, c=11.0, d=40.0))


def begun(terms: Terms) -> Exchange:
    exchange = Exchange("abcd", terms)
    exchange.handle(Begin(at_s=0.0))
    return exchange


def admitted(exchange: Exchange, at_s: float, *devices: str) -> list[Instruction]:
    return exchange.handle(*(kind(one, at_s=at_s) for one in devices for kind in (Answered, Admitted)))


def test_a_fixed_window_begins_when_the_quorum_is_admitted() -> None:
    exchange = begun(Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=2, grace_s=3.0))
    exchange.handle(Answered("a", at_s=1.0), Answered("b", at_s=2.0), Admitted("a", at_s=2.0))
    assert exchange.due_s == 100.0
    exchange.handle(Admitted("b", at_s=4.0))
    assert exchange.due_s == 7.0
    assert exchange.handle(Answered("c", at_s=7.0)) == [Yield("c")]  # the very moment still counts
    assert exchange.handle(Answered("d", at_s=7.1)) == [GiveUp("d", GiveUpReason.GRACE), Close()]
    assert exchange.closed_s == 7.0


def test_a_refused_update_is_none_of_the_quorum() -> None:
    exchange = begun(Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=2, grace_s=0.0))
    admitted(exchange, 1.0, "a")
    exchange.handle(Answered("b", at_s=2.0), Withdrawn("b", at_s=2.0))
    assert exchange.due_s == 100.0
    admitted(exchange, 3.0, "c")
    assert exchange.due_s == 3.0
    exchange.handle(Withdrawn("c", at_s=3.0))  # its device was removed
    assert exchange.due_s == 100.0


def test_who_is_nearly_there_is_waited_for_and_who_is_slow_is_not() -> None:
    exchange = begun(AUTO)
    admitted(exchange, 10.0, "a", "b")
    assert exchange.due_s == 11.0  # 3 in 11 s are more than 2 in 10; 4 in 40 are not
    admitted(exchange, 10.5, "c")
    assert exchange.handle(Tick(at_s=10.5)) == [GiveUp("d", GiveUpReason.GRACE), Close()]


def test_who_does_not_come_when_expected_is_waited_for_no_longer() -> None:
    exchange = begun(AUTO)
    admitted(exchange, 10.0, "a", "b")
    ended = exchange.handle(Tick(at_s=20.0))
    assert ended == [GiveUp("c", GiveUpReason.GRACE), GiveUp("d", GiveUpReason.GRACE), Close()]
    assert (exchange.closed_s, dict(exchange.missed_s)) == (11.0, {"c": 11.0, "d": 11.0})


def test_each_of_several_is_waited_for_in_turn() -> None:
    near = expected(a=10.0, b=11.0, c=12.0, d=13.0)
    exchange = begun(dataclasses.replace(AUTO, quorum=1, expected=near))
    admitted(exchange, 10.0, "a")
    assert exchange.due_s == 13.0
    exchange = begun(dataclasses.replace(AUTO, quorum=1, expected=near | expected(c=33.0, d=33.0)))
    admitted(exchange, 10.0, "a")
    assert exchange.due_s == 33.0  # 3 more in 33 s are more a second than 1 in 10, and then 2 more than 1 in 11


def test_who_is_late_is_waited_for_a_little_longer_while_that_pays() -> None:
    late = expected(a=10.0, b=10.0, c=10.0) | {"d": Expectation(10.5, 10.5, 11.0)}
    exchange = begun(dataclasses.replace(AUTO, quorum=3, expected=late))
    admitted(exchange, 10.0, "a", "b", "c")
    # d is late after 11 s, and comes with half the chance by 11.5, a quarter by 12.5: 3.25 * 11.5 < 3 * 12.5
    assert exchange.due_s == 11.5


def test_who_is_offline_is_not_expected_until_it_is_back() -> None:
    exchange = begun(AUTO)
    exchange.handle(Offline("c", at_s=3.0))
    admitted(exchange, 10.0, "a", "b")
    assert exchange.due_s == 10.0
    exchange = begun(AUTO)
    exchange.handle(Offline("c", at_s=3.0), Back("c", at_s=4.0))
    admitted(exchange, 10.0, "a", "b")
    assert exchange.due_s == 11.0


def test_where_nothing_is_known_the_deadline_counts() -> None:
    exchange = begun(dataclasses.replace(AUTO, expected=expected(a=1.0, b=1.0, c=1.0)))
    admitted(exchange, 1.0, "a", "b", "c")
    assert exchange.due_s == 100.0
    assert exchange.handle(Tick(at_s=100.0)) == [GiveUp("d", GiveUpReason.LATE), Close()]
    assert dict(exchange.missed_s) == {"d": 100.0}


def test_answers_from_before_a_restart_do_not_count_as_fast() -> None:
    exchange = Exchange("abcd", AUTO)
    exchange.handle(Answered("a", at_s=1000.0))
    exchange.handle(Begin(at_s=1000.0), Admitted("a", at_s=1000.0))
    admitted(exchange, 1005.0, "b")
    assert dict(exchange.took_s) == {"b": 5.0}


def test_a_pause_stops_the_window() -> None:
    exchange = begun(Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=1, grace_s=3.0))
    admitted(exchange, 1.0, "a")
    exchange.handle(Paused(at_s=2.0))
    assert exchange.due_s == math.inf
    exchange.handle(Resumed(at_s=12.0))
    assert exchange.due_s == 14.0


def test_the_setting() -> None:
    durations = Durations()
    durations.learn({"a": 8.0}, {})
    terms = [Terms.of_round(RoundsConfig(grace=grace), 50.0, "ab", durations) for grace in ("none", "auto", 3.0)]
    assert [one.grace_s for one in terms] == [math.inf, math.inf, 3.0]
    assert [one.expected for one in terms] == [None, dict.fromkeys("ab", Expectation(8.0, 8.0, 14.0)), None]
    for wrong in ("soon", True, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"rounds\.grace="):
            RoundsConfig(grace=wrong)


# --- by law -----------------------------------------------------------------------------------------------------


def with_guard(trace: Trace) -> tuple[Event, ...]:
    """Return the trace with what a guard says at once: it admits all."""
    events: list[Event] = [Begin(at_s=0.0)]
    for event in trace.events:
        events.append(event)
        if isinstance(event, Answered):
            events.append(Admitted(event.device, at_s=event.at_s))
    return tuple(events)


_seconds = st.integers(0, 60).map(float)
_some = st.tuples(_seconds, _seconds).map(sorted).map(lambda one: Expectation(one[0], one[0], one[1]))
_expected = st.fixed_dictionaries({f"client-{number}": _some for number in range(4)})
_windows = st.one_of(_seconds.map(lambda s: {"grace_s": s}), _expected.map(lambda one: {"expected": one}))


@law
@given(traces(), _windows)
def test_a_window_never_makes_a_round_longer_and_never_costs_the_quorum(trace: Trace, window: dict) -> None:
    events, terms = with_guard(trace), dataclasses.replace(trace.terms, **window)
    without = run(Exchange(trace.devices, trace.terms), iter(events))
    ended = run(Exchange(trace.devices, terms), iter(events))
    assert ended.closed_s is not None
    assert without.closed_s is not None
    assert ended.closed_s <= without.closed_s
    assert ended.yielded == without.yielded[: len(ended.yielded)]
    if any(reason is GiveUpReason.GRACE for _, reason in ended.given_up):
        answered = {event.device for event in trace.events_of(Answered)} & set(ended.yielded)
        assert len(answered) >= max(1, terms.quorum)


@law
@given(traces(), _expected)
def test_nobody_is_waited_for_longer_than_twice_the_usual_after_the_quorum(
    trace: Trace, those: dict[str, Expectation]
) -> None:
    exchange = Exchange(trace.devices, dataclasses.replace(trace.terms, expected=those))
    ended = run(exchange, iter(with_guard(trace)))
    if not any(reason is GiveUpReason.GRACE for _, reason in ended.given_up):
        return
    had_s = max(exchange.missed_s.values(), default=0.0)
    limits = [max(those[device].late_s, 2 * those[device].usual_s) for device in exchange.missed_s]
    assert had_s <= max([*limits, max(exchange.took_s.values())])


@law
@given(traces(), _windows)
def test_it_does_not_matter_how_often_one_looks_at_the_clock(trace: Trace, window: dict) -> None:
    terms, events = dataclasses.replace(trace.terms, **window), with_guard(trace)
    looks = tuple(Tick(at_s=at_s / 2) for at_s in range(150))
    often = sorted((*events, *looks), key=lambda event: event.at_s)
    assert run(Exchange(trace.devices, terms), iter(often)) == run(Exchange(trace.devices, terms), iter(events))
