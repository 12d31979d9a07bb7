"""Answers to the exchange before: by hand, and that they change nothing else."""

from __future__ import annotations

import dataclasses

from hypothesis import given

from edgefl.exchange import Announce, Answered, Begin, Close, Exchange, Late, Terms, Yield
from tests.edgefl.exchange.traces import Trace, end_of, law, traces

TERMS = Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=1)


def test_a_device_may_answer_the_exchange_before_and_this_one_once_each() -> None:
    exchange = Exchange(["a", "b"], TERMS, owed=["b", "c"])
    assert exchange.handle(Begin(at_s=0.0)) == [Announce("a"), Announce("b")]
    assert exchange.takes_late("b", 1.0)
    assert not exchange.takes_late("a", 1.0)
    assert exchange.handle(Late("b", at_s=1.0), Late("b", at_s=1.0), Late("a", at_s=1.0)) == [Yield("b", is_late=True)]
    assert exchange.handle(Answered("b", at_s=2.0)) == [Yield("b")]
    assert list(exchange.owed) == ["c"]
    assert exchange.handle(Answered("a", at_s=3.0)) == [Yield("a"), Close()]  # it does not wait for c
    assert not exchange.takes_late("c", 3.0)
    assert exchange.handle(Late("c", at_s=3.0)) == []
    assert list(exchange.owed) == ["c"]


def test_at_the_deadline_it_still_counts_and_not_after_it() -> None:
    for at_s, taken in ((100.0, True), (100.1, False)):
        exchange = Exchange(["a"], TERMS, owed=["b"])
        exchange.handle(Begin(at_s=0.0))
        assert exchange.takes_late("b", at_s) is taken
        assert (Yield("b", is_late=True) in exchange.handle(Late("b", at_s=at_s))) is taken


@law
@given(traces(late=True))
def test_they_change_nothing_for_the_others(trace: Trace) -> None:
    without = dataclasses.replace(
        trace, owed=(), events=tuple(one for one in trace.events if not isinstance(one, Late))
    )
    end, other = end_of(trace), end_of(without)
    late = [name for name in end.yielded if name.endswith(", late")]
    assert [name for name in end.yielded if name not in late] == list(other.yielded)
    assert (end.given_up, end.closed_s) == (other.given_up, other.closed_s)
    assert len(set(late)) == len(late) <= len(trace.owed)
