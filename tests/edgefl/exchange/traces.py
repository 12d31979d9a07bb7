"""Traces of events that could happen to an exchange, for hypothesis. Times are whole seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st

from edgefl.exchange import (
    Answered,
    Back,
    Begin,
    Event,
    Exchange,
    Failed,
    GiveUp,
    GiveUpReason,
    Late,
    Offline,
    Paused,
    Resumed,
    Terms,
    Tick,
    Yield,
)

LONGEST_S = 60
law = settings(deadline=None, derandomize=True, database=None, max_examples=100)  # no clock, no dice, no files


@dataclass(frozen=True)
class Trace:
    """What happens to an exchange of these devices."""

    devices: tuple[str, ...]
    terms: Terms
    events: tuple[Event, ...]  # after `Begin` at 0
    owed: tuple[str, ...] = ()  # devices that may still answer the exchange before

    def events_of(self, *kinds: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kinds)]


@dataclass(frozen=True)
class End:
    """How an exchange ended."""

    yielded: tuple[str, ...]
    given_up: tuple[tuple[str, GiveUpReason], ...]
    closed_s: float | None


def named(device: str, *, late: bool) -> str:
    """Return the name of a device, which says whether its answer is that of the exchange before."""
    return f"{device}, late" if late else device


def run(exchange: Exchange, events: Iterator[Event]) -> End:
    """Feed an exchange with events, then let time pass until it is over."""
    instructions = exchange.handle(*events)
    while exchange.closed_s is None:
        instructions += exchange.handle(Tick(at_s=exchange.due_s))
    yielded = tuple(named(one.device, late=one.is_late) for one in instructions if isinstance(one, Yield))
    given_up = tuple((one.device, one.reason) for one in instructions if isinstance(one, GiveUp))
    return End(yielded, given_up, exchange.closed_s)


def end_of(trace: Trace) -> End:
    """Return how a trace ends by the exchange alone."""
    return run(Exchange(trace.devices, trace.terms, trace.owed), iter((Begin(at_s=0.0), *trace.events)))


_KINDS: tuple[Callable[[str, float], Event], ...] = (
    lambda device, at_s: Answered(device, at_s=at_s),
    lambda device, at_s: Failed(device, at_s=at_s),
    lambda device, at_s: Offline(device, at_s=at_s),
    lambda device, at_s: Offline(device, was_seen=False, at_s=at_s),
    lambda device, at_s: Back(device, at_s=at_s),
)
_LATE = (*_KINDS, *[lambda device, at_s: Late(device, at_s=at_s)] * 3)
_times = st.integers(0, LONGEST_S)
_facts = st.lists(st.tuples(st.sampled_from(range(4)), st.sampled_from(_KINDS), _times), max_size=12)
_facts_with_late = st.lists(st.tuples(st.sampled_from(range(4)), st.sampled_from(_LATE), _times), max_size=12)
_pauses = st.lists(_times, max_size=4, unique=True).map(sorted)


@st.composite
def traces(draw: st.DrawFn, *, max_devices: int = 4, quorums: tuple[int, int] = (0, 4), late: bool = False) -> Trace:
    """Draw a trace; with `late`, some devices also answer the exchange before."""
    devices = tuple(f"client-{number}" for number in range(draw(st.integers(1, max_devices))))
    terms = Terms(
        deadline_s=float(draw(st.integers(1, LONGEST_S))),
        offline_grace_s=float(draw(st.integers(0, 20))),
        quorum=draw(st.integers(*quorums)),
    )
    facts = draw(_facts_with_late if late else _facts)
    events = [kind(f"client-{number % len(devices)}", float(at_s)) for number, kind, at_s in facts]
    for begin_s, end_s in list(pairwise(draw(_pauses)))[::2]:
        events += [Paused(at_s=float(begin_s)), Resumed(at_s=float(end_s))]
    owed = tuple(draw(st.sets(st.sampled_from(devices)))) if late else ()
    return Trace(devices, terms, tuple(sorted(events, key=lambda event: event.at_s)), tuple(sorted(owed)))
