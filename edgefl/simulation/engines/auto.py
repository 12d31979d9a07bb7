"""The engine `auto`: the fastest of loop, stacked and pool, found on the run's own rounds (see `chooser`).

A cohort is divided among engines while they are tried; each client is trained once. With `auto` the caller wants a
result, not a certain engine: an engine that fails is ruled out, and others train the clients that it left.
Invariant: each client of a cohort is counted once, and every change of the engine is reported.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgefl.errors import ConfigError
from edgefl.measure import give_back_memory, num_cores
from edgefl.records import Answer, Evaluated, Failure, Partial, Plan, Traffic
from edgefl.simulation.engines.attempt import Attempt
from edgefl.simulation.engines.chooser import FEWEST, Chooser
from edgefl.simulation.engines.fleets import Engine, SimulationSetup
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.fleet import PoolFleet
from edgefl.simulation.engines.ray.fleet import RayFleet
from edgefl.simulation.engines.stackable import why_not_chosen
from edgefl.simulation.engines.stacked_fleet import StackedFleet

AUTO, LOOP, STACKED, POOL = "auto", "loop", "stacked", "pool"
ENGINES: Mapping[str, Callable[[SimulationSetup], Engine]] = {
    LOOP: LoopFleet,
    STACKED: StackedFleet,
    POOL: PoolFleet,
    "ray": RayFleet,  # never chosen by itself
}
STACKS = "pool of stacks"  # the pool's workers train clients in stacks
STARTS_S = {STACKED: 1.0, POOL: 4.0, STACKS: 4.0}  # about: recording steps, processes

OnEngine = Callable[[str, str], None]  # its name, and why it was chosen


@dataclass(frozen=True, slots=True)
class Chosen:
    """An engine, ready to run, and why it was chosen."""

    engine: Engine
    name: str
    reason: str


def make_engine(name: str, setup: SimulationSetup) -> Chosen:
    """Make an engine by its short name; raises ConfigError if it is unknown, or cannot run the task.

    The workers of a pool train clients in stacks if that turns out to be faster.
    """
    if name == AUTO:
        auto = AutoFleet(setup, (LOOP, STACKED, POOL, STACKS))
        return Chosen(
            auto, LOOP, "; ".join(["the others are tried in the run", *([auto.reason] if auto.reason else [])])
        )
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is not one of: {', '.join([AUTO, *ENGINES])}")
    if name != POOL:
        return Chosen(ENGINES[name](setup), name, "it was asked for")
    fleet = AutoFleet(setup, (POOL, STACKS))
    fleet.open(POOL)
    return Chosen(fleet, POOL, "it was asked for")


class AutoFleet:
    """Trains cohorts by the fastest of several ways. `on_engine` is told of every change, and why.

    The first way must be able to run the task; its faults are not hidden.
    """

    def __init__(self, setup: SimulationSetup, ways: Sequence[str]) -> None:
        self._setup, self._ways, self._first = setup, ways, ways[0]
        self.on_engine: OnEngine = lambda _name, _reason: None
        limits = {POOL: (LOOP, float(num_cores())), STACKS: (STACKED, float(num_cores()))}
        self._chooser = Chooser(ways, STARTS_S, {way: one for way, one in limits.items() if one[0] in ways})
        self._engines: dict[str, Engine] = {}  # those that are open, by the engine's name
        self._spent, self._peak_rss_mb = Traffic(), 0.0  # of closed engines
        self._told = ""  # the way last reported
        self._rule_out_what_cannot_run(ways)

    @property
    def peak_rss_mb(self) -> float:
        """Return the peak memory of the worker processes."""
        return max([self._peak_rss_mb, *(float(getattr(one, "peak_rss_mb", 0.0)) for one in self._engines.values())])

    @property
    def reason(self) -> str:
        """Why the current engine was chosen."""
        return self._chooser.reason()

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Divide a cohort among the ways that are tried or chosen; one whose answers stay single is not divided."""
        if not plan.fit:
            yield from self._evaluated(plan)
            return
        whole, left = not self._setup.takes_sums(plan), plan.clients
        while left and not self._setup.stop.is_set():
            way, count = self._chooser.next(len(left), self._later(plan), cohort=len(plan.clients), whole=whole)
            if not self._is_open(way):
                continue
            self._tell()
            part, others = left[:count], left[count:]
            answered: set[str] = set()
            yield from self._trained(way, dataclasses.replace(plan, clients=part), answered)
            left = (*(client for client in part if client not in answered), *others)

    def traffic(self) -> Traffic:
        return sum((one.traffic() for one in self._engines.values()), self._spent)

    def open(self, way: str) -> None:
        """Start the engine of a way; raises ConfigError if it cannot run the task."""
        name = POOL if way == STACKS else way
        if name not in self._engines:
            start_s = time.perf_counter()
            self._engines[name] = engine = ENGINES[name](self._setup)
            if isinstance(engine, PoolFleet):
                self._set_up_pool(engine)
            started = [one for one in self._ways if name == (POOL if one == STACKS else one)]
            self._chooser.started(started, time.perf_counter() - start_s)
        pool = self._engines[name]
        if isinstance(pool, PoolFleet):
            stacks = way == STACKS or self._setup.method.stacks
            pool.use(dataclasses.replace(self._setup.method, stacks=stacks))

    def close(self) -> None:
        """Close all engines."""
        for name in tuple(self._engines):
            self._close(name)

    def _rule_out_what_cannot_run(self, ways: Sequence[str]) -> None:
        if STACKED in ways and (reason := why_not_chosen(self._setup)):
            self._chooser.rule_out(STACKED, reason)
        if num_cores() == 1:
            for way in {POOL, STACKS} & set(ways[1:]):
                self._chooser.rule_out(way, "there is only one core")

    def _is_open(self, way: str) -> bool:
        """Open a way's engine; if that fails, rule the way out."""
        if way == self._first:
            self.open(way)
            return True
        with Attempt(way) as attempt:
            try:
                self.open(way)
            except ConfigError as error:
                self._rule_out(way, str(error))
                return False
        if attempt.fault:
            self._rule_out(way, attempt.fault)
        return not attempt.fault

    def _set_up_pool(self, pool: PoolFleet) -> None:
        ways = [way for way in (POOL, STACKS) if way in self._ways]
        for way in ways:
            self._chooser.fewest(way, FEWEST * pool.num_workers)
        if STACKS in ways and (reason := pool.why_not_stacked()):
            self._chooser.rule_out(STACKS, reason)

    def _evaluated(self, plan: Plan) -> Iterator[Answer]:
        """Evaluate without training by the best way so far; it says nothing of how fast a way trains."""
        best = self._chooser.best
        way = best if self._is_open(best) else self._first
        self.open(way)
        yield from self._engines[POOL if way == STACKS else way].collect(plan)

    def _trained(self, way: str, plan: Plan, answered: set[str]) -> Iterator[Answer]:
        """Yield a part's answers, and note how long they took; on a fault, `answered` are those that count."""
        engine = self._engines[POOL if way == STACKS else way]
        samples, start_s, fault = 0.0, time.perf_counter(), ""
        try:
            if way == self._first:
                for answer in engine.collect(plan):
                    samples += _count(answer, answered)
                    yield answer
            else:
                with Attempt(way) as attempt:
                    for answer in engine.collect(plan):
                        samples += _count(answer, answered)
                        yield answer
                fault = attempt.fault
        finally:  # a round that has all the answers that it needs takes no more
            if fault:
                self._rule_out(way, f"{fault} in round {plan.round}")
            else:
                seconds = time.perf_counter() - start_s
                self._chooser.note(way, clients=len(answered), samples=samples, seconds=seconds)
                if way == STACKS and isinstance(engine, PoolFleet) and engine.faults:
                    self._rule_out(STACKS, engine.faults[0])
                self._close_what_is_not_needed()

    def _rule_out(self, way: str, reason: str) -> None:
        self._chooser.rule_out(way, reason)
        if way == POOL and POOL not in self._engines and STACKS in self._ways:  # it did not even start
            self._chooser.rule_out(STACKS, reason)
        self._close_what_is_not_needed()

    def _close_what_is_not_needed(self) -> None:
        """Close slower engines; both ways of a pool are tried before it is closed."""
        if self._chooser.trying is not None:
            return
        best = POOL if self._chooser.best == STACKS else self._chooser.best
        for name in tuple(self._engines):
            if name != best and not (name == POOL and STACKS in self._ways and self._chooser.is_untried(STACKS)):
                self._close(name)

    def _close(self, name: str) -> None:
        engine = self._engines.pop(name)
        self._spent += engine.traffic()
        self._peak_rss_mb = max(self._peak_rss_mb, float(getattr(engine, "peak_rss_mb", 0.0)))
        engine.close()
        give_back_memory()

    def _later(self, plan: Plan) -> int:
        """Return about how many clients the later rounds have."""
        rounds = self._setup.config.rounds
        return (rounds.count - plan.round) * (rounds.clients or len(self._setup.population.names()))

    def _tell(self) -> None:
        """Tell of a new choice, once it is made."""
        if self._chooser.trying is None and self._chooser.best != self._told:
            self._told = self._chooser.best
            self.on_engine(POOL if self._told == STACKS else self._told, self.reason)


def _count(answer: Answer, answered: set[str]) -> float:
    """Add an answer's clients to those that answered; return its samples."""
    if isinstance(answer, Failure):
        answered.add(answer.device)
        return 0.0
    answered.update(answer.contributors if isinstance(answer, Partial) else (answer.device,))
    return 0.0 if isinstance(answer, Evaluated) else answer.weight
