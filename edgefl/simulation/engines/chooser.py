"""Decides which way of training simulates the next clients, from what the run's own clients took so far.

No engine is always the fastest: a stack is many times faster for small dense models and slower for convolutions, and
worker processes take seconds to start, which a short simulation never saves again. All engines give the same result,
so each is tried on clients that have to be trained anyway, and nothing is thrown away. A trial is a few clients to
warm up, which load samples and record steps, and a few to measure; then the fastest way trains all others.
A choice can be wrong: another program may have disturbed a trial. So the others are tried again when the chosen way
has become much faster or slower than it was, and in any case after a while, which grows with what a trial costs.
Pure: no clock and no engine; rates are samples per second, because clients differ in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MEASURE_S = 0.5  # of each trial: its clients are as many as the best way known trains in this time
FEWEST = 4  # clients of a part of a trial
NOT_DIVIDED = 4  # a cohort of no more than so many parts is tried whole: stacks of another size are recorded anew
WARM_UPS = 2  # parts of a trial that are not measured
FEW_PARTS = 2  # parts of the fewest clients before those, for a way that may be much slower than the best
MEASURED = 2  # parts of a trial that are measured; the faster counts, because other programs may disturb one
HOPELESS, HOPELESS_WITH_FEW = 3.0, 10.0  # a way so many times slower than the best is not tried to the end
SHIFT = 1.5  # the chosen way is so many times faster or slower than when it was chosen: try the others again
AGAIN_AFTER_SHIFT, AGAIN = 4.0, 20.0  # not sooner than after so many times what the last trial took, times its lag
WORTH = 2.0  # what is left of the run must take so many times the cost of a trial


@dataclass(slots=True)
class _Method:
    name: str
    cost_s: float  # of a trial: a guess, then what the last one took
    fewest: int = FEWEST
    rate: float = 0.0  # samples/s; 0 = not measured
    clients: int = 0  # that it has trained
    tried_at_s: float = 0.0
    ruled_out: str = ""
    not_worth: str = ""


@dataclass(slots=True)
class _Trial:
    way: _Method
    few_parts: int = 0  # still to come, before all others
    size: int = 0  # clients of each later part; 0 = not known yet
    warm_ups: int = WARM_UPS
    rates: list[float] = field(default_factory=list)
    cost_s: float = 0.0


class Chooser:
    """The ways of one run. The first is the simplest: it is tried first, and it cannot be ruled out.

    `start_s` guesses, for ways that must start something, how long that takes. `limits` has, for some ways, another one
    and how many times its rate they can reach at most.
    """

    def __init__(
        self, ways: Sequence[str], start_s: Mapping[str, float], limits: Mapping[str, tuple[str, float]] | None = None
    ) -> None:
        self._limits = limits or {}
        self._ways = {name: _Method(name, MEASURE_S + start_s.get(name, 0.0)) for name in ways}
        self._first = self._best = self._ways[ways[0]]
        self._trial: _Trial | None = _Trial(self._best)
        self._spent_s = self._samples = 0.0
        self._clients = 0
        self._recent = self._at_choice = 0.0  # rates of the best
        self._in_trial = False  # whether the clients given out last are a part of the trial

    @property
    def best(self) -> str:
        """The fastest way known."""
        return self._best.name

    @property
    def trying(self) -> str | None:
        """The way that is being tried, if any."""
        return self._trial.way.name if self._trial is not None else None

    def is_untried(self, way: str) -> bool:
        """Whether a way may still be tried for the first time."""
        one = self._ways[way]
        return not (one.rate or one.ruled_out or one.not_worth)

    def fewest(self, way: str, clients: int) -> None:
        """Set how many clients a way needs at least to show its speed."""
        self._ways[way].fewest = clients

    def rule_out(self, way: str, reason: str) -> None:
        """Never use a way again."""
        self._ways[way].ruled_out = reason
        if self._trial is not None and self._trial.way.name == way:
            self._trial = None
        if self._best.name == way:
            measured = [one for one in self._ways.values() if not one.ruled_out and one.rate]
            self._take(max(measured, key=lambda one: one.rate, default=self._first))

    def next(self, num_here: int, num_later: int, *, cohort: int, whole: bool = False) -> tuple[str, int]:
        """Return which way trains how many of the `num_here` clients that are left of a cohort.

        After this cohort, `num_later` others follow in the run. `whole`: it cannot be divided.
        """
        if self._trial is None and self._best.rate:
            self._trial = self._due(num_here + num_later)
        self._in_trial = self._trial is not None
        if self._trial is None:
            return self._best.name, num_here
        size = self._trial.size or self._size_of_parts(self._trial.way, cohort, whole=whole)
        if self._recent:  # else this is the very first part, a guess
            self._trial.size = size
        if whole or size <= self._trial.way.fewest:
            self._trial.few_parts = 0
        if self._trial.few_parts:
            size = self._trial.way.fewest
        if num_here < size:  # the rest of a cohort
            self._in_trial = False
            return self._best.name, num_here
        return self._trial.way.name, size

    def note(self, way: str, *, clients: int, samples: float, seconds: float) -> None:
        """Record that a way has trained clients with so many samples in so long, its start not included."""
        self._spent_s += seconds
        if samples <= 0 or seconds <= 0:
            return
        used, rate = self._ways[way], samples / seconds
        used.clients += clients
        self._clients, self._samples = self._clients + clients, self._samples + samples
        if self._trial is None or not self._in_trial:
            if used is self._best:
                self._recent = (self._recent + rate) / 2 if self._recent else rate
            return
        self._trial.cost_s += seconds
        if self._trial.few_parts:
            self._trial.few_parts -= 1
            if self._trial.few_parts == 0 and rate * HOPELESS_WITH_FEW < self._best.rate:
                self._end(self._trial, rate)
            return
        if self._trial.warm_ups:
            self._trial.warm_ups -= 1
            if used.rate == 0 and used is self._first:
                self._recent = rate  # the first guess of how many clients a trial needs
            if self._trial.warm_ups or rate * HOPELESS >= self._best.rate:
                return
        self._trial.rates.append(rate)
        if rate * HOPELESS < self._best.rate or len(self._trial.rates) == MEASURED:
            self._end(self._trial, max(self._trial.rates))

    def started(self, ways: Sequence[str], seconds: float) -> None:
        """Record what it took to start what these ways need."""
        self._spent_s += seconds
        for name in ways:
            way = self._ways[name]
            way.cost_s = max(way.cost_s, MEASURE_S + seconds)

    def reason(self) -> str:
        """Return what was measured, and what was not, and why."""
        a_client = self._samples / max(1, self._clients)
        measured = sorted((one for one in self._ways.values() if one.rate), key=lambda one: -one.rate)
        seen = [f"{one.name} {one.rate / a_client:.0f} clients/s" for one in measured if not one.ruled_out]
        out: dict[str, list[str]] = {}
        for one in self._ways.values():
            if one.ruled_out or (one.not_worth and not one.rate):
                out.setdefault(one.ruled_out or one.not_worth, []).append(one.name)
        said = [f"measured on the run's own clients: {', '.join(seen)}"] if seen else []
        return "; ".join([*said, *(f"not {' or '.join(names)}: {why}" for why, names in out.items())])

    def _size_of_parts(self, way: _Method, cohort: int, *, whole: bool) -> int:
        """Return how many clients the best way known trains in one part of a trial, or all of a small cohort."""
        rate = self._best.rate or self._recent
        a_client = self._samples / self._clients if self._clients else 0.0
        size = max(way.fewest, int(rate * MEASURE_S / MEASURED / a_client) if a_client else 0)
        is_small = bool(self._recent) and cohort <= NOT_DIVIDED * size
        return cohort if whole or is_small else size

    def _end(self, trial: _Trial, rate: float) -> None:
        way, self._trial = trial.way, None
        way.rate, way.tried_at_s = rate, self._spent_s
        way.cost_s = max(way.cost_s, trial.cost_s)  # what it starts may have been there already
        if way is self._best or way.rate > self._best.rate:
            self._take(way)

    def _take(self, way: _Method) -> None:
        self._best, self._recent, self._at_choice = way, way.rate, way.rate

    def _due(self, num_left: int) -> _Trial | None:
        """Return the next trial: of a way not yet measured, else of one whose result may be out of date."""
        others = [one for one in self._ways.values() if one is not self._best and not one.ruled_out]
        ratio = self._recent / self._at_choice if self._at_choice else 1.0
        again = AGAIN if 1 / SHIFT < ratio < SHIFT else AGAIN_AFTER_SHIFT
        for way in sorted(others, key=lambda one: one.rate > 0):
            lag = max(1.0, self._recent / way.rate) if way.rate else 0.0
            if self._spent_s - way.tried_at_s < again * way.cost_s * lag:
                continue
            if self._is_worth(way, num_left):
                self._best.rate = self._at_choice = self._recent  # both are compared as they are now
                return _Trial(way, few_parts=FEW_PARTS)
        return None

    def _is_worth(self, way: _Method, num_left: int) -> bool:
        like, times = self._limits.get(way.name, (way.name, 0.0))
        if times and 0 < times * self._ways[like].rate <= self._recent:
            way.not_worth = f"it is at most {times:g} times as fast as {like}"
            return False
        left_s = num_left * self._samples / self._clients / self._recent
        if left_s >= WORTH * way.cost_s:
            return True
        way.not_worth = f"what is left takes about {left_s:.1f} s, too little to try it"
        return False
