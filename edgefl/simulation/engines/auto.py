"""Choose an engine by measuring the first cohort on each that can run the task, and say why it was chosen.

No engine is always the fastest: a stack is many times faster for small dense models and slower for convolutions,
and worker processes take seconds to start, which a short simulation never saves again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgefl.errors import ConfigError
from edgefl.measure import give_back_memory, num_cores
from edgefl.records import Partial, Plan
from edgefl.rounds import select_clients
from edgefl.simulation.engines.fallback import Attempt
from edgefl.simulation.engines.fleets import Engine, SimulationSetup
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.fleet import PoolFleet
from edgefl.simulation.engines.ray.fleet import RayFleet
from edgefl.simulation.engines.stackable import why_not_chosen
from edgefl.simulation.engines.stacked_fleet import StackedFleet
from edgefl.training.parts import parts_of

AUTO, LOOP = "auto", "loop"
ENGINES: Mapping[str, Callable[[SimulationSetup], Engine]] = {
    LOOP: LoopFleet,
    "stacked": StackedFleet,
    "pool": PoolFleet,
    "ray": RayFleet,  # never chosen by itself
}
STACKS = "pool of stacks"
MEASURE_S = 0.5  # of the loop; the others get the same number of clients
FEWEST = 4  # clients to measure with
POOL_START_S = 4.0
WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Chosen:
    """An engine, ready to run, and why it was chosen."""

    engine: Engine
    name: str
    reason: str


def make_engine(name: str, setup: SimulationSetup) -> Chosen:
    """Make an engine by its short name; raises ConfigError if it is unknown, or cannot run the task.

    The workers of a pool train clients in stacks if that was measured to be faster.
    """
    if name == AUTO:
        return _Choice(setup).choose()
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is not one of: {', '.join([AUTO, *ENGINES])}")
    if name != "pool":
        return Chosen(ENGINES[name](setup), name, "it was asked for")
    return _Choice(setup).choose_method()


class _Choice:
    def __init__(self, setup: SimulationSetup) -> None:
        self._setup = setup
        parts = parts_of(setup.task, setup.config.train.seed)
        self._plan = Plan(
            job="measure",
            round=1,
            parameters=parts.moving,
            clients=select_clients(setup.population.names(), setup.config, 1),
            train=setup.config.train,
            deadline_s=setup.config.rounds.deadline_s,
            frozen=parts.frozen,
        )
        self._rates: dict[str, float] = {}  # clients/s
        self._ruled_out: dict[str, str] = {}

    def choose(self) -> Chosen:
        """Measure every engine that can run the task and may be faster, and return the fastest."""
        best = Chosen(LoopFleet(self._setup), LOOP, "")
        self._shorten_plan(best.engine, FEWEST)
        self._measure(LOOP, best.engine)
        if reason := why_not_chosen(self._setup):
            self._ruled_out["stacked"] = reason
        else:
            best = self._with_stacks(best)
        if reason := self._why_no_pool(best.name):
            self._ruled_out["pool"] = reason
        else:
            best = self._with_pool(best)
        return dataclasses.replace(best, reason=self.reason())

    def choose_method(self) -> Chosen:
        """Return a pool whose workers use the faster method."""
        pool = PoolFleet(self._setup)
        self._shorten_plan(pool, FEWEST * pool.num_workers)
        if reason := pool.why_not_stacked():
            self._ruled_out[STACKS] = reason
        self._measure_pool(pool)
        return Chosen(pool, "pool", f"it was asked for; {self.reason()}")

    def _shorten_plan(self, engine: Engine, fewest: int) -> None:
        """Reduce the plan to the clients that an engine trains in `MEASURE_S`; all engines are measured with these."""
        clients = self._plan.clients
        self._plan = dataclasses.replace(self._plan, clients=clients[:fewest])
        _timed(engine, self._plan)  # torch's first steps are slow
        count = int(len(self._plan.clients) * MEASURE_S / _timed(engine, self._plan))
        self._plan = dataclasses.replace(self._plan, clients=clients[: max(fewest, count)])

    def _measure(self, name: str, engine: Engine) -> None:
        for _ in range(WARM_UPS):  # loads samples and records steps
            _timed(engine, self._plan)
        best_s = min(_timed(engine, self._plan) for _ in range(2))  # the best of two: other programs may disturb one
        self._rates[name] = len(self._plan.clients) / best_s

    def _measure_pool(self, pool: PoolFleet) -> str:
        """Measure the workers one client at a time and, if possible, in stacks; keep the faster method."""
        self._measure("pool", pool)
        if {"stacked", STACKS} & self._ruled_out.keys():
            return "pool"
        pool.use(dataclasses.replace(self._setup.method, stacks=True))
        self._measure(STACKS, pool)
        if pool.faults:
            self._ruled_out[STACKS] = pool.faults[0]
            del self._rates[STACKS]
        elif self._rates[STACKS] > self._rates["pool"]:
            return STACKS
        pool.use(self._setup.method)
        return "pool"

    def _better(self, best: Chosen, name: str, engine: Engine) -> Chosen:
        """Return the faster of two, and close the other."""
        rated = name
        if isinstance(engine, PoolFleet):
            rated = self._measure_pool(engine)
        else:
            self._measure(name, engine)
        if self._rates[rated] <= self._rates[best.name]:
            engine.close()
            return best
        best.engine.close()
        best = Chosen(engine, name, "")
        give_back_memory()  # memory of the closed engine
        return best

    def _why_no_pool(self, best: str) -> str | None:
        if num_cores() == 1:
            return "there is only one core"
        rounds = self._setup.config.rounds
        cohort = rounds.clients or len(self._setup.population.names())
        left_s = rounds.count * cohort / self._rates[best]
        if left_s < POOL_START_S:
            return f"all rounds take about {left_s:.1f} s, no longer than the start of processes"
        return None

    def _with_stacks(self, best: Chosen) -> Chosen:
        with Attempt("stacked") as attempt:
            return self._better(best, "stacked", StackedFleet(self._setup))
        self._rule_out("stacked", attempt.fault)
        return best

    def _with_pool(self, best: Chosen) -> Chosen:
        try:
            pool = PoolFleet(self._setup)
        except ConfigError as error:
            self._rule_out("pool", str(error))
            return best
        with Attempt("pool") as attempt:
            return self._better(best, "pool", pool)
        pool.close()
        self._rule_out("pool", attempt.fault)
        return best

    def _rule_out(self, name: str, reason: str) -> None:
        self._ruled_out[name] = reason
        self._rates.pop(name, None)

    def reason(self) -> str:
        """Return what was measured, and what was not."""
        seen = [f"{name} {rate:.0f} clients/s" for name, rate in sorted(self._rates.items(), key=lambda one: -one[1])]
        out = [f"not {name}: {reason}" for name, reason in self._ruled_out.items()]
        return "; ".join([f"measured on {len(self._plan.clients)} clients: {', '.join(seen)}", *out])


def _timed(engine: Engine, plan: Plan) -> float:
    start_s = time.perf_counter()
    for answer in engine.collect(plan):
        if isinstance(answer, Partial):
            continue  # all answers are dropped, also this sum
    return time.perf_counter() - start_s
