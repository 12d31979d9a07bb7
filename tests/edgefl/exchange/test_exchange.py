"""The state machine by hand, as tables of events, and by law, on traces that hypothesis draws."""

from __future__ import annotations

import dataclasses
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from edgefl.exchange import (
    Announce,
    Answered,
    Back,
    Begin,
    Close,
    Exchange,
    Failed,
    GiveUp,
    GiveUpReason,
    Joined,
    Left,
    Offline,
    Paused,
    Resumed,
    Stop,
    Terms,
    Tick,
    Withdrawn,
    Yield,
)
from tests.edgefl.exchange.traces import Trace, end_of, law, run, traces

TERMS = Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=1, return_s=20.0)


def begun(*devices: str, terms: Terms = TERMS) -> Exchange:
    exchange = Exchange(devices, terms)
    assert exchange.handle(Begin(at_s=0.0)) == [Announce(device) for device in devices]
    return exchange


def test_one_that_leaves_is_not_waited_for_and_may_join_again() -> None:
    exchange = begun("a", "b")
    assert exchange.handle(Left("a", at_s=1.0), Left("x", at_s=1.0)) == []
    assert exchange.handle(Answered("a", at_s=2.0)) == []
    assert exchange.handle(Joined("a", at_s=3.0)) == [Announce("a")]
    assert exchange.handle(Answered("a", at_s=4.0)) == [Yield("a")]
    assert exchange.handle(Left("b", at_s=5.0)) == [Close()]
    assert exchange.handle(Joined("b", at_s=6.0)) == []


def test_simultaneous_answers_are_all_yielded_also_if_the_first_one_ends_the_waiting() -> None:
    """The quorum is there with the first: then all others have been offline for longer than the grace time."""
    exchange = begun("a", "b", "c")
    exchange.handle(Offline("b", was_seen=True, at_s=1.0), Offline("c", was_seen=True, at_s=1.0))
    assert exchange.handle(Answered("a", at_s=10.0), Answered("b", at_s=10.0)) == [Yield("a"), Yield("b")]
    assert exchange.handle(Tick(at_s=10.0)) == [GiveUp("c", GiveUpReason.OFFLINE), Close()]


def test_all_answer_and_it_is_over() -> None:
    exchange = begun("a", "b", "c")
    assert exchange.handle(Answered("b", at_s=1.0)) == [Yield("b")]
    assert exchange.handle(Failed("c", at_s=2.0)) == [Yield("c")]
    assert list(exchange.waiting) == ["a"]
    assert exchange.handle(Answered("a", at_s=3.0)) == [Yield("a"), Close()]
    assert (exchange.closed_s, exchange.due_s) == (3.0, float("inf"))
    assert exchange.handle(Answered("a", at_s=4.0), Tick(at_s=1e9)) == []


def test_a_second_answer_and_a_stranger_are_not_yielded() -> None:
    exchange = begun("a", "b")
    assert exchange.handle(Answered("a", at_s=1.0), Answered("a", at_s=1.0), Answered("z", at_s=1.0)) == [Yield("a")]


def test_the_deadline_gives_up_all_who_are_missing_and_its_very_moment_still_counts() -> None:
    exchange = begun("a", "b", "c")
    assert exchange.due_s == 100.0
    assert exchange.waits_for("a", 100.0)
    assert not exchange.waits_for("a", 100.1)
    assert exchange.handle(Answered("a", at_s=100.0)) == [Yield("a")]
    late = [GiveUp("b", GiveUpReason.LATE), GiveUp("c", GiveUpReason.LATE), Close()]
    assert exchange.handle(Answered("b", at_s=100.1)) == late
    assert exchange.closed_s == 100.0


def test_once_the_quorum_is_there_the_offline_are_not_waited_for() -> None:
    exchange = begun("a", "b", "c")
    assert exchange.handle(Offline("b", at_s=1.0), Offline("c", at_s=4.0)) == []
    assert exchange.due_s == 100.0  # nobody has answered
    exchange.handle(Answered("a", at_s=2.0))
    assert exchange.due_s == 9.0  # c went last
    assert exchange.handle(Tick(at_s=8.9)) == []
    assert exchange.handle(Tick(at_s=9.0)) == [
        GiveUp("b", GiveUpReason.OFFLINE),
        GiveUp("c", GiveUpReason.OFFLINE),
        Close(),
    ]


def test_a_failure_is_no_update_and_a_withdrawn_one_no_longer() -> None:
    exchange = begun("a", "b", "c")
    exchange.handle(Offline("c", at_s=0.0), Failed("a", at_s=1.0))
    assert exchange.due_s == 100.0
    exchange.handle(Answered("b", at_s=1.0))
    assert exchange.due_s == 5.0
    exchange.handle(Withdrawn("b", at_s=2.0))
    assert exchange.due_s == 100.0


def test_one_who_is_back_is_waited_for_and_its_grace_begins_anew() -> None:
    exchange = begun("a", terms=dataclasses.replace(TERMS, quorum=0))
    exchange.handle(Offline("a", at_s=1.0), Offline("a", at_s=3.0))
    assert exchange.due_s == 6.0  # since the first
    exchange.handle(Back("a", at_s=4.0))
    assert exchange.due_s == 100.0
    exchange.handle(Offline("a", at_s=10.0))
    assert exchange.handle(Tick(at_s=15.0)) == [GiveUp("a", GiveUpReason.OFFLINE), Close()]


def test_one_not_heard_of_may_be_on_its_way_back() -> None:
    exchange = begun("a", terms=dataclasses.replace(TERMS, quorum=0))
    exchange.handle(Offline("a", was_seen=False, at_s=0.0))
    assert exchange.due_s == 25.0
    exchange.handle(Offline("a", at_s=2.0))  # now it is said
    assert exchange.due_s == 7.0


def test_while_it_is_paused_no_time_passes_and_afterwards_all_are_told_again() -> None:
    exchange = begun("a", "b", terms=dataclasses.replace(TERMS, quorum=0))
    exchange.handle(Offline("a", at_s=8.0), Answered("b", at_s=9.0), Paused(at_s=10.0))
    assert exchange.is_paused
    assert exchange.handle(Paused(at_s=11.0), Tick(at_s=5000.0)) == []
    assert exchange.waits_for("a", 5000.0)
    assert exchange.handle(Resumed(at_s=5010.0)) == [Announce("a")]
    assert exchange.handle(Resumed(at_s=5010.0)) == []
    assert exchange.due_s == 5013.0  # of five seconds two had passed
    exchange.handle(Back("a", at_s=5011.0))
    assert exchange.due_s == 5100.0


def test_what_was_answered_before_it_begins_is_not_asked_again() -> None:
    exchange = Exchange(("a", "b"), TERMS)
    assert exchange.handle(Answered("a", at_s=50.0), Begin(at_s=60.0)) == [Yield("a"), Announce("b")]
    assert exchange.due_s == 160.0
    told = Exchange(("a",), TERMS)
    assert told.handle(Begin(is_announced=True, at_s=0.0)) == []
    assert told.waits_for("a", 1.0)


def test_an_exchange_with_nobody_is_over_when_it_begins() -> None:
    assert Exchange((), TERMS).handle(Begin(at_s=0.0)) == [Close()]


def test_whoever_is_missing_is_given_up_when_it_is_stopped() -> None:
    exchange = begun("a", "b")
    exchange.handle(Answered("a", at_s=1.0))
    assert exchange.handle(Stop(at_s=2.0)) == [GiveUp("b", GiveUpReason.STOPPED), Close()]
    assert exchange.handle(Stop(at_s=3.0)) == []


@law
@given(traces())
def test_everybody_is_yielded_once_or_given_up_and_it_ends(trace: Trace) -> None:
    end = end_of(trace)
    named = [*end.yielded, *(device for device, _ in end.given_up)]
    assert sorted(named) == sorted(trace.devices)
    assert end.closed_s is not None
    paused_s = sum(one.at_s for one in trace.events_of(Resumed)) - sum(one.at_s for one in trace.events_of(Paused))
    assert end.closed_s <= trace.terms.deadline_s + paused_s
    first = {device: device in {one.device for one in trace.events_of(Answered, Failed)} for device in trace.devices}
    assert all(first[device] for device in end.yielded)


@law
@given(traces(), st.data())
def test_it_does_not_matter_how_often_one_looks_at_the_clock(trace: Trace, data: st.DataObject) -> None:
    """Half seconds: the very moment of an event is its own."""
    looks = [Tick(at_s=at_s + 0.5) for at_s in data.draw(st.lists(st.integers(0, 60), max_size=20))]
    events = sorted((*trace.events, *looks), key=lambda event: event.at_s)
    assert end_of(dataclasses.replace(trace, events=tuple(events))) == end_of(trace)


@law
@given(traces(), st.integers(0, 60), st.integers(1, 1000))
def test_a_pause_puts_everything_after_it_off_and_changes_nothing_else(trace: Trace, at_s: int, seconds: int) -> None:
    bare = dataclasses.replace(trace, events=tuple(trace.events_of(Answered, Failed, Offline, Back)))
    before = [event for event in bare.events if event.at_s <= at_s]
    after = [dataclasses.replace(one, at_s=one.at_s + seconds) for one in bare.events if one.at_s > at_s]
    paused = (*before, Paused(at_s=float(at_s)), Resumed(at_s=float(at_s + seconds)), *after)
    end, late = end_of(bare), end_of(dataclasses.replace(bare, events=paused))
    assert (late.yielded, late.given_up) == (end.yielded, end.given_up)
    assert end.closed_s is not None
    expected_s = end.closed_s + seconds if end.closed_s > at_s else end.closed_s
    assert late.closed_s in {expected_s, end.closed_s + seconds}  # at the pause's own moment, either


@law
@given(traces())
def test_a_higher_quorum_ends_no_exchange_sooner(trace: Trace) -> None:
    ends = []
    for quorum in range(5):
        terms = dataclasses.replace(trace.terms, quorum=quorum)
        ends.append(end_of(dataclasses.replace(trace, terms=terms)).closed_s or 0.0)
    assert ends == sorted(ends)


@law
@given(traces())
def test_names_do_not_matter(trace: Trace) -> None:
    numbers = count()
    other = {device: f"other-{next(numbers)}" for device in trace.devices}
    events = [
        dataclasses.replace(one, device=other[one.device]) if hasattr(one, "device") else one for one in trace.events
    ]
    renamed = run(Exchange(other.values(), trace.terms), iter([Begin(at_s=0.0), *events]))
    assert [other[device] for device in end_of(trace).yielded] == list(renamed.yielded)
